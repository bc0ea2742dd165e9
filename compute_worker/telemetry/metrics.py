"""Prometheus metrics: events as they happen, everything else asked for when somebody scrapes.

:mod:`prometheus_client` is imported where metrics are made, not here: 1.7 MiB that a worker with ``port = -1`` saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from compute_worker.objects import Capacity, HostState

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "compute_worker"
_OPERATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
_COMMIT_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is true at the moment of a scrape. ``None``: not known now, and no sample of it is shown."""

    operations: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    """Open operations by (kind, state, phase)."""
    host: HostState | None = None
    broker_up: bool | None = None
    hypervisor_up: bool | None = None
    outbox_rows: int | None = None
    """Notifications that wait for the broker."""
    inbox_rows: int | None = None
    """Casts that are kept and not yet accepted or refused."""
    journal_bytes: int | None = None
    migrations: Sequence[tuple[str, Mapping[str, float | int | str]]] = ()
    """Live migrations that go on from here: instance, and what the last report said of it."""
    downtimes: tuple[Sequence[tuple[str, float]], float] | None = None
    """How long guests stood still: how many at most as long as each bound, and the sum of all in seconds."""


MetricsSource = Callable[[], Snapshot]
"""Asked at each scrape, from a thread of the server; takes milliseconds and asks nobody outside the process."""


class Observer(Protocol):
    """Told of what happens; each call takes microseconds and never raises."""

    def operation_finished(self, kind: str, state: str, seconds: float) -> None:
        """An operation ended; ``seconds`` since it was accepted."""

    def journal_commit(self, seconds: float) -> None:
        """A commit of the journal is on disk."""

    def notification_sent(self, event_type: str) -> None:
        """The broker confirmed a notification."""


class NullObserver:
    """Metrics are off."""

    def operation_finished(self, kind: str, state: str, seconds: float) -> None:
        """Not counted."""

    def journal_commit(self, seconds: float) -> None:
        """Not counted."""

    def notification_sent(self, event_type: str) -> None:
        """Not counted."""


