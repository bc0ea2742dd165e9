"""A compute worker process in a host, as its own unprivileged user."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab.namespaces import LabError, Process
from tests.lab.node import Node
from tests.lab.settings import WORKER_USER
from tests.waiting import wait_for

HEALTH_PORT = 9477
REPOSITORY = Path(__file__).resolve().parents[2]

ConfigValue = str | int | float | bool | Sequence[str]
Config = Mapping[str, Mapping[str, ConfigValue]]


def render_config(sections: Config) -> str:
    """An oslo.config file: lists joined by commas, "$" kept from being a substitution."""
    lines: list[str] = []
    for section, options in sections.items():
        lines.append(f"[{section}]")
        for name, value in options.items():
            lines.append(f"{name} = {_render_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _render_value(value: ConfigValue) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value) if isinstance(value, str | int | float) else ",".join(value)
    if "\n" in text:
        raise ValueError(f"a configuration value must be one line: {text!r}")
    return text.replace("$", "$$")


def merge_config(*layers: Config) -> dict[str, dict[str, ConfigValue]]:
    """Sections merged option by option; later layers win."""
    merged: dict[str, dict[str, ConfigValue]] = {}
    for layer in layers:
        for section, options in layer.items():
            merged.setdefault(section, {}).update(options)
    return merged


def python_paths(venv: Path) -> list[str]:
    """What an unprivileged user must reach to run the programs of a virtual environment.

    The environment itself, the interpreters its bin/python leads to (their prefixes), and this
    source tree.
    """
    paths = [str(venv), str(REPOSITORY)]
    hop = venv / "bin" / "python"
    while hop.is_symlink():
        hop = hop.parent / os.readlink(hop)
        paths.append(os.path.abspath(hop.parent.parent))
    return paths


class Worker:
    """One worker process; `start` again after its end is a restart with the same files."""

    def __init__(
        self,
        node: Node,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        health_port: int = HEALTH_PORT,
    ) -> None:
        self.node = node
        self.argv = tuple(argv)
        self.log = log
        self.env = {"PYTHONUNBUFFERED": "1", **(env or {})}
        self.health_port = health_port
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and return at once; its output is appended to `log`."""
        if self.running:
            raise LabError(f"the worker of {self.node.name} is running already")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as output:
            self._popen = self.node.ns.popen(
                self.argv, user=WORKER_USER, env=self.env, output=output
            )

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def process(self) -> Process:
        """The worker itself (not the nsenter around it); raises LabError when it has ended."""
        if self._popen is None:
            raise LabError(f"the worker of {self.node.name} was never started")
        found = wait_for(self._find_or_ended, 10.0, f"the worker of {self.node.name}")
        if found == "ended":
            raise LabError(f"the worker of {self.node.name} has ended: {self.tail()}")
        assert isinstance(found, Process)
        return found

    def _find_or_ended(self) -> Process | str | None:
        if not self.running:
            return "ended"
        assert self._popen is not None
        for process in self.node.ns.processes():
            if process.parent == self._popen.pid and process.argv[0] not in ("nsenter", "setpriv"):
                return process
        return None

    @property
    def pid(self) -> int:
        """Its pid as the machine sees it."""
        return self.process().pid

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()

    def terminate(self, deadline: float = 30.0) -> int:
        """SIGTERM; returns the exit status (negative: the signal that ended it)."""
        self.signal(signal.SIGTERM)
        return self.wait(deadline)

    def signal(self, number: int) -> None:
        self.process().signal(number)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT; nsenter stops with its child, so it is woken too."""
        assert self._popen is not None
        os.kill(self._popen.pid, signal.SIGCONT)
        self.signal(signal.SIGCONT)

    def wait(self, deadline: float = 30.0) -> int:
        """Its exit status, once it has ended; AssertionError after `deadline` seconds."""
        popen = self._popen
        assert popen is not None, "the worker was never started"
        # A frozen nsenter would never report the end of its child.
        if popen.poll() is None:
            os.kill(popen.pid, signal.SIGCONT)
        wait_for(lambda: popen.poll() is not None, deadline,
                 f"the end of the worker of {self.node.name}")
        return int(popen.returncode)

    def restart(self) -> None:
        """SIGKILL if it runs, then start."""
        if self.running:
            self.kill()
        self.start()

    def http(self, path: str = "/healthz", timeout: float = 5.0) -> tuple[int, str]:
        """GET from the worker's own port, inside its host: status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.health_port, timeout=timeout)
        sock = self.node.ns.socket()
        sock.settimeout(timeout)
        connection.sock = sock
        try:
            sock.connect(("127.0.0.1", self.health_port))
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()
            sock.close()

    def wait_ready(self, deadline: float = 20.0) -> None:
        """Until /healthz says 200; LabError with the log's tail when the worker ended instead."""

        def ready() -> bool:
            if not self.running:
                raise LabError(f"the worker of {self.node.name} has ended: {self.tail()}")
            try:
                return self.http()[0] == 200
            except (OSError, http.client.HTTPException):
                return False

        wait_for(ready, deadline, f"the worker of {self.node.name} to be ready")

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def default_command(config_file: str, program: str = "compute-worker") -> list[str]:
    """The worker of the virtual environment that runs this process."""
    return [str(Path(sys.prefix) / "bin" / program), "--config-file", config_file]
