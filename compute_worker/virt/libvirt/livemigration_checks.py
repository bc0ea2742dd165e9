"""Live migration, before anything is touched: could the guest run there, and may it leave here?

The destination compares hosts first, as it knows no more; the source adds what only the running guest can say (its
processor, its machine type, the disks that must travel), and the destination compares that when it prepares
(:mod:`compute_worker.virt.libvirt.livemigration_destination`).
"""

from __future__ import annotations

import base64
import os
import zlib
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import BaseImage, Disk, DiskInfo, Instance, MigrateData, Migration
from compute_worker.states import PowerState
from compute_worker.virt.driver import HostResources, NullJob
from compute_worker.virt.libvirt import livemigration_probe, livemigration_tls
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.bases import MovingBases
from compute_worker.virt.libvirt.domain import Domain
from compute_worker.virt.libvirt.host import HostFacts
from compute_worker.virt.libvirt.resources import instances_id
from compute_worker.virt.libvirt.xml_builder import CONFIG_DRIVE

MOST_FILE_BYTES = 300_000
"""Of a config drive, compressed: it goes in a message, as libvirt does not move what a guest only reads."""
_KVM = "kvm"
_HOST_CPU = "host-passthrough"


class LiveMigrationChecks:
    """Both checks. Thread-safe; what they make (one file, see ``livemigration_probe``) goes by itself."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        self._settings = deeds.settings
        self._directory = deeds.disks.directory
        self._bases = MovingBases(deeds.disks)

    # --- destination --------------------------------------------------------------------------------------------

    def destination(
        self, instance: Instance, migration: Migration, source: HostResources, disk_over_commit: bool
    ) -> MigrateData:
        """:raises Unschedulable: another hypervisor, architecture or processor, an older version, too little memory.

        :raises InstanceExists: a guest of that uuid is here.
        :raises NotSupported: guests must come by TLS, and there are no certificates.
        """
        if self._deeds.guest(instance.uuid).exists():
            raise errors.InstanceExists(instance=instance.uuid)
        facts = self._deeds.host.facts()
        problem = self._unlike(facts, source)
        if problem:
            raise errors.Unschedulable(f"host {self._settings.host}: {problem}")
        if instance.flavor.memory_mb > facts.memory_mb:
            raise errors.InsufficientResources(
                host=self._settings.host,
                resource="memory_mb",
                requested=instance.flavor.memory_mb,
                free=facts.memory_mb,
            )
        secured = livemigration_tls.offered(self._settings)
        root = self._directory.root
        with files.disk_errors(root):
            space = os.statvfs(root)
        name, content = livemigration_probe.make(root, source.instances_id, instances_id(root))
        return MigrateData(
            migration=migration.uuid,
            native_tls=secured,
            probe=name,
            probe_content=content,
            disk_over_commit=disk_over_commit,
            disk_available_bytes=space.f_bavail * space.f_frsize,
        )

    def _unlike(self, facts: HostFacts, source: HostResources) -> str:
        """What keeps a guest of the source from running here; empty: nothing that is known of hosts."""
        info = source.cpu_info
        for what, ours, theirs in (
            ("hypervisor", facts.hypervisor_type, source.hypervisor_type),
            ("architecture", facts.arch, source.machine_arch),
            ("type of guests", facts.domain_type, str(info.get("domain_type") or "")),
        ):
            if theirs and ours != theirs:
                return f"its {what} is {ours}, the source's {theirs}"
        older = source.hypervisor_version > facts.hypervisor_version
        if older and not self._settings.live_migration.allow_older_hypervisor:
            return (
                f"its hypervisor ({facts.hypervisor_version}) is older than the source's ({source.hypervisor_version});"
                " live_migration.allow_older_hypervisor lets guests come all the same"
            )
        return self._other_processor(facts, source) if facts.domain_type == _KVM else ""

    def _other_processor(self, facts: HostFacts, source: HostResources) -> str:
        """A guest sees a processor of some vendor, and with ``host-passthrough`` the source's own."""
        vendor = str(source.cpu_info.get("vendor") or "")
        if vendor and facts.cpu_vendor and vendor != facts.cpu_vendor:
            return f"its processor is of {facts.cpu_vendor}, the source's of {vendor}"
        if self._settings.libvirt.cpu_mode != _HOST_CPU or not source.cpu_model:
            return ""
        if not self._deeds.host.compare_cpu(host_cpu_xml(source)):
            return f"its processor ({facts.cpu_model}) cannot do all that the source's ({source.cpu_model}) can"
        return ""

    # --- source -------------------------------------------------------------------------------------------------

    def source(self, instance: Instance, migration: Migration, data: MigrateData) -> MigrateData:
        """:raises InvalidState: the guest is off.

        :raises NotSupported: to the same host; by TLS alone, and it cannot be.
        :raises InsufficientResources: its disks do not fit there.
        """
        uuid = instance.uuid
        guest = self._deeds.guest(uuid)
        power = guest.power_state()
        if power not in (PowerState.RUNNING, PowerState.PAUSED):
            raise errors.InvalidState(
                instance=uuid, command="live_migration", attribute="power_state", state=str(power)
            )
        if migration.dest_host == migration.source_host:
            raise errors.NotSupported(what="live migration to the same host")
        shared = livemigration_probe.seen(self._directory.root, data.probe, data.probe_content)
        info = self._deeds.disks.disk_info(uuid)
        if info is None:
            raise errors.InvalidState(
                instance=uuid, command="live_migration", attribute="disk.info", state="missing on this host"
            )
        xml = guest.xml(migratable=True)
        told = msgspec.structs.replace(
            data,
            native_tls=livemigration_tls.agreed(self._settings, data.native_tls),
            shared_instance_path=shared,
            block_migration=not shared,
            probe="",
            probe_content="",
            machine=_machine(xml),
            cpu_xml=_cpu(xml),
        )
        return told if shared else self._local(instance, migration, told, info)

    def _local(self, instance: Instance, migration: Migration, data: MigrateData, info: DiskInfo) -> MigrateData:
        travelling = [disk for disk in info.disks if disk.name != CONFIG_DRIVE]
        self._need_room(migration, data, travelling)
        directory = self._directory.path(instance.uuid)
        standing = self._bases.standing(DiskInfo(disks=travelling), NullJob())
        return msgspec.structs.replace(
            data,
            disks=travelling,
            bases=[BaseImage(name=one.name, size_bytes=one.size_bytes, digest=one.digest) for one in standing],
            files={disk.name: pack(directory / disk.name) for disk in info.disks if disk.name == CONFIG_DRIVE},
        )

    def _need_room(self, migration: Migration, data: MigrateData, disks: list[Disk]) -> None:
        needed = sum(d.allocated_bytes if data.disk_over_commit else d.virtual_size_bytes for d in disks)
        free = data.disk_available_bytes
        if free is not None and needed > free:
            raise errors.InsufficientResources(
                host=migration.dest_host,
                resource="bytes of disk" + ("" if data.disk_over_commit else " (without disk_over_commit)"),
                requested=needed,
                free=free,
            )


