"""The worker as its own process, ``python -m compute_worker.cmd.worker`` with the fake driver, on a real broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.rabbit import free_ports
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


class Daemon:
    """One host. Start it again on what it left, with other options if need be.

    :param prefix: a program that runs it, with arguments: strace.
    """

    def __init__(self, url: str, directory: Path, host: str, prefix: Sequence[str] = ()) -> None:
        self.host = host
        self.directory = directory
        self.images = directory / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        (self.images / "img").write_bytes(b"root file system")
        self.log_path = directory / "log"
        self.port = free_ports(1)[0]
        self.environment: dict[str, str] = {}
        self._prefix = list(prefix)
        self._options: dict[str, dict[str, Any]] = {
            "DEFAULT": {"transport_url": url},
            "compute": {
                "host": host,
                "state_path": directory / "state",
                "compute_driver": "fake",
                "graceful_shutdown_timeout": 5,
            },
            "images": {"file_path": self.images},
            "telemetry": {"port": self.port, "log_format": "json", "notification_topic": f"told_{host}"},
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def topic(self) -> str:
        """Where its notifications go."""
        return f"told_{self.host}"

    def configure(self, group: str, **options: Any) -> None:
        """Options from the next start on."""
        self._options.setdefault(group, {}).update(options)

    def start(self, ready: bool = True) -> None:
        """Start it; with ``ready``, until it takes commands."""
        lines: list[str] = []
        for group, values in self._options.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in values.items())]
        config = self.directory / "worker.conf"
        config.write_text("\n".join(lines))
        argv = [*self._prefix, sys.executable, "-m", "compute_worker.cmd.worker", "--config-file", str(config)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env={**os.environ, **self.environment}, stdout=log, stderr=log
            )
        if ready:
            self.wait_ready()

    def wait_ready(self, deadline: float = 30) -> None:
        wait_for(self.well, deadline, f"worker {self.host} to be well ({self.log_path})")

    def well(self) -> bool:
        health = self.health()
        return health is not None and health["status"] == "ok"

    def health(self) -> dict[str, Any] | None:
        """What ``/healthz`` says; ``None``: nobody answers."""
        try:
            return dict(json.loads(self.get("healthz")))
        except urllib.error.HTTPError as exc:
            return dict(json.load(exc))
        except OSError:
            return None

    def get(self, page: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{page}", timeout=5) as answer:
            return str(answer.read().decode())

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)

    def stop(self, deadline: float = 20) -> int:
        """SIGTERM; its exit status."""
        return self._signal(signal.SIGTERM, deadline)

    def _signal(self, number: int, deadline: float = 20) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(deadline)

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def log(self) -> str:
        return self.log_path.read_text()

    def entries(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
