"""What travels on the wire and what is stored: small frozen :class:`msgspec.Struct` objects, plain JSON.

Unknown fields are ignored and new fields have defaults, so that an older peer reads a newer one. Bounds are checked
where a value comes in (:func:`decode`): uuids are uuids, host names cannot be paths, sizes carry their unit.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from compute_worker.states import MigrationStatus, OperationState, PowerState, TaskState, VmState

RPC_VERSION = "1.1"
"""Version of the messages. The minor part grows with every compatible change of the wire form."""

UUID_PATTERN = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z"
HOST_PATTERN = r"^(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9.:_-]{0,252}\Z"
ID_PATTERN = r"^(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z"
MAC_PATTERN = r"^([0-9a-f]{2}:){5}[0-9a-f]{2}\Z"
DEVICE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,14}\Z"
TEXT_PATTERN = r"^[^\x00-\x1f\x7f]*\Z"
ORIGIN = "compute_worker_operation"
"""Property of an image: the operation that made it. Only that operation's undo may remove it."""

Uuid = Annotated[str, Meta(pattern=UUID_PATTERN, description="lower-case uuid with dashes")]
HostName = Annotated[str, Meta(pattern=HOST_PATTERN, description="name a worker listens as")]
ImageId = Annotated[str, Meta(pattern=ID_PATTERN, description="name of an image in its store; never a path")]
Key = Annotated[str, Meta(min_length=1, max_length=255, pattern=TEXT_PATTERN)]
Name = Annotated[str, Meta(max_length=255, pattern=TEXT_PATTERN, description="for people; never in a path")]
Mac = Annotated[str, Meta(pattern=MAC_PATTERN)]
Device = Annotated[str, Meta(pattern=DEVICE_PATTERN, description="network device or bridge")]
Gb = Annotated[int, Meta(ge=0, le=1 << 20, description="GiB")]
Mb = Annotated[int, Meta(ge=0, le=1 << 30, description="MiB")]
Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Text = Annotated[str, Meta(max_length=65_536)]


