"""What the benchmarks share: a private broker, a worker process that is measured from outside, a table at the end."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))

from compute_worker.threads import use_threads  # noqa: E402

use_threads()

from compute_worker.objects import Flavor, ImageMeta, Instance, Vif  # noqa: E402
from tests.lab.rabbit import BIN, Rabbit  # noqa: E402
from tests.waiting import wait_for  # noqa: E402

HOST = "bench"
IMAGE = "tiny"
TICKS = os.sysconf("SC_CLK_TCK")


class CannotRun(Exception):
    """This machine lacks what the benchmark needs; says what."""


# --- results --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table. ``good``: whether a goal was met; ``None``: there is none."""

    what: str
    value: str
    goal: str = ""
    good: bool | None = None


@dataclass
class Report:
    """Rows for people, ``figures`` for programs."""

    name: str
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, value: str, goal: str = "", good: bool | None = None, **figures: Any) -> None:
        """One row, and its figures under their own names."""
        self.rows.append(Row(what, value, goal, good))
        self.figures.update(figures)

    def text(self) -> str:
        """The table, with the machine it was measured on."""
        width = max((len(row.what) for row in self.rows), default=0)
        wide = max((len(row.value) for row in self.rows), default=0)
        lines = [f"{self.name}  ({machine()})"]
        for row in self.rows:
            verdict = "" if row.good is None else ("met" if row.good else "MISSED")
            goal = f"goal {row.goal}  {verdict}" if row.goal else verdict
            lines.append(f"  {row.what:<{width}}  {row.value:<{wide}}  {goal}".rstrip())
        return "\n".join(lines)

    def as_json(self) -> str:
        """Everything, as one JSON object."""
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"benchmark": self.name, "machine": machine(), "rows": rows, "figures": self.figures})


def machine() -> str:
    """Date, processors, load and versions: without them no figure means anything."""
    load = os.getloadavg()[0]
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return f"{today}, {os.cpu_count()} CPUs, load {load:.1f}, Python {platform.python_version()}, {platform.release()}"


def arguments(description: str, **numbers: int | float | str) -> argparse.ArgumentParser:
    """A parser with ``--json`` and one option for each number, with its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(%(default)s)")
    return parser


def add_queue(parser: argparse.ArgumentParser) -> None:
    """``--queue``: the type of durable queue that commands and notifications go through."""
    parser.add_argument("--queue", choices=("classic", "quorum"), default="classic", help="(%(default)s)")


def finish(report: Report, as_json: bool, failed: bool = False) -> int:
    """Print the report. A missed goal is a figure, not a failure: exit status 1 is for what must never be."""
    print(report.as_json() if as_json else report.text(), flush=True)
    return 1 if failed else 0


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of ``values`` lie, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return percentile(values, 0.5)


# --- surroundings ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A directory with a short path, on a disk, removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="cwb-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def broker(directory: Path) -> Iterator[Rabbit]:
    """A private RabbitMQ on 127.0.0.1, with a virtual host for each type of queue: names cannot be shared by types.

    :raises CannotRun: RabbitMQ is not installed.
    """
    if not (BIN / "rabbitmq-server").exists():
        raise CannotRun("RabbitMQ is not installed (rabbitmq-server)")
    rabbit = Rabbit.local(directory / "mq")
    try:
        rabbit.up(vhosts=("lab", "classic", "quorum"))
        yield rabbit
    finally:
        rabbit.down()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tiny_instance(number: int = 0, **changes: Any) -> Instance:
    """An instance that the simulated host boots: one interface, as small as may be."""
    fields: dict[str, Any] = {
        "uuid": str(uuid.uuid4()),
        "name": f"vm{number}",
        "flavor": Flavor(vcpus=1, memory_mb=64, root_gb=1),
        "image": ImageMeta(id=IMAGE, disk_format="raw"),
        "vifs": [Vif(id=str(uuid.uuid4()), mac="52:54:00:00:00:01", bridge="br0")],
    }
    return Instance(**(fields | changes))


# --- a worker process -----------------------------------------------------------------------------------------------


class Readiness:
    """The socket that systemd would have: tells when a worker said READY=1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def wait(self, timeout: float = 30.0) -> None:
        """Until READY=1 comes; earlier ones are forgotten by :meth:`drain`."""
        self._socket.settimeout(timeout)
        while b"READY=1" not in self._socket.recv(4096):
            continue

    def drain(self) -> None:
        """Forget what was said."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(4096)

    def close(self) -> None:
        """Remove it."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


