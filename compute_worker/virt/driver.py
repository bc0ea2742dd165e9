"""What a hypervisor must be able to do: the contract between the manager and a virt driver.

A driver is loaded by name through stevedore (``compute_worker.virt_drivers``) and constructed as
``Driver(settings: compute_worker.config.Settings)``. It imports nothing of rpc, manager or operations, keeps nothing in
memory that it could not find again after its process died, and **every method may be called twice**: it looks at the
world first, finds its own half-done work and finishes it. Where a docstring does not say otherwise a method raises

- :class:`~compute_worker.errors.Retryable` when the hypervisor does not answer now,
- :class:`~compute_worker.errors.Broken` when trying again cannot help,
- :class:`~compute_worker.errors.Cancelled` out of ``job.check()``, leaving what its undo can clean,

and does not block longer than a second unless it takes a :class:`Job`, which carries progress out and cancellation in.
Where one call would be too coarse to journal, the driver returns its :class:`Part` s; the manager runs each as a step.
Contract tests: ``tests/virt/contract.py``, run against every driver.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from compute_worker.errors import NotSupported
from compute_worker.objects import (
    CachedImage,
    Diagnostics,
    DiskInfo,
    ImageMeta,
    InjectedFile,
    Instance,
    MigrateData,
    Migration,
)
from compute_worker.states import PowerState

if TYPE_CHECKING:
    from compute_worker.images.store import ImageStore


class Job(Protocol):
    """What a long call works under. The operation it belongs to is one; :class:`NullJob` is another."""

    def report(
        self, phase: str, done_bytes: int | None = None, total_bytes: int | None = None, **detail: float | int | str
    ) -> None:
        """Say how far it is; cheap, call it as often as it is natural."""

    def check(self) -> None:
        """Raise :class:`~compute_worker.errors.Cancelled` when somebody asked for it. Call it once a second."""

    def on_cancel(self, callback: Callable[[], None]) -> AbstractContextManager[None]:
        """While the context is open, ``callback`` is called once, from another thread, if the job is cancelled
        (at once if it was already): to kill a child process, to abort a hypervisor's job."""

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``condition()`` or ``timeout`` seconds; false when they ran out. Woken by :meth:`wake`, else
        looks twice a second. Raises what :meth:`check` raises."""

    def wake(self) -> None:
        """Make :meth:`wait` look at once; from any thread."""

    def explain(self, reason: str) -> None:
        """Record a decision of this step and why, for ``compute-workerctl explain``."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a driver call that is journalled by itself.

    ``name`` is stable over releases: an operation that was begun by an older worker is found again by it.
    ``do`` returns what later parts or the manager want to know (JSON only), which is journalled. ``undo`` puts back
    what ``do`` did, wholly, partly or not at all; it is called in reverse order and must end well in each case.
    """

    name: str
    do: Callable[[Job], Mapping[str, Any] | None]
    undo: Callable[[Job], None]


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """What an instance gets at birth beside its record. Secrets in it are never logged."""

    injected_files: Sequence[InjectedFile] = ()
    admin_password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """The image a snapshot is to make.

    ``image`` is all that its store is told when it is created: id, store, name, ``disk_format`` (``raw`` or
    ``qcow2``), smallest sizes, properties. ``live``: the guest is to run on meanwhile where that can be done.
    ``compression``: ``none``, ``zlib`` or ``zstd``, of the data in a qcow2.
    """

    image: ImageMeta
    live: bool = True
    compression: str = "none"


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A guest as the hypervisor has it. ``owner``, ``generation``, ``migration``: from its own metadata."""

    uuid: str
    power_state: PowerState
    name: str = ""
    owner: str | None = None
    generation: int = 0
    migration: str | None = None
    reason: str = ""
    """The hypervisor's word for why it is in this state."""
    migrating: bool = False
    """Whether a migration of it is in flight here (outgoing or incoming)."""
    silent: bool = False
    """Whether the hypervisor has it and cannot say how it is: only ``uuid`` and ``reason`` count."""


@dataclass(frozen=True, slots=True)
class HostResources:
    """What this host has, before reservations and ratios. Memory in MiB, disk in GiB of the instances directory."""

    vcpus: int
    memory_mb: int
    disk_gb: float
    disk_free_gb: float
    hypervisor_type: str
    hypervisor_version: int
    hypervisor_hostname: str
    cpu_model: str = ""
    machine_arch: str = ""
    cpu_info: Mapping[str, Any] = field(default_factory=dict)
    boot_id: str = ""
    """Which boot of the host this is: another one than before means that no guest of before runs."""
    instances_id: str = ""
    """Which instances directory this is: the same on two hosts means that they share it. Empty: not known."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something on this host that belongs to an instance: ``kind`` is ``directory``, ``resize``, ``del``, ``part``
    or ``domain``. ``uuid`` may be unknown to the store: that is what :meth:`ComputeDriver.list_leftovers` is for."""

    uuid: str
    kind: str
    where: str