class Object(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """Base of everything that travels."""


T = TypeVar("T")


class Flavor(Object, frozen=True, kw_only=True):
    """The size of an instance."""

    name: Name = "custom"
    vcpus: Annotated[int, Meta(ge=1, le=1024)]
    memory_mb: Annotated[int, Meta(ge=16, le=1 << 24)]
    root_gb: Gb = 0
    """GiB of root disk; 0: as large as the image."""
    ephemeral_gb: Gb = 0
    swap_mb: Mb = 0
    extra_specs: dict[Key, Name] = {}


class ImageMeta(Object, frozen=True, kw_only=True):
    """An image in a store. ``disk_format`` is what the bytes must be, or they are refused."""

    id: ImageId
    store: Device | None = None
    """Entry-point name of the store; ``None``: the host's default."""
    name: Name = ""
    disk_format: Annotated[str, Meta(pattern=r"^(raw|qcow2|iso|vmdk|vhd|vhdx|vdi|aki|ari)\Z")] = "raw"
    size_bytes: Bytes | None = None
    checksum_algorithm: Annotated[str, Meta(pattern=r"^(sha256|sha512)\Z")] | None = None
    checksum: Annotated[str, Meta(pattern=r"^[0-9a-f]{64,128}\Z")] | None = None
    min_disk_gb: Gb = 0
    min_ram_mb: Mb = 0
    os_type: Name | None = None
    kernel_id: ImageId | None = None
    ramdisk_id: ImageId | None = None
    properties: dict[Key, Name] = {}


class SnapshotOptions(Object, frozen=True, kw_only=True):
    """What the image of a snapshot is to be; everything else of it comes from the instance."""

    name: Name = ""
    store: Device | None = None
    """Entry-point name of the store it goes to; ``None``: the host's default."""
    disk_format: Annotated[str, Meta(pattern=r"^(raw|qcow2)\Z")] | None = None
    """``None``: what the host is configured to make."""
    compression: Annotated[str, Meta(pattern=r"^(none|zlib|zstd)\Z")] = "none"
    """Of the data inside a qcow2 image."""
    properties: Annotated[dict[Key, Name], Meta(max_length=64)] = {}


class StoredImage(Object, frozen=True, kw_only=True):
    """An image as its store lists it. ``created_at``: seconds since the epoch."""

    image: ImageMeta
    created_at: float = 0.0


class CachedImage(Object, frozen=True, kw_only=True):
    """A base image in a host's cache. ``used_at``: seconds since the epoch, 0 where it was never noted."""

    name: Name
    size_bytes: Bytes
    """Of the disk in it."""
    allocated_bytes: Bytes = 0
    used_at: float = 0.0
    in_use: bool = False
    """Whether a disk on this host stands on it."""


class EphemeralDisk(Object, frozen=True, kw_only=True):
    """An empty disk with a file system, beside the root disk."""

    size_gb: Annotated[int, Meta(ge=1, le=1 << 20)]
    guest_format: Name | None = None
    """File system (``ext4``, ``xfs``, ``vfat``, ...); ``None``: by the image's ``os_type``."""


class BlockDeviceInfo(Object, frozen=True, kw_only=True):
    """Disks beside the root disk. Volumes have their place here and are refused (NotSupported)."""

    ephemerals: Annotated[list[EphemeralDisk], Meta(max_length=16)] = []
    swap_mb: Mb | None = None
    """MiB; overrides the flavor's, within it."""
    root_device_name: Device | None = None
    block_device_mapping: Annotated[list[dict[Key, Any]], Meta(max_length=32)] = []
    """Volumes: ``connection_info`` and where to attach it. None can be attached by this version."""


class Vif(Object, frozen=True, kw_only=True):
    """A network interface, plugged on the host before the guest runs."""

    id: Uuid
    mac: Mac
    bridge: Device | None = None
    """Linux bridge on the host; ``None``: an interface with no link."""
    model: Annotated[str, Meta(pattern=r"^(virtio|e1000|e1000e|rtl8139)\Z")] = "virtio"
    mtu: Annotated[int, Meta(ge=68, le=65_535)] | None = None
    devname: Device | None = None
    """Name of the tap device; ``None``: ``tap`` and the first 11 characters of the id."""
    wait_for_plug: bool = False
    """Whether the guest stays paused until ``external_instance_event(network-vif-plugged, id)`` came."""


class InjectedFile(Object, frozen=True, kw_only=True):
    """A file for the guest, given by config drive (``content_base64`` decoded, at most 64 KiB in all)."""

    path: Annotated[str, Meta(min_length=1, max_length=255, pattern=TEXT_PATTERN)]
    content_base64: Text


class Instance(Object, frozen=True, kw_only=True):
    """A virtual machine as the owner's host records it."""

    uuid: Uuid
    name: Name = ""
    flavor: Flavor
    image: ImageMeta
    host: HostName | None = None
    """The owner: the only host that may start it."""
    generation: Count = 0
    """Raised by force; a host that meets a higher one sets its own copy aside."""
    migration: Uuid | None = None
    vm_state: VmState = VmState.BUILDING
    task_state: TaskState | None = None
    power_state: PowerState = PowerState.NOSTATE
    vifs: Annotated[list[Vif], Meta(max_length=32)] = []
    block_device_info: BlockDeviceInfo = BlockDeviceInfo()
    config_drive: bool = False
    hostname: HostName | None = None
    """The guest's own host name, given in its metadata."""
    kernel_cmdline: Annotated[str, Meta(max_length=2048, pattern=TEXT_PATTERN)] = ""
    """Appended where the image boots from kernel and ramdisk."""
    metadata: dict[Key, Name] = {}
    user_data: Text | None = None
    launched_at: float | None = None
    fault: str | None = None
    seq: int = 0
    """Change counter of the owner's store: ``list_instances(since=seq)``."""


class Migration(Object, frozen=True, kw_only=True):
    """A move of one instance between two hosts."""

    uuid: Uuid
    instance: Uuid
    migration_type: Annotated[str, Meta(pattern=r"^(migration|resize|live-migration)\Z")] = "migration"
    source_host: HostName
    dest_host: HostName
    attempt: Annotated[int, Meta(ge=1, le=1000)] = 1
    status: MigrationStatus = MigrationStatus.PRE_MIGRATING
    old_flavor: Flavor | None = None
    new_flavor: Flavor | None = None
    alternates: Annotated[list[HostName], Meta(max_length=64)] = []
    """Hosts to ask next when the destination refuses."""
    seq: int = 0


class Disk(Object, frozen=True, kw_only=True):
    """One file of ``disk.info``. Formats and backing chains come from here, never from probing."""

    name: ImageId
    """File in the instance directory: ``disk``, ``disk.local``, ``disk.eph0``, ``disk.swap``, ``disk.config``."""
    format: Annotated[str, Meta(pattern=r"^(raw|qcow2)\Z")]
    virtual_size_bytes: Bytes
    backing: ImageId | None = None
    """File in ``_base``, always raw unless ``backing_format`` says otherwise."""
    backing_format: Annotated[str, Meta(pattern=r"^(raw|qcow2)\Z")] | None = None
    allocated_bytes: Bytes = 0
    label: Name | None = None


class DiskInfo(Object, frozen=True, kw_only=True):
    """What an instance's directory holds, as its host wrote it at creation."""

    disks: Annotated[list[Disk], Meta(max_length=32)] = []
    image: ImageId | None = None
    shared: bool = False
    """Whether source and destination see the same directory."""


class BaseImage(Object, frozen=True, kw_only=True):
    """A base that disks stand on, as the source has it."""

    name: ImageId
    size_bytes: Bytes
    digest: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    """sha256 of its size and blocks; empty where its name says what it holds."""


class MigrateData(Object, frozen=True, kw_only=True):
    """What the two hosts of a live migration tell each other, before and after the destination prepared."""

    migration: Uuid
    block_migration: bool = False
    disks: Annotated[list[Disk], Meta(max_length=32)] = []
    """Exactly the disks to copy."""
    shared_instance_path: bool = False
    listen_address: HostName | None = None
    """Where the destination's libvirt is reached; ``None``: by its worker's name."""
    migrate_uri: Annotated[str, Meta(max_length=512, pattern=TEXT_PATTERN)] | None = None
    serial_ports: list[Annotated[int, Meta(ge=1, le=65_535)]] = []
    graphics_listen: HostName | None = None
    destination_xml: Annotated[str, Meta(max_length=262_144)] | None = None
    native_tls: bool = False
    probe: Annotated[str, Meta(pattern=r"^(probe-[0-9a-f]{32})?\Z")] = ""
    """A file that the destination made in its instances directory: a source that sees it shares the directory."""
    probe_content: Annotated[str, Meta(pattern=r"^[0-9a-f]{0,64}\Z")] = ""
    disk_over_commit: bool = False
    """Whether room is asked for what disks occupy, not for what they may grow to."""
    disk_available_bytes: Bytes | None = None
    """Room at the destination when it was asked."""
    machine: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}\Z")] = ""
    """Machine type of the running guest."""
    cpu_xml: Annotated[str, Meta(max_length=65_536)] = ""
    """Processor of the running guest, as the hypervisor describes it."""
    bases: Annotated[list[BaseImage], Meta(max_length=32)] = []
    files: dict[ImageId, Annotated[str, Meta(max_length=524_288)]] = {}
    """Small files that the hypervisor does not move (the config drive): zlib, then base64."""
    post_copy: bool = False
    """Whether the destination can take the guest by post-copy."""
    full_copy: bool = False
    """Whether whole disks travel, since the destination lacks what they stand on."""
    instance_path: Annotated[str, Meta(max_length=4096, pattern=TEXT_PATTERN)] = ""
    """The instance's directory at the destination."""
    base_path: Annotated[str, Meta(max_length=4096, pattern=TEXT_PATTERN)] = ""
    """The directory of bases at the destination."""


