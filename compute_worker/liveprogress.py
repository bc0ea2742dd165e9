"""How far a live migration is, in the same words whichever driver does it.

What a driver measures (:class:`~compute_worker.virt.driver.JobStatistics`) becomes the progress of the operation, and
with it what callers, notifications, ``watch`` and metrics show. Sizes are bytes, rates bytes a second, times seconds.
"""

from __future__ import annotations

from collections.abc import Mapping

from compute_worker.states import MigrationStatus
from compute_worker.virt.driver import Job, JobStatistics

PHASE = "live_migration"
RUNNING = ("bounded", "unbounded")
"""Types of a job that goes on."""
FIGURES = ("downtime", "elapsed", "iteration", "memory_processed", "disk_processed")
"""What is worth keeping of a migration that is over."""
_MEASURED = (
    ("iteration", "memory_iteration"),
    ("memory_total", "memory_total"),
    ("memory_processed", "memory_processed"),
    ("memory_remaining", "memory_remaining"),
    ("memory_rate", "memory_rate"),
    ("memory_dirty_rate", "memory_dirty_rate"),
    ("disk_total", "disk_total"),
    ("disk_processed", "disk_processed"),
    ("disk_remaining", "disk_remaining"),
    ("disk_rate", "disk_rate"),
    ("throttle", "throttle"),
    ("elapsed", "elapsed"),
)


def status_of(stats: JobStatistics) -> str:
    """The migration's status, as the record of it says it."""
    if stats.type in RUNNING:
        return (MigrationStatus.RUNNING_POSTCOPY if stats.postcopy else MigrationStatus.RUNNING).value
    return stats.type


def detail_of(stats: JobStatistics) -> dict[str, float | int | str]:
    """Everything that is known, by name. ``expected_downtime`` while it goes on, ``downtime`` once it is measured."""
    detail: dict[str, float | int | str] = {"status": status_of(stats)}
    for name, attribute in _MEASURED:
        value = getattr(stats, attribute)
        if value is not None:
            detail[name] = value
    if stats.downtime is not None:
        detail["expected_downtime" if stats.type in RUNNING else "downtime"] = stats.downtime
    return detail


def report(job: Job, stats: JobStatistics) -> None:
    """Tell the job. Of no migration nothing is told."""
    if stats.type == "none":
        return
    done = (stats.memory_processed or 0) + (stats.disk_processed or 0)
    left = (stats.memory_remaining or 0) + (stats.disk_remaining or 0) if stats.type in RUNNING else 0
    job.report(PHASE, done, done + left, **detail_of(stats))


def figures(detail: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
    """What of the last report is kept with the operation's result."""
    return {name: detail[name] for name in FIGURES if name in detail}
