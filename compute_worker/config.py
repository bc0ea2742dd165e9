"""Every option: declared once as typed, frozen groups; read with oslo.config; handed to constructors.

A field is one option with its default, bounds and help. :func:`oslo_opts` turns the groups into oslo.config options
(also the entry point of ``oslo-config-generator``) and :func:`load` reads them into :class:`Settings`. Tests and the
embedded cell construct :class:`Settings` directly. Nothing is read at import.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from oslo_config import cfg


def option(
    default: Any,
    help: str,  # noqa: A002 - oslo.config's word
    *,
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    choices: Sequence[str] | None = None,
    secret: bool = False,
) -> Any:
    """One option: a dataclass field that carries what oslo.config wants to know."""
    metadata = {"help": help, "min": min, "max": max, "choices": choices, "secret": secret}
    if isinstance(default, list):
        items = tuple(default)
        return field(default=items, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Compute:
    """[compute]: who this worker is and what it accepts."""

    host: str = option("", "Name this worker listens as: RPC server, owner of its instances. Default: the host name.")
    state_path: str = option("/var/lib/compute-worker", "Directory of journal and instances (mode 0700).")
    instances_path: str = option("", "Directory of the instances. Default: <state_path>/instances.")
    compute_driver: str = option("libvirt", "Virt driver, by entry-point name (compute_worker.virt_drivers).")
    max_concurrent_builds: int = option(10, "Builds that run at once; more wait.", min=1)
    max_concurrent_deletes: int = option(10, "Deletes that run at once; more wait.", min=1)
    max_concurrent_power: int = option(16, "Power operations that run at once; more wait.", min=1)
    max_concurrent_outbound: int = option(2, "Moves away from this host that run at once; more wait.", min=1)
    max_concurrent_inbound: int = option(2, "Moves to this host that run at once; more wait.", min=1)
    max_concurrent_snapshots: int = option(5, "Snapshots that run at once; more wait.", min=1)
    max_queued_operations: int = option(
        20_000, "Operations that may wait; a command beyond is refused with retry_after.", min=1
    )
    step_attempts: int = option(5, "Times a step is tried before COMMIT when its error is retryable.", min=1)
    shutdown_timeout: float = option(60.0, "Seconds a guest has to shut itself down before its plug is pulled.", min=0)
    shutdown_retry_interval: float = option(10.0, "Seconds between two ACPI requests to shut down.", min=0.1)
    soft_reboot_timeout: float = option(120.0, "Seconds a guest has to go down in a soft reboot.", min=1)
    vif_plugging_timeout: float = option(300.0, "Seconds to wait for network-vif-plugged.", min=0)
    vif_plugging_is_fatal: bool = option(True, "Whether a missing plug event undoes the build.")
    resume_guests_state_on_host_boot: bool = option(True, "Whether guests that ran before a host reboot are started.")
    sync_power_state_interval: float = option(600.0, "Seconds between two comparisons with the hypervisor.", min=1)
    graceful_shutdown_timeout: float = option(30.0, "Seconds SIGTERM leaves for steps to end.", min=0)
    command_expiry_build: float = option(3600.0, "Seconds after which an unstarted build or move expires.", min=1)
    key_retention: float = option(90_000.0, "Seconds that keys and tombstones outlive their command.", min=60)
    progress_interval: float = option(5.0, "Seconds between two progress notifications of one operation.", min=0.5)
    allow_resize_to_same_host: bool = option(False, "Whether a resize may stay on its host.")
    resize_confirm_window: float = option(
        0.0, "Seconds after which a resized instance is confirmed by itself; 0: never.", min=0
    )
    peer_ask_interval: float = option(
        5.0, "Seconds before another host is asked what became of a move; grows to 12 times as long.", min=0.05
    )
    peer_patience: float = option(
        60.0,
        "Seconds a destination may be silent before a source that has not handed over yet takes its guest back.",
        min=0.1,
    )
    image_withdraw_interval: float = option(
        10.0, "Seconds between two tries to withdraw images of failed snapshots from a store that is silent.", min=0.05
    )
    max_console_bytes: int = option(102_400, "Most bytes get_console_output answers.", min=1024)


@dataclass(frozen=True)
class Claims:
    """[claims]: what of the host may be promised."""

    cpu_allocation_ratio: float = option(4.0, "Virtual processors promised for each physical one.", min=0.1)
    ram_allocation_ratio: float = option(1.0, "Memory promised for each MiB there is.", min=0.1)
    disk_allocation_ratio: float = option(1.0, "Disk promised for each GiB there is.", min=0.1)
    reserved_host_cpus: int = option(0, "Processors kept for the host.", min=0)
    reserved_host_memory_mb: int = option(512, "MiB of memory kept for the host.", min=0)
    reserved_host_disk_gb: int = option(0, "GiB of disk kept for the host.", min=0)


@dataclass(frozen=True)
class Rpc:
    """[rpc]: how commands come in. The broker itself: ``[DEFAULT] transport_url`` and ``[oslo_messaging_rabbit]``."""

    exchange: str = option("compute_worker", "Control exchange; its own, because durability cannot be changed later.")
    topic: str = option("compute", "Topic; commands for one host go to server=<host>.")
    threads: int = option(16, "Threads that decode and accept commands.", min=2)
    max_message_bytes: int = option(1_048_576, "A larger message is refused.", min=16_384)
    max_waiting_queries: int = option(8, "get_operation(wait=...) calls that may wait at once.", min=1)
    call_monitor_timeout: int = option(10, "Seconds a long call may be silent before the caller gives up.", min=2)


@dataclass(frozen=True)
class Images:
    """[images]: where images come from, and what is let in."""

    store: str = option("file", "Default image store, by entry-point name (compute_worker.image_stores).")
    file_path: str = option("/var/lib/compute-worker/images", "Directory of the file store.")
    http_url: str = option("", "Base address of the http store; an image is <http_url>/<id>.")
    http_ca_file: str = option("", "Certificates that an https store is checked against. Default: the system's.")
    glance_url: str = option("", "Address of the image service (its endpoint, without /v2).")
    glance_cloud: str = option("", "Name of the cloud in clouds.yaml, for authentication; empty: none.")
    glance_import: bool = option(
        False,
        "Whether snapshots are imported (glance-direct) instead of uploaded: the service then takes them in by itself.",
    )
    max_image_gb: int = option(1024, "Largest image in GiB, as downloaded or in virtual size.", min=1)
    download_attempts: int = option(5, "Times an interrupted download is resumed.", min=1)
    qemu_img_cpu_seconds: int = option(30, "Processor seconds qemu-img may use to look at an image.", min=1)
    qemu_img_memory_mb: int = option(2048, "Address space in MiB that qemu-img may use to look at an image.", min=256)
    snapshot_format: str = option(
        "qcow2", "Format of the images that snapshots make, where none is asked for.", choices=("qcow2", "raw")
    )
    remove_unused_base_images_after: float = option(86_400.0, "Seconds after which an unused base image goes.", min=0)
    cache_manager_interval: float = option(2400.0, "Seconds between two looks for unused base images.", min=1)


@dataclass(frozen=True)
class Libvirt:
    """[libvirt]: the libvirt driver."""

    connection_uri: str = option("qemu:///system", "Where libvirt answers.")
    virt_type: str = option("auto", "kvm, qemu, or auto: kvm where it works.", choices=("auto", "kvm", "qemu"))
    images_type: str = option("qcow2", "Disk backend, by entry-point name (compute_worker.image_backends).")
    cpu_mode: str = option(
        "host-model", "Processor a guest sees (kvm).", choices=("none", "host-model", "host-passthrough", "custom")
    )
    cpu_model: str = option("", "Named processor model for cpu_mode=custom.")
    machine_type: str = option("", "Machine type; default: the hypervisor's own.")
    disk_cachemode: str = option("none", "Cache mode of disks.", choices=("none", "writeback", "writethrough"))
    disk_discard: bool = option(True, "Whether discards of the guest free space in its disks.")
    rng_device: str = option("/dev/urandom", "Source of the guest's random numbers; empty: none.")
    mem_stats_period: int = option(10, "Seconds between two memory statistics of the balloon; 0: none.", min=0)
    graphics: str = option("none", "Graphical console.", choices=("none", "vnc", "spice"))
    graphics_listen: str = option("127.0.0.1", "Address graphics listen on.")
    guest_agent: bool = option(True, "Whether guests get a channel for the guest agent.")
    default_ephemeral_format: str = option("ext4", "File system of ephemeral disks where no os_type says another.")
    keepalive_interval: int = option(2, "Seconds of silence after which libvirt is asked whether it lives.", min=1)
    keepalive_count: int = option(3, "Unanswered questions after which it does not.", min=1)
    disk_owner_group: str = option("", "Group that disks are given to (qemu's); empty: left as created.")
    snapshot_freeze_timeout: float = option(
        10.0,
        "Seconds that a guest's file systems may be frozen by its agent for a snapshot, and that the agent has to "
        "answer; 0: they are not frozen.",
        min=0,
    )
    snapshot_incremental: bool = option(
        True,
        "Whether a snapshot reads from the guest's disk only what was written since the last one, where the disk and "
        "the image store can.",
    )


@dataclass(frozen=True)
class Transfer:
    """[transfer]: how disks get from one host to another when an instance moves."""

    transport: str = option(
        "auto",
        "How disks travel, by entry-point name (compute_worker.disk_transports): nbd, ssh; auto: nbd where both hosts "
        "have certificates, else ssh. Where both hosts see the same instances directory nothing travels.",
    )
    address: str = option("", "Address other hosts reach this one at, to send disks. Default: its worker's name.")
    listen_address: str = option("", "Address this host listens on for disks (nbd). Default: all its addresses.")
    ports: str = option("10900-10999", "Ports this host listens on for disks, one a disk (nbd).")
    tls_dir: str = option(
        "/etc/pki/qemu",
        "Directory of certificates: ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem. "
        "The server's must name the host as its worker is named. Where files are missing: no TLS, and no nbd.",
    )
    nbd_plaintext: bool = option(
        False, "Whether transport=nbd may send disks readable and alterable by whoever is on the way, without TLS."
    )
    window_mb: int = option(64, "MiB of a disk that are recorded as arrived at once; what a crash sends again.", min=1)
    streams: int = option(4, "Connections that one disk is sent over (nbd).", min=1, max=16)
    bandwidth_mb: int = option(0, "MiB a second that one disk may take on the way; 0: no limit.", min=0)
    compare: str = option(
        "extents",
        "What is compared when a disk has arrived: extents: size and where data is; full: also every byte, by sha256, "
        "which reads the disk again on both hosts.",
        choices=("extents", "full"),
    )
    idle_timeout: float = option(
        120.0, "Seconds after which this host stops listening for a disk that nobody sends.", min=5
    )
    ssh_user: str = option("", "User at the destination (ssh). Default: the worker's own.")
    ssh_options: str = option(
        "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3",
        "Options of ssh, split at blanks.",
    )
    resize_precopy: str = option(
        "auto",
        "Whether the disks of a running guest are sent before it is shut down, so that only what it wrote meanwhile "
        "keeps it off: auto or never.",
        choices=("auto", "never"),
    )


@dataclass(frozen=True)
class LiveMigration:
    """[live_migration]: how a running guest gets from one host to another."""

    scheme: str = option(
        "auto",
        "How this host's libvirt reaches another's: tls, tcp, ssh; auto: tls where the guest goes by TLS, else tcp.",
        choices=("auto", "tls", "tcp", "ssh"),
    )
    tls: str = option(
        "auto",
        "Whether memory and disks go by TLS: auto: where both hosts have certificates (transfer.tls_dir); required: or "
        "not at all; never.",
        choices=("auto", "required", "never"),
    )
    inbound_addr: str = option(
        "", "Address of this host that guests come to. Default: what libvirt takes (its migration_host)."
    )
    bandwidth_mb: int = option(0, "MiB a second that one guest's memory and disks may take; 0: no limit.", min=0)
    parallel_connections: int = option(
        1, "Connections that memory is sent over. Before QEMU 10.1 not together with permit_post_copy.", min=1, max=64
    )
    permit_post_copy: bool = option(
        False,
        "Whether a guest that does not converge may be switched over before its memory is there. While that goes on "
        "it needs both hosts.",
    )
    permit_auto_converge: bool = option(
        False, "Whether a guest that does not converge may be slowed down. Not used where post-copy is permitted."
    )
    max_downtime_ms: int = option(500, "Milliseconds a guest may stand still when it is switched over.", min=1)
    downtime_steps: int = option(6, "Steps in which the permitted downtime grows while a guest stalls.", min=1, max=100)
    downtime_delay: float = option(
        5.0, "Seconds, for each GiB of the guest, that a permitted downtime has before the next.", min=0
    )
    completion_timeout: float = option(
        150.0, "Seconds, for each GiB that is moved (at least 2), after which timeout_action is taken; 0: never.", min=0
    )
    timeout_action: str = option(
        "abort",
        "What becomes of a guest that took too long: abort: it stays; force_complete: post-copy where it is permitted, "
        "else it stands still until it is there.",
        choices=("abort", "force_complete"),
    )
    progress_timeout: float = option(
        15.0, "Seconds without a byte sent after which a migration is aborted; 0: never.", min=0
    )
    allow_older_hypervisor: bool = option(
        False, "Whether guests may come from a host with a newer hypervisor; their machine type must be known here."
    )


@dataclass(frozen=True)
class Fake:
    """[fake]: the simulated host."""

    vcpus: int = option(16, "Processors of the simulated host.", min=1)
    memory_mb: int = option(65_536, "MiB of memory of the simulated host.", min=64)
    disk_gb: int = option(1_000, "GiB of disk of the simulated host.", min=1)
    latency: float = option(0.0, "Seconds each hypervisor call takes.", min=0)


@dataclass(frozen=True)
class Telemetry:
    """[telemetry]: metrics, health, notifications."""

    listen: str = option("127.0.0.1", "Address of /metrics and /healthz.")
    port: int = option(9477, "Port of /metrics and /healthz; 0: any free one; -1: off.", min=-1, max=65_535)
    notification_topic: str = option("compute_notifications", "Topic of notifications.")
    host_state_interval: float = option(60.0, "Seconds between two host.state notifications.", min=1)
    log_format: str = option("text", "How log lines look.", choices=("text", "json"))


@dataclass(frozen=True)
class Settings:
    """All groups."""

    compute: Compute = field(default_factory=Compute)
    claims: Claims = field(default_factory=Claims)
    rpc: Rpc = field(default_factory=Rpc)
    images: Images = field(default_factory=Images)
    libvirt: Libvirt = field(default_factory=Libvirt)
    transfer: Transfer = field(default_factory=Transfer)
    live_migration: LiveMigration = field(default_factory=LiveMigration)
    fake: Fake = field(default_factory=Fake)
    telemetry: Telemetry = field(default_factory=Telemetry)

    @property
    def host(self) -> str:
        """The worker's name."""
        return self.compute.host or socket.gethostname()

    @property
    def instances_path(self) -> str:
        """Where instances live."""
        return self.compute.instances_path or f"{self.compute.state_path}/instances"