class EventKind(StrEnum):
    """What a driver tells by itself."""

    STARTED = "started"
    STOPPED = "stopped"
    """The guest shut itself down, or was shut down."""
    CRASHED = "crashed"
    PAUSED = "paused"
    RESUMED = "resumed"
    SUSPENDED = "suspended"
    IO_ERROR = "io_error"
    MIGRATED_IN = "migrated_in"
    """A guest that came by migration runs here."""
    MIGRATED_OUT = "migrated_out"
    POSTCOPY = "postcopy"
    POSTCOPY_FAILED = "postcopy_failed"
    JOB_COMPLETED = "job_completed"
    CONNECTED = "connected"
    """The hypervisor answers (again): compare everything. ``uuid`` is empty."""
    DISCONNECTED = "disconnected"


@dataclass(frozen=True, slots=True)
class DriverEvent:
    """Something that happened at the hypervisor at ``time`` (seconds since the epoch)."""

    kind: EventKind
    uuid: str
    time: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """A running migration or block job. Bytes; seconds; rates in bytes a second; ``None``: the driver cannot say."""

    type: str
    """``none``, ``bounded``, ``unbounded``, ``completed``, ``failed`` or ``cancelled``."""
    memory_total: int | None = None
    memory_processed: int | None = None
    memory_remaining: int | None = None
    memory_rate: float | None = None
    memory_dirty_rate: float | None = None
    memory_iteration: int | None = None
    disk_total: int | None = None
    disk_processed: int | None = None
    disk_remaining: int | None = None
    disk_rate: float | None = None
    downtime: float | None = None
    """Measured when completed, else expected."""
    elapsed: float | None = None
    postcopy: bool = False
    throttle: int | None = None
    """Percent by which the guest is slowed down so that it converges."""


Peer = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Asks :meth:`ComputeDriver.answer_peer` of the other host of a migration; JSON in, JSON out.