def host_cpu_xml(source: HostResources) -> str:
    """The processor of another host, as libvirt compares it."""
    cpu = ET.Element("cpu")
    ET.SubElement(cpu, "arch").text = source.machine_arch
    ET.SubElement(cpu, "model").text = source.cpu_model
    if source.cpu_info.get("vendor"):
        ET.SubElement(cpu, "vendor").text = str(source.cpu_info["vendor"])
    topology = source.cpu_info.get("topology") or {}
    if topology:
        ET.SubElement(cpu, "topology", {str(k): str(v) for k, v in topology.items()})
    for name in source.cpu_info.get("features") or ():
        ET.SubElement(cpu, "feature", {"name": str(name)})
    return ET.tostring(cpu, encoding="unicode")


def _machine(xml: str) -> str:
    found = Domain.parse(xml).os
    return (found.machine if found is not None else None) or ""


def _cpu(xml: str) -> str:
    found = ET.fromstring(xml).find("./cpu")
    if found is None or (found.find("model") is None and not found.get("mode")):
        return ""
    return ET.tostring(found, encoding="unicode").strip()


def pack(path: Path) -> str:
    """A small file for a message.

    :raises NotSupported: it is too large for one.
    """
    with files.disk_errors(path):
        packed = zlib.compress(path.read_bytes(), 9)
    if len(packed) > MOST_FILE_BYTES:
        raise errors.NotSupported(what=f"live migration with a {path.name} of {len(packed)} bytes, compressed,")
    return base64.b64encode(packed).decode()


def unpack(text: str, size: int) -> bytes:
    """What :func:`pack` packed.

    :raises InvalidCommand: it is no such thing, or not of ``size`` bytes.
    """
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error) as exc:
        raise errors.InvalidCommand(method="pre_live_migration", problem=f"files: {exc}") from None
    if len(data) != size:
        raise errors.InvalidCommand(method="pre_live_migration", problem=f"files: not of {size} bytes")
    return data