_KINDS: dict[type, type[cfg.Opt]] = {str: cfg.StrOpt, int: cfg.IntOpt, float: cfg.FloatOpt, bool: cfg.BoolOpt}


def _groups() -> dict[str, type]:
    return {f.name: get_type_hints(Settings)[f.name] for f in dataclasses.fields(Settings)}


def _opt(item: dataclasses.Field[Any], kind: type) -> cfg.Opt:
    extra: dict[str, Any] = {}
    if kind in (int, float):
        extra = {"min": item.metadata["min"], "max": item.metadata["max"]}
    elif kind is str and item.metadata["choices"]:
        extra = {"choices": list(item.metadata["choices"])}
    return _KINDS[kind](
        item.name, default=item.default, help=item.metadata["help"], secret=item.metadata["secret"], **extra
    )


def oslo_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Every option by group: what ``oslo-config-generator`` and :func:`load` use."""
    return [
        (name, [_opt(item, get_type_hints(group)[item.name]) for item in dataclasses.fields(group)])
        for name, group in _groups().items()
    ]


def register(conf: cfg.ConfigOpts) -> None:
    """Make ``conf`` know every option."""
    for group, opts in oslo_opts():
        conf.register_opts(opts, group=group)


def load(conf: cfg.ConfigOpts) -> Settings:
    """What ``conf`` (registered and called) says.

    :raises oslo_config.cfg.ConfigFileValueError: a value out of bounds, naming the option.
    """
    values = {
        name: group(**{item.name: conf[name][item.name] for item in dataclasses.fields(group)})
        for name, group in _groups().items()
    }
    return Settings(**values)
