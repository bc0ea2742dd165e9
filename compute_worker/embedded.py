"""Several hosts in one process: workers over the simulated host and the broker inside this process, nothing to install.

::

    with EmbeddedCell(["node1", "node2"], directory) as cell:
        accepted = cell.api.build_and_run_instance(instance, host="node1")
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from compute_worker.telemetry.notifications import MessagingNotifier
from compute_worker.telemetry.sender import OutboxSender
from compute_worker.virt.driver import ComputeDriver
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated.connection import Died
from compute_worker.worker import Worker

MEMORY_URL = "kombu+memory://"
LISTEN_SECONDS = 10.0


def settings_for(host: str, directory: Path, **groups: dict[str, Any]) -> Settings:
    """Settings of one embedded host under ``directory``; ``groups`` changes options: ``compute={...}``."""
    base = Settings()
    changes: dict[str, dict[str, Any]] = {
        "compute": {"host": host, "state_path": str(directory / host), "compute_driver": "fake"},
        "rpc": {"exchange": f"compute_worker.{directory.name}"},
        "images": {"file_path": str(directory / "images")},
        # Queues of the broker in this process have no virtual host: two cells must not share one.
        "telemetry": {"port": -1, "notification_topic": f"compute_notifications.{directory.name}"},
    }
    for group, options in groups.items():
        changes.setdefault(group, {}).update(options)
    return dataclasses.replace(
        base, **{g: dataclasses.replace(getattr(base, g), **options) for g, options in changes.items()}
    )


class EmbeddedCell:
    """Workers by host name, over one broker in memory. Use it as a context.

    :param directory: what the hosts keep; it outlives the cell, so that the same cell can be started on it again.
    :param driver: makes the driver of a host; default: the fake one, found by its entry point.
    :param url: of another broker, to measure with; default: the one in this process.
    :param groups: options that every host gets: ``compute={"shutdown_timeout": 5.0}``.
    """

    def __init__(
        self,
        names: Iterable[str],
        directory: Path,
        *,
        driver: Callable[[Settings], ComputeDriver] | None = None,
        url: str | None = None,
        **groups: dict[str, Any],
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "images").mkdir(exist_ok=True)
        self.directory = directory
        self.settings = {name: settings_for(name, directory, **groups) for name in names}
        self.exchange = next(iter(self.settings.values())).rpc.exchange
        self._driver = driver
        self.url = url or f"{MEMORY_URL}/{uuid.uuid4()}"
        self.transport = get_transport(self.url, exchange=self.exchange)
        self.api = ComputeAPI(self.transport, exchange=self.exchange)
        self.workers: dict[str, Worker] = {}
        self._senders: dict[str, OutboxSender] = {}

    def start(self, name: str) -> Worker:
        """Start (or start again) the worker of a host; it listens, and sends notifications, when this returns."""
        settings = self.settings[name]
        worker = Worker(settings, self.transport, self._driver(settings) if self._driver else None)
        worker.start()
        _until_listening(worker)
        self.workers[name] = worker
        self._senders[name] = self._sender(worker)
        self._senders[name].start()
        return worker

    def stop(self, name: str) -> None:
        """End the worker of a host as SIGTERM does."""
        self.workers.pop(name).stop(5)
        self._senders.pop(name).stop()

    def kill(self, name: str) -> None:
        """End the worker of a host as SIGKILL does: from now on nothing of it touches the hypervisor or the journal.

        What it was doing is left where it is; its threads end at the next thing they try. Only with the fake driver.
        """
        worker = self.workers.pop(name)
        manager, driver = worker.manager, worker.manager.core.driver
        assert isinstance(driver, FakeDriver), f"{driver} cannot be killed within a process"
        with _quiet_deaths():
            driver.die()
            manager.database.close()
            worker.server.stop_consuming()
            manager.operations.stop(5)
            manager.watch.stop()
            self._senders.pop(name).stop()

    def _sender(self, worker: Worker) -> OutboxSender:
        # A transport of its own: the sender closes it.
        transport = get_transport(self.url, exchange=self.exchange)
        notifier = MessagingNotifier(transport, worker.settings.host, worker.settings.telemetry.notification_topic)
        manager, telemetry = worker.manager, worker.settings.telemetry
        return OutboxSender(
            manager.operations.outbox,
            notifier,
            manager.database.journal_id,
            host_state=worker.host_state,
            host_state_interval=telemetry.host_state_interval,
        )

    def __enter__(self) -> EmbeddedCell:
        for name in self.settings:
            self.start(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.workers):
            self.stop(name)
        self.transport.cleanup()


def _until_listening(worker: Worker) -> None:
    """:raises PeerUnavailable: it does not come to listen."""
    deadline = time.monotonic() + LISTEN_SECONDS
    looked = threading.Event()
    while not worker.server.connected:
        if time.monotonic() > deadline:
            raise errors.PeerUnavailable(f"worker {worker.settings.host}: {worker.server.problem}")
        looked.wait(0.002)


@contextmanager
def _quiet_deaths() -> Iterator[None]:
    """While open, threads that end because their worker is dead say nothing."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, Died):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
