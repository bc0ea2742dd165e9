"""A real worker process over RabbitMQ, with the fake driver."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


class Daemon:
    """`compute-worker` of one host; its state is under `directory`."""

    def __init__(self, url: str, directory: Path, host: str) -> None:
        self.host = host
        self.log = directory / f"{host}.log"
        images = directory / "images"
        images.mkdir(parents=True, exist_ok=True)
        config = directory / f"{host}.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"[DEFAULT]\ntransport_url = {url}\n"
            f"[compute]\nhost = {host}\nstate_path = {directory / host}\ncompute_driver = fake\n"
            f"[images]\nfile_path = {images}\n[telemetry]\nport = -1\n"
        )
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = [sys.executable, "-m", "compute_worker.cmd.worker", "--config-file", str(self.config)]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(program, stdout=output, stderr=output)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(30)
