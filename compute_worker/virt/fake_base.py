"""What the parts of the fake driver share: looking at the simulated host, and the small idempotent deeds."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from compute_worker.errors import (
    Broken,
    FlavorDiskTooSmall,
    GuestFailed,
    ImageChecksumMismatch,
    ImageNotFound,
    ImageUnacceptable,
)
from compute_worker.objects import Disk, DiskInfo, ImageMeta, Instance
from compute_worker.states import PowerState
from compute_worker.virt.checks import swap_mb, tap_name
from compute_worker.virt.driver import ComputeDriver, Job, Part, SpawnRequest
from compute_worker.virt.simulated.connection import Connection
from compute_worker.virt.simulated.faults import PARTIAL
from compute_worker.virt.simulated.files import DISK_INFO, PART, PLAIN, RECORD, base_name
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.images import Image
from compute_worker.virt.simulated.model import Directory, Domain, File

GIB = 1 << 30
CHUNK_SECONDS = 0.02
"""Simulated copies with a rate move this many seconds' worth at a time."""

encode_json = msgspec.json.Encoder().encode
decode_record = msgspec.json.Decoder(Instance).decode
decode_disk_info = msgspec.json.Decoder(DiskInfo).decode


def disk_info_of(directory: Directory, image: str) -> DiskInfo:
    """``disk.info`` of a directory, with the allocated sizes of now."""
    disks = [
        Disk(
            name=name,
            format=file.format,
            virtual_size_bytes=file.size,
            backing=file.backing,
            backing_format="raw" if file.backing else None,
            allocated_bytes=len(file.data),
        )
        for name, file in sorted(directory.items())
        if name not in PLAIN and not name.endswith(PART)
    ]
    return DiskInfo(disks=disks, image=image)


def images_of(instance: Instance) -> list[str]:
    """Ids of all images an instance needs on its host; the root disk's first."""
    image = instance.image
    return [i for i in (image.id, image.kernel_id, image.ramdisk_id) if i is not None]


