"""What a worker tells about itself, put together for the daemon: logs, metrics, health, notifications, systemd."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Protocol

from oslo_config import cfg

from compute_worker.config import Settings
from compute_worker.objects import HostState
from compute_worker.operations.database import Closed, Database
from compute_worker.operations.outbox import Outbox
from compute_worker.operations.schema import OPEN_SQL
from compute_worker.telemetry import logs
from compute_worker.telemetry.endpoint import Endpoint, Health
from compute_worker.telemetry.metrics import Metrics, NullObserver, Observer, Snapshot
from compute_worker.telemetry.notifications import MessagingNotifier, Notifier
from compute_worker.telemetry.redaction import Redactor, passwords_of
from compute_worker.telemetry.sender import OutboxSender
from compute_worker.telemetry.systemd import SystemdNotifier, Watchdog
from compute_worker.version import worker_version

LOG = logging.getLogger(__name__)


class Observed(Protocol):
    """What of a worker is looked at."""

    database: Database
    outbox: Outbox

    def host_state(self) -> HostState:
        """The host as callers see it."""

    def problems(self) -> dict[str, str]:
        """What keeps it from working: ``broker``, ``hypervisor``."""

    def migrations(self) -> dict[str, Any]:
        """What :class:`~compute_worker.telemetry.metrics.Snapshot` says of live migrations."""


class _OfWorker:
    def __init__(self, worker: Any) -> None:
        self.database: Database = worker.manager.database
        self.outbox: Outbox = worker.manager.operations.outbox
        self.host_state: Callable[[], HostState] = worker.host_state
        self.problems: Callable[[], dict[str, str]] = worker.problems
        self.migrations: Callable[[], dict[str, Any]] = worker.manager.live_figures


class Telemetry:
    """Made before the worker, which is given :meth:`operation_finished` and :meth:`journal_commit`; started after it.

    Makes logging work at once: what goes wrong while the worker is made is in the log.

    :param conf: where oslo.log and oslo.messaging find their options.
    :param notifier: default: oslo.messaging with ``[oslo_messaging_notifications] transport_url`` or ``[DEFAULT]``'s.
    :raises Broken: the port of ``[telemetry]`` is taken.
    """

    def __init__(
        self, settings: Settings, conf: cfg.ConfigOpts = cfg.CONF, notifier: Callable[[], Notifier] | None = None
    ) -> None:
        self._settings = settings
        self._conf = conf
        self._redact = Redactor(_passwords(conf))
        logs.setup(conf, settings.telemetry.log_format, settings.host, self._redact)
        self._make_notifier = notifier or self._messaging
        self._worker: Observed | None = None
        self._systemd = SystemdNotifier()
        self._watchdog = Watchdog(self._systemd, self._alive)
        self._sender: OutboxSender | None = None
        self._observer: Observer = NullObserver()
        self._endpoint: Endpoint | None = None
        if settings.telemetry.port >= 0:
            metrics = Metrics(self._snapshot, worker_version())
            self._observer = metrics
            checks = {name: self._check(name) for name in ("broker", "hypervisor", "journal", "notifications")}
            health = Health(settings.host, checks, self._redact)
            self._endpoint = Endpoint(settings.telemetry.listen, settings.telemetry.port, health, metrics.text)

    @property
    def port(self) -> int | None:
        """Where ``/metrics`` and ``/healthz`` are; ``None``: nowhere."""
        return self._endpoint.port if self._endpoint else None

    def operation_finished(self, kind: str, state: str, seconds: float) -> None:
        """An operation ended."""
        self._observer.operation_finished(kind, state, seconds)

    def journal_commit(self, seconds: float) -> None:
        """A commit is on disk."""
        self._observer.journal_commit(seconds)

    def start(self, worker: Any) -> None:
        """``worker`` (a :class:`compute_worker.worker.Worker`) takes commands: tell of it from now on."""
        observed = self._worker = _OfWorker(worker)
        self._sender = OutboxSender(
            observed.outbox,
            self._make_notifier(),
            observed.database.journal_id,
            host_state=observed.host_state,
            host_state_interval=self._settings.telemetry.host_state_interval,
            on_sent=self._observer.notification_sent,
        )
        self._sender.start()
        if self._endpoint:
            self._endpoint.start()
            LOG.info("metrics and health on %s port %d", self._settings.telemetry.listen, self._endpoint.port)
        self._systemd.ready(f"takes commands as {self._settings.host}")
        self._watchdog.start()

    def stopping(self) -> None:
        """The worker was asked to end. Metrics, notifications and the watchdog go on until :meth:`stop`."""
        self._systemd.stopping(self._settings.compute.graceful_shutdown_timeout + 15)

    def stop(self, timeout: float = 5.0) -> None:
        """End within ``timeout`` seconds and one. Notifications that were not sent stay in the outbox."""
        self._watchdog.stop()
        if self._endpoint:
            self._endpoint.stop()
        if self._sender:
            self._sender.stop(timeout)

    def _messaging(self) -> Notifier:
        import oslo_messaging

        transport = oslo_messaging.get_notification_transport(self._conf)
        return MessagingNotifier(transport, self._settings.host, self._settings.telemetry.notification_topic)

    def _alive(self) -> bool:
        """Whether the journal answers; it hangs here when it does not."""
        return self._journal_problem() is None

    def _check(self, name: str) -> Callable[[], str | None]:
        def check() -> str | None:
            if self._worker is None:
                return "the worker has not started yet"
            if name == "journal":
                return self._journal_problem()
            if name == "notifications":
                return self._sender.failing if self._sender else None
            return self._worker.problems().get(name)

        return check

    def _journal_problem(self) -> str | None:
        if self._worker is None:
            return None
        try:
            # A row of the file: a statement without a table would not touch it.
            self._worker.database.read(lambda tx: tx.execute("SELECT last FROM sequence").fetchone())
        except Closed:
            return None
        except Exception as exc:
            return str(exc)
        return None

    def _snapshot(self) -> Snapshot:
        if self._worker is None:
            return Snapshot()
        problems = self._worker.problems()
        up: dict[str, Any] = {"broker_up": "broker" not in problems, "hypervisor_up": "hypervisor" not in problems}
        try:
            now = {**_of_journal(self._worker.database), **self._worker.migrations()}
            return Snapshot(host=self._worker.host_state(), **up, **now)
        except Closed:
            return Snapshot(**up)


def _of_journal(database: Database) -> dict[str, Any]:
    def look(tx: Any) -> dict[str, Any]:
        grouped = f"SELECT kind, state, phase, count(*) FROM operations WHERE {OPEN_SQL} GROUP BY 1, 2, 3"
        return {
            "operations": {(str(r[0]), str(r[1]), str(r[2])): int(r[3]) for r in tx.execute(grouped)},
            "outbox_rows": int(tx.execute("SELECT count(*) FROM outbox").fetchone()[0]),
            "inbox_rows": int(tx.execute("SELECT count(*) FROM inbox").fetchone()[0]),
        }

    files = [database.path, database.path.with_name(f"{database.path.name}-wal")]
    size = sum(os.stat(file).st_size for file in files if file.exists())
    return {**database.read(look), "journal_bytes": size}


def _passwords(conf: cfg.ConfigOpts) -> list[str]:
    urls = [getattr(conf, "transport_url", None)]
    if "oslo_messaging_notifications" in conf:
        urls.append(conf.oslo_messaging_notifications.transport_url)
    return [password for url in urls for password in passwords_of(url)]