class Metrics:
    """An :class:`Observer` that counts, and the text that Prometheus reads. A registry of its own: several hosts live
    in one process.

    :param source: asked at each scrape.
    """

    def __init__(self, source: MetricsSource, version: str) -> None:
        import prometheus_client
        from prometheus_client import CollectorRegistry, Histogram, Info, ProcessCollector

        self._registry: CollectorRegistry = CollectorRegistry()
        self._finished = Histogram(
            f"{PREFIX}_operation_duration_seconds",
            "Operations that ended, by kind and final state, from acceptance to end.",
            ["kind", "state"],
            buckets=_OPERATION_BUCKETS,
            registry=self._registry,
        )
        self._commits = Histogram(
            f"{PREFIX}_journal_commit_seconds",
            "Commits of the journal, until they are on disk.",
            buckets=_COMMIT_BUCKETS,
            registry=self._registry,
        )
        self._notifications = prometheus_client.Counter(
            f"{PREFIX}_notifications_sent",
            "Notifications that the broker confirmed, by their last word.",
            ["event"],
            registry=self._registry,
        )
        Info(PREFIX, "The release that runs.", registry=self._registry).info({"version": version})
        ProcessCollector(registry=self._registry)
        self._registry.register(_Collector(source))

    def operation_finished(self, kind: str, state: str, seconds: float) -> None:
        """Count it and its duration."""
        self._finished.labels(kind, state).observe(max(0.0, seconds))

    def journal_commit(self, seconds: float) -> None:
        """Count it and its duration."""
        self._commits.observe(seconds)

    def notification_sent(self, event_type: str) -> None:
        """Count it."""
        self._notifications.labels(event_type.rsplit(".", 1)[-1]).inc()

    def text(self) -> tuple[bytes, str]:
        """Everything in Prometheus's text format, and its content type."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, source: MetricsSource) -> None:
        self._source = source

    def describe(self) -> list[Any]:
        # Without it, registering would ask the source before the worker has started.
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        now = self._source()
        operations = GaugeMetricFamily(
            f"{PREFIX}_operations", "Open operations.", labels=["kind", "state", "phase"]
        )
        for (kind, state, phase), count in now.operations.items():
            operations.add_metric([kind, state, phase], count)
        yield operations
        for name, text, value in _plain(now):
            if value is not None:
                yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=float(value))
        if now.host is not None:
            yield from _resources(now.host)
        yield from _migrations(now)


_OF_A_MIGRATION = (
    ("memory_total", "memory_total_bytes", "memory of the guest"),
    ("memory_processed", "memory_processed_bytes", "memory that was sent"),
    ("memory_remaining", "memory_remaining_bytes", "memory that is left to send"),
    ("memory_rate", "memory_rate_bytes", "memory sent in a second"),
    ("memory_dirty_rate", "memory_dirty_rate_bytes", "memory that the guest writes in a second"),
    ("disk_total", "disk_total_bytes", "disks that travel"),
    ("disk_processed", "disk_processed_bytes", "of the disks that was sent"),
    ("disk_remaining", "disk_remaining_bytes", "of the disks that is left to send"),
    ("disk_rate", "disk_rate_bytes", "of the disks sent in a second"),
    ("iteration", "iteration", "passes over the guest's memory"),
    ("throttle", "throttle_percent", "how far the guest is slowed down"),
    ("expected_downtime", "expected_downtime_seconds", "how long the guest would stand still now"),
    ("elapsed", "elapsed_seconds", "how long it has taken"),
)


def _migrations(now: Snapshot) -> Iterator[Any]:
    """One series for each guest that is under way: it ends with the migration."""
    from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily

    statuses = GaugeMetricFamily(
        f"{PREFIX}_live_migrations", "Live migrations that go on from here, by status.", labels=["status"]
    )
    for status, count in sorted(Counter(str(d.get("status", "preparing")) for _, d in now.migrations).items()):
        statuses.add_metric([status], count)
    yield statuses
    for key, name, text in _OF_A_MIGRATION:
        known = [(instance, detail[key]) for instance, detail in now.migrations if key in detail]
        if known:
            about = f"Of a live migration that goes on: {text}."
            family = GaugeMetricFamily(f"{PREFIX}_live_migration_{name}", about, labels=["instance"])
            for instance, value in known:
                family.add_metric([instance], float(value))
            yield family
    if now.downtimes is not None:
        buckets, total = now.downtimes
        yield HistogramMetricFamily(
            f"{PREFIX}_live_migration_downtime_seconds",
            "How long guests stood still when they were switched over to another host, as the hypervisor measured it.",
            buckets=list(buckets),
            sum_value=total,
        )


def _plain(now: Snapshot) -> list[tuple[str, str, float | None]]:
    host = now.host
    return [
        ("broker_up", "Whether the broker can be reached.", now.broker_up),
        ("hypervisor_up", "Whether the hypervisor answers.", now.hypervisor_up),
        ("outbox_notifications", "Notifications that wait for the broker.", now.outbox_rows),
        ("inbox_messages", "Casts that are kept and not yet accepted or refused.", now.inbox_rows),
        ("journal_bytes", "Size of the journal's files.", now.journal_bytes),
        ("instances", "Instances of this host.", host.instances if host else None),
        ("enabled", "Whether the host takes new instances.", host.enabled if host else None),
        ("start_time_seconds", "When the worker started, since the epoch.", host.started_at if host else None),
    ]


def _resources(host: HostState) -> Iterator[Any]:
    from prometheus_client.core import GaugeMetricFamily

    parts: dict[str, Callable[[Capacity], float]] = {
        "total": lambda c: c.total,
        "usable": lambda c: c.usable,
        "claimed": lambda c: c.used,
    }
    for part, read in parts.items():
        family = GaugeMetricFamily(
            f"{PREFIX}_resource_{part}", f"Resources of the host: {part}; GiB, MiB or processors.", labels=["resource"]
        )
        for name in ("vcpus", "memory_mb", "disk_gb"):
            family.add_metric([name], read(getattr(host, name)))
        yield family