:raises PeerUnavailable: no answer; whether the request was served is not known: ask again.
:raises ComputeError: whatever ``answer_peer`` raised there.
"""


class ComputeDriver(abc.ABC):
    """One host's hypervisor. Thread-safe: methods for different instances may run at once."""

    # --- the host -----------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def available(self) -> bool:
        """Whether the hypervisor answers, without asking it."""

    @abc.abstractmethod
    def init_host(self, host: str) -> None:
        """Begin. ``host`` is this worker's name, written as owner into guests. Called once, before anything else.

        A hypervisor that is down is no error: it connects later and says so by ``EventKind.CONNECTED``.

        :raises Broken: a directory is not writable, a program is missing.
        """

    @abc.abstractmethod
    def cleanup_host(self) -> None:
        """End: threads and connections. Guests are left as they are."""

    @abc.abstractmethod
    def register_event_listener(self, callback: Callable[[DriverEvent], None]) -> None:
        """``callback`` gets every event, from a thread of the driver, one at a time, holding no lock."""

    @abc.abstractmethod
    def get_available_resource(self) -> HostResources:
        """What this host has. May be up to 10 s old."""

    @abc.abstractmethod
    def list_instances(self) -> list[GuestInfo]:
        """Every guest that the hypervisor has, running or not, ours or not."""

    @abc.abstractmethod
    def list_leftovers(self) -> list[Leftover]:
        """Every domain and directory on this host that belongs to some instance uuid."""

    @abc.abstractmethod
    def list_records(self) -> list[Instance]:
        """Instances as :meth:`save_record` wrote them beside their disks: what a lost store is rebuilt from."""

    @abc.abstractmethod
    def manage_image_cache(self, used_images: set[str]) -> list[str]:
        """Remove base images that no instance uses and nobody used for ``remove_unused_base_images_after`` seconds.
        Returns what was removed. Never touches a base on shared storage or one that a disk on this host names."""

    def stale_image_locks(self, remove: bool = False) -> list[str]:
        """Names of image locks that nobody holds and that no image goes with; with ``remove`` they go. They hinder
        nobody. A driver without such locks has none."""
        return []

    # --- one instance -------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def get_info(self, uuid: str) -> GuestInfo:
        """The guest as the hypervisor has it *now*: "who runs it".

        :raises InstanceNotFound: the hypervisor answers, and has no such guest.
        """

    @abc.abstractmethod
    def save_record(self, instance: Instance) -> None:
        """Write owner, generation, migration and the record itself to the instance directory (fsynced, by rename)
        and into the guest's metadata, where these exist."""

    @abc.abstractmethod
    def check_spawn(self, instance: Instance, request: SpawnRequest) -> None:
        """Refuse what can be known without touching anything: formats, devices, volumes, sizes.

        :raises Refused: ``InvalidBDMFormat``, ``NotSupported``, ``InvalidCommand``.
        """

    @abc.abstractmethod
    def spawn(self, instance: Instance, request: SpawnRequest) -> list[Part]:
        """Parts that make the guest and leave it *paused*: images fetched, disks made, interfaces plugged, defined,
        started. All undone, nothing of the instance is left (cached base images stay). :meth:`power_on` lets it go.
        """

    @abc.abstractmethod
    def destroy(self, instance: Instance) -> list[Part]:
        """Parts that end the guest and remove everything of it: powered off hard, undefined with all its metadata,
        interfaces unplugged, directories (also ``_resize``, ``_del``, ``.part``) removed. Only forward: their undo
        does nothing. Ends well when there is nothing."""

    @abc.abstractmethod
    def power_on(self, instance: Instance, job: Job) -> None:
        """Start the guest from its disks (definition made anew, missing base images fetched). Ends well when it runs.

        If the process dies inside, the guest is off or runs; nothing is lost.
        """

    @abc.abstractmethod
    def power_off(self, instance: Instance, job: Job, timeout: float = 0, retry_interval: float = 10) -> bool:
        """Stop the guest: ask it by ACPI every ``retry_interval`` seconds for ``timeout`` seconds, then pull the plug.

        Returns whether the guest shut itself down. ``timeout=0``: pull at once. May block ``timeout`` + 15 s.
        """

    @abc.abstractmethod
    def pause(self, instance: Instance) -> None:
        """Stop the guest's processors; memory stays."""

    @abc.abstractmethod
    def unpause(self, instance: Instance) -> None:
        """Let the processors run. Ends well when they do.

        :raises GuestFailed: the guest is not there or is off.
        """

    @abc.abstractmethod
    def suspend(self, instance: Instance, job: Job) -> None:
        """Save memory to disk and stop the guest. May block as long as its memory takes to write."""

    @abc.abstractmethod
    def resume(self, instance: Instance, job: Job) -> None:
        """Start the guest from its saved memory; from its disks when there is none."""

    @abc.abstractmethod
    def get_console_output(self, instance: Instance, tail_bytes: int) -> bytes:
        """The last ``tail_bytes`` of what the guest wrote to its serial console; hostile bytes, unchanged."""

    @abc.abstractmethod
    def get_diagnostics(self, instance: Instance) -> Diagnostics:
        """What the hypervisor measures of the guest."""

    @abc.abstractmethod
    def get_instance_disk_info(self, instance: Instance) -> DiskInfo:
        """``disk.info`` with the allocated sizes of now."""

    # --- cold migration and resize ------------------------------------------------------------------------------

    @abc.abstractmethod
    def migrate_disk_and_power_off(
        self, instance: Instance, migration: Migration, timeout: float, retry_interval: float, peer: Peer
    ) -> list[Part]:
        """Source: power off (clean), set aside as ``<uuid>_resize``, send the disks to ``migration.dest_host``. The
        last part returns ``{"disk_info": ...}``. Undone, the guest's files are as they were; it is off.

        ``peer`` asks the destination's driver: to make room, to listen, to say what arrived."""

    @abc.abstractmethod
    def answer_peer(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Destination: what the source's driver asks while it sends. Answers within seconds, may be asked twice.

        :raises InvalidCommand: a request that this driver does not know.
        """

    @abc.abstractmethod
    def finish_migration(self, instance: Instance, migration: Migration, disk_info: DiskInfo) -> list[Part]:
        """Destination: verify what came, grow it to ``instance.flavor``, define, start *paused* when it ran before.
        Undone, nothing of the instance is left here."""

    @abc.abstractmethod
    def confirm_migration(self, instance: Instance, migration: Migration, job: Job) -> None:
        """Source: drop the set-aside copy."""

    @abc.abstractmethod
    def set_aside(self, instance: Instance, migration: Migration) -> list[Part]:
        """Destination of a revert: power off hard, undefine, keep the files as ``<uuid>_resize`` (``<uuid>_del`` where
        source and destination are one host). Undone, the guest's files are as they were; it is defined and off."""

    @abc.abstractmethod
    def finish_revert_migration(self, instance: Instance, migration: Migration) -> list[Part]:
        """Source: bring the set-aside copy back, define, start *paused* when it ran before."""

    # --- live migration -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    def check_can_live_migrate_destination(
        self, instance: Instance, migration: Migration, source: HostResources, disk_over_commit: bool
    ) -> MigrateData:
        """Destination: whether the guest could run here (processor, machine type, memory, disk). Changes nothing.

        :raises Refused: with the reason.
        """

    @abc.abstractmethod
    def check_can_live_migrate_source(self, instance: Instance, migration: Migration, data: MigrateData) -> MigrateData:
        """Source: which disks must travel; whether the guest may."""

    @abc.abstractmethod
    def pre_live_migration(
        self, instance: Instance, migration: Migration, data: MigrateData, disk_info: DiskInfo
    ) -> list[Part]:
        """Destination: directory, disks of the right size and format, interfaces; the last part returns
        ``{"migrate_data": ...}``. Undone, nothing of the instance is left here."""

    @abc.abstractmethod
    def live_migration(self, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        """Source: move the running guest. Blocks until it runs on the destination. Called again while a migration is
        in flight, it attaches to it.

        :raises MigrationFailed: the guest runs here as before.
        """

    @abc.abstractmethod
    def live_migration_abort(self, instance: Instance) -> None:
        """Source: stop the move; the guest goes on here.

        :raises InvalidState: in post-copy it cannot be stopped.
        """

    @abc.abstractmethod
    def live_migration_force_complete(self, instance: Instance, postcopy: bool) -> None:
        """Source: finish the move at the guest's expense: switch to post-copy, or pause it."""

    @abc.abstractmethod
    def get_job_statistics(self, uuid: str) -> JobStatistics:
        """The job that is running on a guest, or the last one that ended."""

    @abc.abstractmethod
    def post_live_migration(self, instance: Instance, migration: Migration, data: MigrateData) -> None:
        """Source, after the switch-over: remove what is left here (shared directories stay)."""

    @abc.abstractmethod
    def post_live_migration_at_destination(self, instance: Instance, migration: Migration) -> None:
        """Destination, after the switch-over: persistent definition, record, interfaces."""

    @abc.abstractmethod
    def rollback_live_migration_at_source(self, instance: Instance, migration: Migration) -> None:
        """Source, after a failure: the guest runs on with everything it had."""

    @abc.abstractmethod
    def rollback_live_migration_at_destination(
        self, instance: Instance, migration: Migration, data: MigrateData | None
    ) -> None:
        """Destination, after a failure: remove what :meth:`pre_live_migration` made, and only that."""

    # --- snapshot -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def snapshot(self, instance: Instance, request: SnapshotRequest) -> list[Part]:
        """Parts that send a point in time of the guest's root disk to the image store: ``create_image`` there, which
        alone withdraws it again; ``freeze``; ``upload``; the last publishes it and returns ``{"image": ...}``:
        ``request.image`` with size and checksum. The guest's side is thus put back before the store is asked.
        """

    def image_store(self, name: str | None) -> ImageStore:
        """The image store of that name; ``None``: the host's default."""
        raise NotSupported(what=f"image store {name or 'default'} of this driver")

    def list_cached_images(self) -> list[CachedImage]:
        """The base images on this host."""
        return []


class NullJob:
    """A :class:`Job` that nobody watches and nobody cancels: for callers outside an operation."""

    def report(
        self, phase: str, done_bytes: int | None = None, total_bytes: int | None = None, **detail: float | int | str
    ) -> None:
        """Nobody is told."""

    def check(self) -> None:
        """Never cancelled."""

    def on_cancel(self, callback: Callable[[], None]) -> AbstractContextManager[None]:
        """``callback`` is never called."""
        from contextlib import nullcontext

        return nullcontext()

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Looks ten times a second, at first more often."""
        import time

        deadline, pause = time.monotonic() + timeout, 0.002
        while not condition():
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(pause, timeout))
            pause = min(2 * pause, 0.1)
        return True

    def wake(self) -> None:
        """Looks soon anyway."""

    def explain(self, reason: str) -> None:
        """Nobody asks."""