class WorkerProcess:
    """``compute-worker`` on the fake driver as a process of its own, with files that outlive it."""

    def __init__(self, directory: Path, url: str, quorum: bool = False, **groups: Mapping[str, Any]) -> None:
        self.directory = directory
        self.port = free_port()
        self.state = directory / "state"
        self.log = directory / "worker.log"
        images = directory / "images"
        images.mkdir(parents=True, exist_ok=True)
        (images / IMAGE).write_bytes(b"a root file system of few bytes")
        self.config = directory / "worker.conf"
        self.config.write_text(self._configuration(url, images, quorum, groups))
        self.readiness = Readiness(directory / "notify")
        self._popen: subprocess.Popen[bytes] | None = None

    def _configuration(self, url: str, images: Path, quorum: bool, groups: Mapping[str, Mapping[str, Any]]) -> str:
        options: dict[str, dict[str, Any]] = {
            "DEFAULT": {"transport_url": url},
            "compute": {"host": HOST, "state_path": self.state, "compute_driver": "fake"},
            "images": {"file_path": images},
            "fake": {"vcpus": 65_536, "memory_mb": 16_777_216, "disk_gb": 1_000_000},
            "telemetry": {"port": self.port},
            "oslo_messaging_rabbit": {"rabbit_quorum_queue": quorum},
        }
        for group, changed in groups.items():
            options.setdefault(group, {}).update(changed)
        lines = []
        for group, values in options.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in values.items())]
        return "\n".join(lines) + "\n"

    def start(self) -> None:
        """Start it and return at once."""
        argv = [sys.executable, "-m", "compute_worker.cmd.worker", "--config-file", str(self.config)]
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.readiness.path), "PYTHONPATH": str(REPOSITORY)}
        self.readiness.drain()
        with open(self.log, "ab") as output:
            self._popen = subprocess.Popen(argv, stdout=output, stderr=output, env=environment)

    def wait_healthy(self, deadline: float = 30.0) -> None:
        """Until /healthz says 200."""
        wait_for(self.healthy, deadline, f"the worker to be healthy (see {self.log})")

    def healthy(self) -> bool:
        """Whether /healthz says 200 now."""
        if self.process.poll() is not None:
            raise AssertionError(f"the worker has ended with {self.process.returncode}: {self.tail()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.HTTPError, OSError):
            return False

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that runs, or ran last."""
        assert self._popen is not None, "the worker was never started"
        return self._popen

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self, timeout: float = 40.0) -> None:
        """SIGTERM; SIGKILL when it does not go."""
        if self._popen is None or self._popen.poll() is not None:
            return
        self._popen.terminate()
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def close(self) -> None:
        """Stop it and give back what it needs."""
        self.stop()
        self.readiness.close()

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def worker(directory: Path, url: str, quorum: bool = False, **groups: Mapping[str, Any]) -> Iterator[WorkerProcess]:
    """A worker that is healthy; ended afterwards."""
    process = WorkerProcess(directory, url, quorum, **groups)
    try:
        process.start()
        process.wait_healthy()
        yield process
    finally:
        process.close()


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all its threads, those that ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def wait_until_quiet(pid: int) -> None:
    """Until a process has nothing left to do: a third of a second in which it uses no more than one tick."""

    def quiet() -> bool:
        before = cpu_seconds(pid)
        pause(0.3)
        return cpu_seconds(pid) - before < 1.5 / TICKS

    wait_for(quiet, 60, f"process {pid} to be at rest")


def rss_mib(pid: int) -> float:
    """Resident memory in MiB."""
    return _status(pid, "VmRSS") / 1024


def threads(pid: int) -> int:
    """How many threads it has."""
    return _status(pid, "Threads")


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def pause(seconds: float) -> None:
    """Let time pass: only where time itself is what is measured."""
    time.sleep(seconds)


def run(main: Any, argv: Sequence[str] | None = None) -> int:
    """Call a benchmark's ``main``; what the machine lacks is said, and is no failure."""
    try:
        return int(main(sys.argv[1:] if argv is None else argv))
    except CannotRun as exc:
        print(f"not run: {exc}", flush=True)
        return 0
