"""The fake driver: the whole contract over a small simulated host, with no hypervisor behind it.

It is for trying the worker out, for its tests and for the embedded cell. Faults, latency and an oracle are on
:attr:`FakeDriver.simulated`. Parts have the names that the libvirt driver's have.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from compute_worker.config import Settings
from compute_worker.errors import GuestFailed, InstanceNotFound
from compute_worker.objects import Diagnostics, DiskInfo, Instance
from compute_worker.states import PowerState
from compute_worker.virt.checks import check_request
from compute_worker.virt.driver import (
    DriverEvent,
    EventKind,
    GuestInfo,
    HostResources,
    Job,
    Leftover,
    Part,
    SpawnRequest,
)
from compute_worker.virt.fake_base import decode_disk_info, disk_info_of, encode_json, images_of
from compute_worker.virt.fake_live import LiveMoves
from compute_worker.virt.fake_moves import ColdMoves
from compute_worker.virt.fake_snapshot import Snapshots
from compute_worker.virt.simulated.cell import host_for
from compute_worker.virt.simulated.connection import Connection
from compute_worker.virt.simulated.files import CONSOLE, DELETED, DISK_INFO, RECORD, RESIZE, base_name
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.model import Domain, File

GUEST_FORMATS = frozenset({"ext2", "ext3", "ext4", "xfs", "vfat", "ntfs"})
OFF = frozenset({PowerState.NOSTATE, PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.SUSPENDED})


def _nothing(job: Job) -> None:
    """The undo of a part that only goes forward."""


def part(name: str, do: Callable[[Job], None], undo: Callable[[Job], None] = _nothing) -> Part:
    """A part that tells nothing."""

    def run(job: Job) -> None:
        do(job)

    return Part(name, run, undo)


class FakeDriver(ColdMoves, LiveMoves, Snapshots):
    """A driver over ``host``, or over the process's simulated host of that name (kept under ``state_path``)."""

    def __init__(self, settings: Settings, host: SimulatedHost | None = None) -> None:
        super().__init__()
        self._settings = settings
        self._connection = Connection(host if host is not None else host_for(settings))

    def die(self) -> None:
        """For tests: this worker was killed. No call of this driver does anything any more."""
        self._connection.die()

    # --- the host -----------------------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether the simulated hypervisor is up."""
        return self.simulated.hypervisor_up

    def init_host(self, host: str) -> None:
        """Nothing is to be made ready."""
        self._connection.check(files=True)

    def cleanup_host(self) -> None:
        """End the event thread."""
        self._connection.close()

    def register_event_listener(self, callback: Callable[[DriverEvent], None]) -> None:
        """Events of the simulated host, from now on; first whether it is connected."""
        self._connection.listen(callback)
        kind = EventKind.CONNECTED if self.available else EventKind.DISCONNECTED
        self._connection.emit(DriverEvent(kind, "", time.time()))

    def get_available_resource(self) -> HostResources:
        """The host's knobs."""
        with self._connection.call("get_available_resource") as host:
            return HostResources(
                vcpus=host.vcpus,
                memory_mb=host.memory_mb,
                disk_gb=float(host.disk_gb),
                disk_free_gb=max(0.0, host.disk_gb - host.allocated() / (1 << 30)),
                hypervisor_type="fake",
                hypervisor_version=host.version,
                hypervisor_hostname=host.name,
                cpu_model=host.cpu_model,
                machine_arch=host.machine_arch,
                boot_id=host.boot_id,
                instances_id=host.name,
            )

    def list_instances(self) -> list[GuestInfo]:
        """All domains."""
        with self._connection.call("list_instances") as host:
            return [_info(slot.domain) for slot in host.slots.values() if slot.domain is not None]

    def list_leftovers(self) -> list[Leftover]:
        """All domains and directories."""
        with self._connection.call("list_leftovers") as host:
            return host.leftovers()

    def list_records(self) -> list[Instance]:
        """The record of each directory; of one that is set aside where there is no other."""
        with self._connection.call("list_records", files=True) as host:
            homes = ((uuid, host.home(uuid)) for uuid in host.slots)
            found = [self.record_of(host, uuid, home[0]) for uuid, home in homes if home is not None]
            return [record for record in found if record is not None]

    def manage_image_cache(self, used_images: set[str]) -> list[str]:
        """By ``_base`` name: what disks, records and ``used_images`` do not name, and is old enough, goes."""
        oldest = time.time() - self._settings.images.remove_unused_base_images_after
        with self._connection.call("manage_image_cache", files=True) as host:
            used = {base_name(image) for image in used_images}
            for slot in host.slots.values():
                for suffix, directory in slot.directories.items():
                    used |= {file.backing for file in directory.values() if file.backing is not None}
                    record = self.record_of(host, slot.uuid, suffix)
                    used |= {base_name(image) for image in images_of(record)} if record else set()
            removed = [n for n, f in host.base.items() if n.split(".")[0] not in used and f.used_at <= oldest]
            for name in removed:
                host.remove_base(name)
            return removed

    # --- one instance -------------------------------------------------------------------------------------------

    def get_info(self, uuid: str) -> GuestInfo:
        """The domain as it is."""
        with self._connection.call("get_info", uuid) as host:
            domain = host.domain(uuid)
            if domain is None:
                raise InstanceNotFound(instance=uuid, host=host.name)
            return _info(domain)

    def save_record(self, instance: Instance) -> None:
        """Into the directory (its own, else the one set aside), then into the domain."""
        uuid = instance.uuid
        with self._connection.call("save_record", uuid, files=True) as host:
            home = host.home(uuid)
            if home is not None:
                host.write(uuid, {RECORD: File(encode_json(instance))}, home[0])
        domain = self.simulated.domain(uuid)
        if domain is not None and self._stamped(domain) != (instance.host, instance.generation, instance.migration):
            with self._connection.call("set_metadata", uuid) as host:
                domain = host.domain(uuid)
                if domain is not None:
                    self.stamp(host, domain, instance)

    @staticmethod
    def _stamped(domain: Domain) -> tuple[str | None, int, str | None]:
        return domain.owner, domain.generation, domain.migration

    def check_spawn(self, instance: Instance, request: SpawnRequest) -> None:
        """Everything that a command alone can show."""
        check_request(instance, request, GUEST_FORMATS)

    def spawn(self, instance: Instance, request: SpawnRequest) -> list[Part]:
        """``fetch_images, create_disks, plug_vifs, define, start_paused``."""
        uuid = instance.uuid
        return [
            self.fetch_part(instance),
            part(
                "create_disks",
                lambda j: self.create_disks(instance, request, j),
                lambda j: self.delete_files(uuid, (DELETED, "")),
            ),
            part("plug_vifs", lambda j: self.plug_vifs(instance), lambda j: self.unplug_vifs(uuid)),
            part("define", lambda j: self.define(instance), lambda j: self.undefine(uuid)),
            part("start_paused", lambda j: self.start_paused(instance), lambda j: self.kill(uuid)),
        ]

    def destroy(self, instance: Instance) -> list[Part]:
        """``power_off, undefine, unplug_vifs, delete_files``."""
        uuid = instance.uuid
        return [
            part("power_off", lambda j: self.kill(uuid)),
            part("undefine", lambda j: self.undefine(uuid)),
            part("unplug_vifs", lambda j: self.unplug_vifs(uuid)),
            part("delete_files", lambda j: self.delete_files(uuid, (DELETED, RESIZE, ""))),
        ]

    def power_on(self, instance: Instance, job: Job) -> None:
        """From its disks, or from memory that a suspend saved."""
        uuid = instance.uuid
        state = self._power(uuid)
        if state is PowerState.RUNNING:
            return
        if state in OFF:
            self.fetch_images(instance, job)
            self.plug_vifs(instance)
            self.define(instance)
        with self._connection.call("start", uuid, job) as host:
            domain = self.need_domain(host, uuid)
            if domain.power is PowerState.PAUSED:
                host.effect(uuid, "unpause")
                host.power(domain, PowerState.RUNNING, "unpaused", EventKind.RESUMED)
            elif not domain.alive:
                self.need_disks(host, uuid)
                if domain.saved is not None:
                    host.restore(domain)
                else:
                    host.boot(domain, paused=False)

    def power_off(self, instance: Instance, job: Job, timeout: float = 0, retry_interval: float = 10) -> bool:
        """Asks a running guest; a paused one cannot hear."""
        uuid = instance.uuid
        state = self._power(uuid)
        if state in OFF:
            return True
        if timeout > 0 and state is PowerState.RUNNING and self._shut_down(uuid, job, timeout, retry_interval):
            return True
        job.explain("its plug was pulled" if timeout <= 0 else f"it did not shut itself down in {timeout:g} s")
        self.kill(uuid)
        return False

    def pause(self, instance: Instance) -> None:
        """Processors stop."""
        with self._connection.call("pause", instance.uuid) as host:
            domain = self._need_alive(host, instance.uuid)
            if domain.power is PowerState.RUNNING:
                host.effect(instance.uuid, "pause")
                host.power(domain, PowerState.PAUSED, "user", EventKind.PAUSED)

    def unpause(self, instance: Instance) -> None:
        """Processors run."""
        with self._connection.call("unpause", instance.uuid) as host:
            domain = self._need_alive(host, instance.uuid)
            if domain.power is PowerState.PAUSED:
                host.effect(instance.uuid, "unpause")
                host.power(domain, PowerState.RUNNING, "unpaused", EventKind.RESUMED)

    def suspend(self, instance: Instance, job: Job) -> None:
        """Memory is kept in the domain."""
        with self._connection.call("suspend", instance.uuid, job) as host:
            domain = self.need_domain(host, instance.uuid)
            if domain.power is PowerState.SUSPENDED:
                return
            domain = self._need_alive(host, instance.uuid)
            domain.saved = domain.memory
            host.effect(instance.uuid, "suspend")
            host.power(domain, PowerState.SUSPENDED, "saved", EventKind.SUSPENDED)

    def resume(self, instance: Instance, job: Job) -> None:
        """As :meth:`power_on`: that restores saved memory where there is some."""
        self.power_on(instance, job)

    def get_console_output(self, instance: Instance, tail_bytes: int) -> bytes:
        """Boots and shutdowns, and the tick of now."""
        uuid = instance.uuid
        with self._connection.call("get_console_output", uuid, files=True) as host:
            home, domain = host.home(uuid), host.domain(uuid)
            if home is None:
                raise InstanceNotFound(instance=uuid, host=host.name)
            file = home[1].get(CONSOLE)
            output = file.data if file is not None else b""
            if domain is not None and domain.alive and domain.memory is not None:
                output += f"tick {domain.memory.now()}\n".encode()
            return output[-tail_bytes:] if tail_bytes > 0 else b""

    def get_diagnostics(self, instance: Instance) -> Diagnostics:
        """Its memory's counter is its processor time."""
        uuid = instance.uuid
        with self._connection.call("get_diagnostics", uuid) as host:
            domain = host.domain(uuid)
            if domain is None:
                raise InstanceNotFound(instance=uuid, host=host.name)
            if domain.memory is None:
                return Diagnostics(state=domain.power, driver="fake")
            disks = disk_info_of(host.directory(uuid) or {}, instance.image.id).disks
            return Diagnostics(
                state=domain.power,
                cpu_time_ns=domain.memory.now() * 1_000_000,
                vcpus=domain.vcpus,
                memory_mb=domain.memory_mb,
                memory_used_mb=domain.memory_mb,
                disks=[{"name": disk.name, "allocated_bytes": disk.allocated_bytes} for disk in disks],
                nics=[{"devname": name} for name in host.slot(uuid).vifs.values()],
                driver="fake",
            )

    def get_instance_disk_info(self, instance: Instance) -> DiskInfo:
        """Disks as they are; the image from ``disk.info``."""
        uuid = instance.uuid
        with self._connection.call("get_instance_disk_info", uuid, files=True) as host:
            home = host.home(uuid)
            if home is None or DISK_INFO not in home[1]:
                raise InstanceNotFound(instance=uuid, host=host.name)
            written = decode_disk_info(home[1][DISK_INFO].data)
            return disk_info_of(home[1], written.image or instance.image.id)

    # --- helpers ------------------------------------------------------------------------------------------------

    def _power(self, uuid: str) -> PowerState:
        with self._connection.call("get_info", uuid) as host:
            return host.power_of(uuid)

    def _need_alive(self, host: SimulatedHost, uuid: str) -> Domain:
        domain = self.need_domain(host, uuid)
        if not domain.alive:
            raise GuestFailed(instance=uuid, reason=f"it is off ({domain.reason or domain.power})")
        return domain

    def _shut_down(self, uuid: str, job: Job, timeout: float, retry_interval: float) -> bool:
        def is_off() -> bool:
            self._connection.check()
            return self.simulated.power_of(uuid) in OFF

        deadline = time.monotonic() + timeout
        with self._connection.woken(uuid, job.wake):
            while (left := deadline - time.monotonic()) > 0:
                with self._connection.call("shutdown", uuid, job) as host:
                    domain = host.domain(uuid)
                    if domain is not None:
                        host.shut_down(domain)
                if job.wait(is_off, min(left, retry_interval)):
                    return True
        return is_off()


def _info(domain: Domain) -> GuestInfo:
    return GuestInfo(
        uuid=domain.uuid,
        power_state=domain.power,
        name=domain.name,
        owner=domain.owner,
        generation=domain.generation,
        migration=domain.migration,
        reason=domain.reason,
        migrating=domain.migrating,
    )
