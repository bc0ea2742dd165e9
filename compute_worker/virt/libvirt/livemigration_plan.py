"""What libvirt is asked for: where the guest goes, by which flags and parameters. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import libvirt

from compute_worker import errors
from compute_worker.config import LiveMigration
from compute_worker.objects import MigrateData, Migration
from compute_worker.virt.convergence import GIB, Policy
from compute_worker.virt.driver import JobStatistics
from compute_worker.virt.libvirt.transfer.address import in_url, is_host

MULTIFD_WITH_POSTCOPY = 10_001_000
"""The QEMU that can do both: 10.1."""
RESUME: int = libvirt.VIR_MIGRATE_POSTCOPY_RESUME
"""Added to the flags of before: go on with a post-copy that was interrupted."""
_MIB = 1 << 20
THROTTLE_INITIAL, THROTTLE_INCREMENT = 20, 10
"""Percent that auto-converge begins with, and adds with each iteration that does not help: QEMU's own defaults."""


@dataclass(frozen=True, slots=True)
class Itinerary:
    """One call of ``virDomainMigrateToURI3``."""

    uri: str
    flags: int
    params: Mapping[str, Any]
    post_copy: bool
    auto_converge: bool


@dataclass(frozen=True, slots=True)
class Luggage:
    """What goes: both XMLs for the destination, the targets of the disks that travel (``vda``)."""

    live_xml: str
    persistent_xml: str
    targets: Sequence[str] = ()
    paused: bool = False
    hypervisor_version: int = 0


def itinerary(options: LiveMigration, migration: Migration, data: MigrateData, luggage: Luggage) -> Itinerary:
    """The call for this guest.

    The source's definition is kept: shut off and ``migrated``, it says to a worker that died meanwhile that the guest
    arrived. ``post_live_migration`` removes it.

    :raises NotSupported: the destination's name is no name of a host.
    """
    post_copy = options.permit_post_copy and data.post_copy and not luggage.paused
    auto_converge = options.permit_auto_converge and not post_copy
    parallel = options.parallel_connections > 1 and _can_be_parallel(post_copy, luggage.hypervisor_version)
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST
    for wanted, flag in (
        (data.native_tls, libvirt.VIR_MIGRATE_TLS),
        (post_copy, libvirt.VIR_MIGRATE_POSTCOPY),
        (auto_converge, libvirt.VIR_MIGRATE_AUTO_CONVERGE),
        (parallel, libvirt.VIR_MIGRATE_PARALLEL),
        (luggage.targets and data.full_copy, libvirt.VIR_MIGRATE_NON_SHARED_DISK),
        (luggage.targets and not data.full_copy, libvirt.VIR_MIGRATE_NON_SHARED_INC),
        # libvirt knows shared file systems by a list of types; that both hosts see this one was tried.
        (data.shared_instance_path, libvirt.VIR_MIGRATE_UNSAFE),
    ):
        flags |= flag if wanted else 0
    return Itinerary(
        uri=_uri(options, migration, data),
        flags=flags,
        params=_params(options, migration, data, luggage, parallel, auto_converge),
        post_copy=post_copy,
        auto_converge=auto_converge,
    )


def _params(
    options: LiveMigration,
    migration: Migration,
    data: MigrateData,
    luggage: Luggage,
    parallel: bool,
    auto_converge: bool,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        libvirt.VIR_MIGRATE_PARAM_DEST_XML: luggage.live_xml,
        libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: luggage.persistent_xml,
    }
    if data.migrate_uri:
        found[libvirt.VIR_MIGRATE_PARAM_URI] = data.migrate_uri
    if luggage.targets:
        found[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = list(luggage.targets)
    if options.bandwidth_mb:
        found[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = options.bandwidth_mb
    if parallel:
        found[libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS] = options.parallel_connections
    if auto_converge:
        found[libvirt.VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL] = THROTTLE_INITIAL
        found[libvirt.VIR_MIGRATE_PARAM_AUTO_CONVERGE_INCREMENT] = THROTTLE_INCREMENT
    if data.native_tls:
        # Always: the address that QEMU connects to need not be the name that the certificate carries.
        found[libvirt.VIR_MIGRATE_PARAM_TLS_DESTINATION] = migration.dest_host
    return found


def _can_be_parallel(post_copy: bool, hypervisor_version: int) -> bool:
    return not post_copy or hypervisor_version >= MULTIFD_WITH_POSTCOPY


def _uri(options: LiveMigration, migration: Migration, data: MigrateData) -> str:
    scheme = options.scheme
    if scheme == "auto":
        scheme = "tls" if data.native_tls else "tcp"
    # By TLS by its name: an address is hardly ever in a certificate.
    host = migration.dest_host if scheme == "tls" else data.listen_address or migration.dest_host
    if not is_host(host):
        raise errors.NotSupported(what=f"live migration to {host!r}, which is no host name or address,")
    return f"qemu+{scheme}://{in_url(host)}/system"


def policy(options: LiveMigration, journey: Itinerary, size_bytes: int, *, emulated: bool = False) -> Policy:
    """What may be done for this guest when it does not converge.

    :param emulated: its processor is QEMU's own (TCG). Such a QEMU loses a page that is written at the very moment in
        which an iteration begins. Seen with plain libvirt and QEMU 7.2: 19 iterations by a downtime of 20 ms, and the
        guest's kernel crashed in each of three runs; few of them by 300 ms, and it never did in 80 moves. So all of the
        downtime is permitted at once, which leaves the fewest iterations.
    """
    return Policy(
        size_gib=size_bytes / GIB,
        max_downtime_ms=options.max_downtime_ms,
        downtime_steps=1 if emulated else options.downtime_steps,
        downtime_delay=options.downtime_delay,
        post_copy=journey.post_copy,
        auto_converge=journey.auto_converge,
        completion_timeout=options.completion_timeout,
        timeout_action=options.timeout_action,
        progress_timeout=options.progress_timeout,
    )


def summary(stats: JobStatistics) -> str:
    """One line for the log when it is over."""
    moved = ((stats.memory_processed or 0) + (stats.disk_processed or 0)) / _MIB
    downtime = f"{stats.downtime * 1000:.0f} ms" if stats.downtime is not None else "unknown"
    return f"{moved:.1f} MiB in {stats.elapsed or 0:.1f} s, downtime {downtime}"