class FakeBase(ComputeDriver):
    """Deeds that look first: done twice they are done once. Each is one call of the simulated host."""

    _connection: Connection

    def __init__(self) -> None:
        self._fetching: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    @property
    def simulated(self) -> SimulatedHost:
        """The machine behind this driver, for tests and demonstrations."""
        return self._connection.host

    # --- images -------------------------------------------------------------------------------------------------

    def fetch_images(self, instance: Instance, job: Job) -> None:
        """Every image of the instance is in ``_base``; each is downloaded once, however many ask at once."""
        with self._connection.call("fetch_images", instance.uuid, job, files=True) as host:
            missing = [i for i in images_of(instance) if not self._use_base(host, i)]
        for image_id in missing:
            with self._guard:
                lock = self._fetching.setdefault(image_id, threading.Lock())
            with lock:
                self._download(instance, image_id, job)
        self._check_root(instance)

    def fetch_part(self, instance: Instance) -> Part:
        """``fetch_images``: undone, whole images stay and halves go."""

        def fetch(job: Job) -> None:
            self.fetch_images(instance, job)

        return Part("fetch_images", fetch, lambda job: self.drop_partial_images(instance))

    def drop_partial_images(self, instance: Instance) -> None:
        """Remove downloads that nobody carries on."""
        with self._connection.call("drop_images", instance.uuid, files=True) as host:
            for image_id in images_of(instance):
                lock = self._fetching.get(image_id)
                if lock is None or not lock.locked():
                    host.remove_base(base_name(image_id) + PART)

    def stream(self, data: bytes, job: Job, phase: str) -> Iterator[bytes]:
        """Growing beginnings of ``data``, at the host's rate, reported and cancellable."""
        rate, total = self.simulated.rate, len(data)
        if rate is None or not total:
            job.check()
            job.report(phase, total, total)
            yield data
            return
        step, done = max(1, int(rate * CHUNK_SECONDS)), 0
        while done < total:
            self._connection.pause(min(step, total - done) / rate, job)
            done = min(total, done + step)
            job.report(phase, done, total)
            yield data[:done]

    @staticmethod
    def _use_base(host: SimulatedHost, image_id: str) -> bool:
        name = base_name(image_id)
        if name not in host.base:
            return False
        host.touch_base(name)
        return True

    def _download(self, instance: Instance, image_id: str, job: Job) -> None:
        host, name = self.simulated, base_name(image_id)
        with host.cell.lock:
            if self._use_base(host, image_id):
                return
        image = host.images.get(image_id)
        if image is None:
            raise ImageNotFound(image=image_id, store="simulated", instance=instance.uuid)
        if image_id == instance.image.id:
            check_image(instance.image, image)
        for begun in self.stream(image.data, job, "fetch_images"):
            with host.cell.lock:
                self._connection.check(files=True)
                host.write_base(name + PART, File(begun, "raw", image.virtual_size))
                host.faults.strike("fetch_images", instance.uuid, PARTIAL)
        with host.cell.lock:
            self._connection.check(files=True)
            host.rename_base(name)
            host.effect(image_id, "download")

    def _check_root(self, instance: Instance) -> None:
        given = instance.flavor.root_gb * GIB
        base = self.simulated.base.get(base_name(instance.image.id))
        if given and base is not None and base.size > given:
            raise FlavorDiskTooSmall(image=instance.image.id, needed=base.size, given=given, instance=instance.uuid)

    # --- disks --------------------------------------------------------------------------------------------------

    def create_disks(self, instance: Instance, request: SpawnRequest, job: Job) -> None:
        """The instance directory with all its disks; disks that are there stay as they are."""
        job.check()
        with self._connection.call("create_disks", instance.uuid, job, files=True) as host:
            there = host.directory(instance.uuid) or {}
            disks = {n: f for n, f in self.layout(host, instance, request).items() if n not in there}
            if host.faults.armed("create_disks", instance.uuid, PARTIAL):
                first, *rest = disks.items()
                host.write(instance.uuid, {first[0]: first[1], **{n + PART: f for n, f in rest[:1]}})
                host.faults.strike("create_disks", instance.uuid, PARTIAL)
            for name in [n for n in there if n.endswith(PART)]:
                host.remove(instance.uuid, name)
            self.write_disks(host, instance, disks)

    def layout(self, host: SimulatedHost, instance: Instance, request: SpawnRequest) -> Directory:
        """Every disk the instance is born with."""
        base = host.base.get(base_name(instance.image.id))
        if base is None:
            raise GuestFailed(instance=instance.uuid, reason=f"base image {instance.image.id} is not in the cache")
        size = instance.flavor.root_gb * GIB or base.size
        disks = {"disk": File(b"", "qcow2", size, base_name(instance.image.id))}
        info = instance.block_device_info
        for index, disk in enumerate(info.ephemerals):
            disks[f"disk.eph{index}"] = File(f"mkfs {disk.guest_format}".encode(), "qcow2", disk.size_gb * GIB)
        if not info.ephemerals and instance.flavor.ephemeral_gb:
            disks["disk.local"] = File(b"mkfs None", "qcow2", instance.flavor.ephemeral_gb * GIB)
        if swap := swap_mb(instance):
            disks["disk.swap"] = File(b"mkswap", "qcow2", swap << 20)
        if instance.config_drive or request.injected_files or request.admin_password is not None:
            content = config_drive(instance, request)
            disks["disk.config"] = File(content, "raw", len(content))
        return disks

    def write_disks(self, host: SimulatedHost, instance: Instance, disks: Directory) -> None:
        """Put disks into the instance directory, and then what describes them."""
        host.write(instance.uuid, disks)
        info = disk_info_of(host.slot(instance.uuid).directories[""], instance.image.id)
        plain = {DISK_INFO: File(encode_json(info)), RECORD: File(encode_json(instance))}
        host.write(instance.uuid, plain)

    def delete_files(self, uuid: str, suffixes: Iterable[str]) -> None:
        """Instance directories go, by way of ``_del``."""
        with self._connection.call("delete_files", uuid, files=True) as host:
            for suffix in suffixes:
                if host.directory(uuid, suffix) is None:
                    continue
                host.rename(uuid, suffix, "_del")
                host.faults.strike("delete_files", uuid, PARTIAL)
                host.remove_directory(uuid, "_del")
                host.effect(uuid, "delete")

    def record_of(self, host: SimulatedHost, uuid: str, suffix: str = "") -> Instance | None:
        """The instance as recorded in one of its directories."""
        file = (host.directory(uuid, suffix) or {}).get(RECORD)
        return decode_record(file.data) if file is not None else None

    # --- interfaces and the guest -------------------------------------------------------------------------------

    def plug_vifs(self, instance: Instance) -> None:
        """Every interface is there."""
        with self._connection.call("plug_vifs", instance.uuid, files=True) as host:
            slot = host.slot(instance.uuid)
            for vif in instance.vifs:
                if vif.id not in slot.vifs:
                    slot.vifs[vif.id] = tap_name(vif.id, vif.devname)
                    host.effect(instance.uuid, "plug")
            if instance.vifs:
                host.changed(slot)

    def unplug_vifs(self, uuid: str) -> None:
        """No interface is there."""
        with self._connection.call("unplug_vifs", uuid, files=True) as host:
            slot = host.slot(uuid)
            if slot.vifs:
                slot.vifs.clear()
                host.effect(uuid, "unplug")
                host.changed(slot)

    def define(self, instance: Instance) -> None:
        """The guest is defined as its record says; one that is alive keeps running, with new metadata."""
        with self._connection.call("define", instance.uuid) as host:
            domain = host.domain(instance.uuid)
            if domain is not None and domain.alive:
                self.stamp(host, domain, instance)
                return
            saved = domain.saved if domain is not None else None
            new = Domain(instance.uuid, instance.name, instance.flavor.vcpus, instance.flavor.memory_mb, saved=saved)
            if saved is not None:
                new.power = PowerState.SUSPENDED
            self.stamp(host, new, instance, keep=False)
            host.define(new)

    def stamp(self, host: SimulatedHost, domain: Domain, instance: Instance, keep: bool = True) -> None:
        """Owner, generation and migration into the guest's metadata."""
        domain.owner, domain.generation, domain.migration = instance.host, instance.generation, instance.migration
        if keep:
            host.changed(host.slot(instance.uuid))

    def undefine(self, uuid: str) -> None:
        """The guest is off and forgotten."""
        with self._connection.call("undefine", uuid) as host:
            domain = host.domain(uuid)
            if domain is not None:
                host.kill(domain)
                host.undefine(uuid)

    def start_paused(self, instance: Instance) -> None:
        """The guest has memory and no processor runs; one that runs already is left alone."""
        with self._connection.call("start", instance.uuid) as host:
            domain = self.need_domain(host, instance.uuid)
            if not domain.alive:
                self.need_disks(host, instance.uuid)
                host.boot(domain, paused=True)

    def kill(self, uuid: str) -> None:
        """The guest is off, by its plug."""
        with self._connection.call("destroy", uuid) as host:
            domain = host.domain(uuid)
            if domain is not None:
                host.kill(domain)

    def need_domain(self, host: SimulatedHost, uuid: str) -> Domain:
        """:raises GuestFailed: there is no such guest."""
        domain = host.domain(uuid)
        if domain is None:
            raise GuestFailed(instance=uuid, reason=f"there is no such guest on host {host.name}")
        return domain

    def need_disks(self, host: SimulatedHost, uuid: str) -> None:
        """:raises GuestFailed: the root disk or its base image is missing."""
        disk = (host.directory(uuid) or {}).get("disk")
        if disk is None or (disk.backing is not None and disk.backing not in host.base):
            raise GuestFailed(instance=uuid, reason=f"its root disk is missing in {host.path(uuid)}")