class Progress(Object, frozen=True, kw_only=True):
    """How far a long operation is. ``None``: not known. Rates are bytes a second, ``eta`` seconds."""

    phase: str
    done_bytes: int | None = None
    total_bytes: int | None = None
    rate: float | None = None
    eta: float | None = None
    detail: dict[str, float | int | str] = {}


class StepRecord(Object, frozen=True, kw_only=True):
    """One line of an operation's journal."""

    name: str
    direction: str
    """``do`` or ``undo``."""
    state: str
    """``started``, ``done`` or ``failed``."""
    started_at: float
    ended_at: float | None = None
    attempts: int = 1
    error: str | None = None
    reason: str | None = None
    """What the step decided and why."""


class Operation(Object, frozen=True, kw_only=True):
    """A durable operation as callers see it."""

    uuid: Uuid
    kind: str
    instance: Uuid | None = None
    host: HostName
    state: OperationState
    phase: str
    committed: bool = False
    cancel_requested: bool = False
    waiting_for: str | None = None
    request_id: str | None = None
    created_at: float
    updated_at: float
    progress: Progress | None = None
    error: dict[str, Any] | None = None
    result: dict[str, Any] = {}
    steps: list[StepRecord] = []
    journal_id: str = ""
    seq: int = 0


class OperationAnswer(Object, frozen=True, kw_only=True):
    """What a host says became of a peer's command."""

    known: bool
    """False: it never came, and is refused from now on."""
    state: OperationState = OperationState.REFUSED
    committed: bool = False
    """Whether the host decided for it: it owns what the command was to bring."""
    phase: str = ""
    error: dict[str, Any] | None = None
    """Why it ended undone, or will: it was cancelled, or what it is to do has failed."""
    journal_id: str = ""
    clean: bool = True
    """Whether the host has neither a guest nor files of the instance (what a no is worth after a lost journal)."""
    generation: Count = 0
    """The instance's, as the host has it."""
    landed: bool = False
    """Of a live migration, at its source: whether the hypervisor says that the guest is at the destination."""


