"""What is on disk before what is told, seen in the system calls of a worker (``protocol.md`` 16).

Killing processes loses no page cache, a power failure does: only the order of the calls shows that nothing depends on
it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.functional.conftest import rabbit  # noqa: F401 - a fixture
from tests.functional.daemon import Daemon
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for

CALLS = "fsync,fdatasync,write,pwrite64,sendto,recvfrom,rename,renameat,renameat2,unlink,unlinkat,mkdir,rmdir"
ACK = "\x00\x00\x00\x0d\x00\x3c\x00\x50"
"""Length, class and method of AMQP's basic.ack."""
UUID = "12345678-0000-4000-8000-000000000001"
"""The instance of write_records."""

pytestmark = pytest.mark.skipif(
    shutil.which("strace") is None and not os.environ.get("CI"), reason="strace is not installed"
)


@dataclass(frozen=True)
class Call:
    """One system call: its name, what strace says of its arguments, and where it began and ended in the trace."""

    name: str
    text: str
    began: int
    ended: int

    @property
    def ok(self) -> bool:
        return "= -1 " not in self.text


_LINE = re.compile(r"(?P<pid>\d+) +(?P<rest>.*)")
_BYTE = re.compile(r"\\x([0-9a-f]{2})")
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)")


def read(trace: Path) -> list[Call]:
    """The calls in order of their end. One that was interrupted by another thread's is put together again."""
    calls: list[Call] = []
    open_: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(trace.read_text(errors="replace").splitlines()):
        match = _LINE.match(line)
        if match is None:
            continue
        pid, rest = match["pid"], match["rest"]
        if rest.endswith("<unfinished ...>"):
            open_[pid] = (number, rest.removesuffix("<unfinished ...>"))
            continue
        resumed = _RESUMED.match(rest)
        began = number
        if resumed is not None:
            began, head = open_.pop(pid, (number, resumed["name"] + "("))
            rest = head + resumed["rest"]
        name, bracket, _ = rest.partition("(")
        if bracket:
            text = _BYTE.sub(lambda found: chr(int(found[1], 16)), rest)
            calls.append(Call(name, text, began, number))
    return calls


def first(calls: list[Call], names: tuple[str, ...], *parts: str, after: int = -1) -> Call:
    """The first successful call of one of ``names`` that began after line ``after`` and has all ``parts``."""
    for call in calls:
        if call.name in names and call.began > after and call.ok and all(part in call.text for part in parts):
            return call
    raise AssertionError(f"no {names} with {[part[:80] for part in parts]} after line {after}")


# --- the journal, the broker and the caller ---------------------------------------------------------------------------


@pytest.fixture
def traced(rabbit: Rabbit, tmp_path: Path) -> Iterator[tuple[Daemon, ComputeAPI, Path]]:  # noqa: F811
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "--seccomp-bpf", "-yy", "-xx", "-s", "100000", "-e", f"trace={CALLS}", "-o", str(trace)]
    daemon = Daemon(rabbit.url(), tmp_path, f"traced-{uuid.uuid4().hex[:6]}", strace)
    transport = get_transport(rabbit.url())
    daemon.start()
    children = child_of(daemon)
    yield daemon, ComputeAPI(transport, timeout=30), trace
    transport.cleanup()
    for child in children:
        # strace that is killed lets its child live.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
    daemon.close()


def child_of(daemon: Daemon) -> list[int]:
    """The worker that strace runs."""
    assert daemon.process is not None
    path = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def end(daemon: Daemon, trace: Path) -> list[Call]:
    """The trace, once the worker has ended."""
    # strace passes a signal on to nobody: its child is the worker.
    assert daemon.process is not None
    os.kill(child_of(daemon)[0], 15)
    daemon.process.wait(30)
    return read(trace)


@pytest.mark.functional
def test_a_cast_is_on_disk_before_it_is_acknowledged_and_a_call_before_it_is_answered(
    traced: tuple[Daemon, ComputeAPI, Path],
) -> None:
    daemon, api, trace = traced
    cast, call = str(uuid.uuid4()), str(uuid.uuid4())
    api.disable_host("cast", operation=cast, host=daemon.host, cast=True)
    wait_for(lambda: not api.get_host_state(host=daemon.host).enabled, what="the cast to be done")
    api.disable_host("call", operation=call, host=daemon.host)
    calls = end(daemon, trace)

    came = first(calls, ("recvfrom",), cast)
    stored = first(calls, ("pwrite64",), "journal.sqlite-wal", cast, after=came.ended)
    synced = first(calls, ("fdatasync", "fsync"), "journal.sqlite-wal", after=stored.ended)
    acknowledged = first(calls, ("sendto",), "TCP", ACK, after=came.ended)
    assert acknowledged.began > synced.ended

    came = first(calls, ("recvfrom",), call)
    stored = first(calls, ("pwrite64",), "journal.sqlite-wal", call, after=came.ended)
    synced = first(calls, ("fdatasync", "fsync"), "journal.sqlite-wal", after=stored.ended)
    answered = first(calls, ("sendto",), "TCP", call, after=came.ended)
    assert answered.began > synced.ended


# --- the files of an instance -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """The calls of an operation whose steps write, move and remove an instance's records."""
    directory = tmp_path_factory.mktemp("files")
    trace = directory / "trace"
    argv = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "100000", "-e", f"trace={CALLS}", "-o", str(trace)]
    root = Path(__file__).parents[2]
    subprocess.run(
        [*argv, sys.executable, "-m", "tests.operations.write_records", str(directory)],
        cwd=root, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return read(trace)


def recorded(calls: list[Call], step: str, after: int) -> Call:
    """The commit that says that ``step`` is done: the first of the journal that names the result of the step."""
    return first(calls, ("pwrite64",), "journal.sqlite-wal", f"result-of-{step}", after=after)


@pytest.mark.parametrize("name", ["disk.info", "instance.json"])
def test_a_record_is_whole_on_disk_before_it_has_its_name_and_before_the_step_is_done(
    files: list[Call], name: str
) -> None:
    rename = first(files, ("rename", "renameat", "renameat2"), f"{name}.part", f'{name}"')
    written = first(files, ("write",), f"{name}.part")
    synced = first(files, ("fsync", "fdatasync"), f"{name}.part", after=written.ended)
    assert synced.ended < rename.began
    directory = first(files, ("fsync",), f"/{UUID}>", after=rename.ended)
    assert recorded(files, "write", rename.ended).began > directory.ended


def test_a_new_directory_is_on_disk_before_the_step_is_done(files: list[Call]) -> None:
    made = first(files, ("mkdir",), UUID)
    assert recorded(files, "write", made.ended).began > first(files, ("fsync",), "instances>", after=made.ended).ended


def test_a_directory_set_aside_is_on_disk_before_the_step_is_done(files: list[Call]) -> None:
    moved = first(files, ("rename", "renameat", "renameat2"), f"{UUID}_resize")
    assert recorded(files, "move", moved.ended).began > first(files, ("fsync",), "instances>", after=moved.ended).ended


def test_a_removed_directory_is_gone_from_disk_before_the_step_is_done(files: list[Call]) -> None:
    removed = first(files, ("rmdir",), f"{UUID}_del")
    synced = first(files, ("fsync",), "instances>", after=removed.ended)
    assert recorded(files, "remove", removed.ended).began > synced.ended


def test_every_commit_of_the_journal_is_synced(files: list[Call]) -> None:
    writes = [call for call in files if call.name == "pwrite64" and "journal.sqlite-wal" in call.text]
    assert len(writes) > 4
    first(files, ("fdatasync", "fsync"), "journal.sqlite-wal", after=writes[-1].ended)