def config_drive(instance: Instance, request: SpawnRequest) -> bytes:
    """What a guest finds on its config drive."""
    content: Mapping[str, Any] = {
        "uuid": instance.uuid,
        "hostname": instance.hostname,
        "meta": instance.metadata,
        "admin_pass": request.admin_password,
        "files": {file.path: file.content_base64 for file in request.injected_files},
        "user_data": instance.user_data,
    }
    return encode_json(content)


def check_image(meta: ImageMeta, image: Image) -> None:
    """:raises ImageUnacceptable: the bytes are not what ``meta`` says."""
    problem: Broken | None = None
    if meta.disk_format in ("raw", "qcow2") and image.disk_format != meta.disk_format:
        problem = ImageUnacceptable(
            image=meta.id, reason=f"it is declared {meta.disk_format} and its bytes are {image.disk_format}"
        )
    elif meta.size_bytes is not None and meta.size_bytes != image.size:
        problem = ImageUnacceptable(
            image=meta.id, reason=f"it has {image.size} bytes, {meta.size_bytes} are declared"
        )
    elif meta.checksum is not None:
        algorithm = meta.checksum_algorithm or "sha256"
        actual = image.digest(algorithm)
        if actual != meta.checksum:
            problem = ImageChecksumMismatch(image=meta.id, algorithm=algorithm, actual=actual, expected=meta.checksum)
    if problem is not None:
        raise problem
