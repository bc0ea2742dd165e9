"""What libvirt says of a guest, in our words: power state, job, diagnostics. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import libvirt

from compute_worker.objects import Diagnostics
from compute_worker.states import PowerState
from compute_worker.virt.driver import JobStatistics
from compute_worker.virt.libvirt.events import word, words

# A guest that shuts down still has its process, and one that sleeps (S3) wakes where it is: both are not off.
_POWER: Mapping[int, PowerState] = {
    libvirt.VIR_DOMAIN_NOSTATE: PowerState.NOSTATE,
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.SHUTDOWN,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.PAUSED,
}
_STATES: Mapping[int, str] = {
    libvirt.VIR_DOMAIN_NOSTATE: "nostate",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_SHUTOFF: "shutoff",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "pmsuspended",
}
_REASONS: Mapping[int, Mapping[int, str]] = {
    number: words(f"VIR_DOMAIN_{name.upper()}_") for number, name in _STATES.items()
}
_DIED = frozenset({libvirt.VIR_DOMAIN_SHUTOFF_CRASHED, libvirt.VIR_DOMAIN_SHUTOFF_DAEMON})
_JOB_TYPES: Mapping[int, str] = {
    libvirt.VIR_DOMAIN_JOB_NONE: "none",
    libvirt.VIR_DOMAIN_JOB_BOUNDED: "bounded",
    libvirt.VIR_DOMAIN_JOB_UNBOUNDED: "unbounded",
    libvirt.VIR_DOMAIN_JOB_COMPLETED: "completed",
    libvirt.VIR_DOMAIN_JOB_FAILED: "failed",
    libvirt.VIR_DOMAIN_JOB_CANCELLED: "cancelled",
}
_POSTCOPY = frozenset({"postcopy", "postcopy_failed"})


@dataclass(frozen=True, slots=True)
class GuestState:
    """``power`` is ours; ``state`` and ``reason`` are libvirt's words (``paused``, ``ioerror``)."""

    power: PowerState
    state: str
    reason: str

    @property
    def in_postcopy(self) -> bool:
        """Whether its memory is on two hosts now."""
        return self.reason in _POSTCOPY

    @property
    def in_migration(self) -> bool:
        """Whether a migration holds it still: it arrives, or is being switched over."""
        return self.in_postcopy or (self.state == "paused" and self.reason == "migration")


def state_of(state: int, reason: int, *, saved: bool) -> GuestState:
    """libvirt's numbers in words. A guest that is off with a managed save is suspended, whatever the reason says:
    libvirtd forgets reasons when it restarts."""
    power = _POWER.get(state, PowerState.NOSTATE)
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        if saved:
            power = PowerState.SUSPENDED
        elif reason in _DIED:
            power = PowerState.CRASHED
    return GuestState(power, word(_STATES, state), word(_REASONS.get(state, {}), reason))


def _seconds(stats: Mapping[str, Any], key: str) -> float | None:
    return stats[key] / 1000 if key in stats else None


def job_statistics(stats: Mapping[str, Any], *, postcopy: bool = False) -> JobStatistics:
    """libvirt's job statistics (pages, milliseconds) as ours (bytes, seconds)."""
    dirty = stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE)
    page = stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE, 4096)
    return JobStatistics(
        type=word(_JOB_TYPES, int(stats.get("type", 0))),
        memory_total=stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_TOTAL),
        memory_processed=stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_PROCESSED),
        memory_remaining=stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_REMAINING),
        memory_rate=stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_BPS),
        memory_dirty_rate=None if dirty is None else dirty * page,
        memory_iteration=stats.get(libvirt.VIR_DOMAIN_JOB_MEMORY_ITERATION),
        disk_total=stats.get(libvirt.VIR_DOMAIN_JOB_DISK_TOTAL),
        disk_processed=stats.get(libvirt.VIR_DOMAIN_JOB_DISK_PROCESSED),
        disk_remaining=stats.get(libvirt.VIR_DOMAIN_JOB_DISK_REMAINING),
        disk_rate=stats.get(libvirt.VIR_DOMAIN_JOB_DISK_BPS),
        downtime=_seconds(stats, libvirt.VIR_DOMAIN_JOB_DOWNTIME),
        elapsed=_seconds(stats, libvirt.VIR_DOMAIN_JOB_TIME_ELAPSED),
        postcopy=postcopy,
        throttle=stats.get(libvirt.VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE),
    )


def grouped(stats: Mapping[str, Any], group: str) -> list[dict[str, Any]]:
    """``{"net.0.name": "a", "net.0.rx.bytes": 1}`` as ``[{"name": "a", "rx_bytes": 1}]``, for one group."""
    found: list[dict[str, Any]] = [{} for _ in range(int(stats.get(f"{group}.count", 0)))]
    for key, value in stats.items():
        head, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if head == group and name and number.isdigit() and int(number) < len(found):
            found[int(number)][name.replace(".", "_")] = value
    return found


def diagnostics_of(stats: Mapping[str, Any], power: PowerState) -> Diagnostics:
    """One guest's statistics as :class:`~compute_worker.objects.Diagnostics`.

    Memory used is what the guest's balloon reports: absent without a balloon driver or a statistics period.
    """
    available, unused = stats.get("balloon.available"), stats.get("balloon.unused")
    current = stats.get("balloon.current")
    return Diagnostics(
        state=power,
        cpu_time_ns=stats.get("cpu.time"),
        vcpus=stats.get("vcpu.current"),
        memory_mb=None if current is None else current / 1024,
        memory_used_mb=None if available is None or unused is None else (available - unused) / 1024,
        disks=grouped(stats, "block"),
        nics=grouped(stats, "net"),
        driver="libvirt",
    )
