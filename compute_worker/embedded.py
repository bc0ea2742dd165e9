"""Several hosts in one process: workers over the simulated host and the broker inside this process, nothing to install.

::

    with EmbeddedCell(["node1", "node2"], directory) as cell:
        accepted = cell.api.build_and_run_instance(instance, host="node1")
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from compute_worker.config import Settings
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from compute_worker.virt.driver import ComputeDriver
from compute_worker.worker import Worker

MEMORY_URL = "kombu+memory://"


def settings_for(host: str, directory: Path, **groups: dict[str, Any]) -> Settings:
    """Settings of one embedded host under ``directory``; ``groups`` changes options: ``compute={...}``."""
    base = Settings()
    changes: dict[str, dict[str, Any]] = {
        "compute": {"host": host, "state_path": str(directory / host), "compute_driver": "fake"},
        "rpc": {"exchange": f"compute_worker.{directory.name}"},
        "images": {"file_path": str(directory / "images")},
        "telemetry": {"port": -1},
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
    :param groups: options that every host gets: ``compute={"shutdown_timeout": 5.0}``.
    """

    def __init__(
        self,
        names: Iterable[str],
        directory: Path,
        *,
        driver: Callable[[Settings], ComputeDriver] | None = None,
        **groups: dict[str, Any],
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "images").mkdir(exist_ok=True)
        self.directory = directory
        self.settings = {name: settings_for(name, directory, **groups) for name in names}
        self.exchange = next(iter(self.settings.values())).rpc.exchange
        self._driver = driver
        self.transport = get_transport(f"{MEMORY_URL}/{uuid.uuid4()}", exchange=self.exchange)
        self.api = ComputeAPI(self.transport, exchange=self.exchange)
        self.workers: dict[str, Worker] = {}

    def start(self, name: str) -> Worker:
        """Start (or start again) the worker of a host."""
        settings = self.settings[name]
        worker = Worker(settings, self.transport, self._driver(settings) if self._driver else None)
        worker.start()
        self.workers[name] = worker
        return worker

    def stop(self, name: str) -> None:
        """End the worker of a host as SIGTERM does."""
        self.workers.pop(name).stop(5)

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