class MigrationState(Object, frozen=True, kw_only=True):
    """What a host knows of one side of a move."""

    migration: Migration
    side: Annotated[str, Meta(pattern=r"^(source|destination)\Z")]
    operation: Uuid
    handed_over: bool = False
    """Whether the source waits for the destination to decide."""
    generation: Count = 0
    """The instance's on this host."""
    has_copy: bool = False
    """Whether this host still keeps what it is to keep: at the source what a revert brings back."""
    refused: str | None = None
    finished_at: float | None = None
    journal_id: str = ""


class Finding(Object, frozen=True, kw_only=True):
    """Something on a host that may be left over, or waits."""

    kind: Annotated[str, Meta(pattern=r"^(directory|resize|del|part|domain|lock|operation|move)\Z")]
    instance: Uuid | None = None
    where: str
    """A path, a domain's name, the uuid of an operation or a migration."""
    reason: str
    safe: bool = False
    """Whether ``repair_leftovers`` removes it."""
    kept: bool = False
    """Whether it is there on purpose: it belongs to something that goes on."""
    remedy: str = ""
    """What is done about it, or by whom."""


class Accepted(Object, frozen=True, kw_only=True):
    """The answer to a command: the operation that will do it. ``operation`` is ``None`` for ``check_only``."""

    operation: Uuid | None
    host: HostName
    state: OperationState = OperationState.QUEUED
    repeated: bool = False
    """Whether this command had been accepted before."""


class Capacity(Object, frozen=True, kw_only=True):
    """One resource of a host: ``total`` as found, ``usable`` after reservation and ratio, ``used`` by claims."""

    total: float
    usable: float
    used: float = 0

    @property
    def free(self) -> float:
        """What a claim may still take."""
        return max(0.0, self.usable - self.used)


class HostState(Object, frozen=True, kw_only=True):
    """What a scheduler wants to know of a host."""

    host: HostName
    enabled: bool = True
    disabled_reason: str | None = None
    vcpus: Capacity
    memory_mb: Capacity
    disk_gb: Capacity
    instances: int = 0
    operations: int = 0
    hypervisor_type: str = ""
    hypervisor_version: int = 0
    hypervisor_up: bool = True
    cpu_model: str = ""
    machine_arch: str = ""
    instances_id: str = ""
    """Which instances directory it has: the same on two hosts means that they share one. Empty: not known."""
    worker_version: str = ""
    rpc_version: str = RPC_VERSION
    journal_id: str = ""
    started_at: float = 0
    time: float = 0
    """The host's clock, so that a caller can see skew before ``expires_at`` bites."""


class ExternalEvent(Object, frozen=True, kw_only=True):
    """Something a caller tells about an instance: ``network-vif-plugged``, ``network-vif-unplugged``, ..."""

    name: Annotated[str, Meta(pattern=r"^[a-z][a-z-]{0,63}\Z")]
    tag: Key | None = None
    status: Annotated[str, Meta(pattern=r"^(completed|failed|in-progress)\Z")] = "completed"


class Diagnostics(Object, frozen=True, kw_only=True):
    """What the hypervisor measures of a running guest."""

    state: PowerState
    cpu_time_ns: int | None = None
    vcpus: int | None = None
    memory_mb: float | None = None
    memory_used_mb: float | None = None
    disks: list[dict[str, Any]] = []
    nics: list[dict[str, Any]] = []
    driver: str = ""


def decode(value: Any, type_: type[T] | Any, where: str) -> T:
    """``value`` (built from JSON) as ``type_``.

    :param where: names the method and argument in the error.
    :raises compute_worker.errors.InvalidCommand: naming the field and what is wrong with it.
    """
    from compute_worker.errors import InvalidCommand

    try:
        decoded: T = msgspec.convert(value, type_, strict=True)
    except (msgspec.ValidationError, RecursionError, ValueError) as exc:
        raise InvalidCommand(method=where, problem=str(exc)[:500]) from None
    return decoded


def encode(value: Any) -> Any:
    """``value`` as what JSON can hold: structs become objects, enums their values."""
    return msgspec.to_builtins(value)
