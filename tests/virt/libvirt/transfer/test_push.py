"""What is flushed by whom before it counts; real connections are in ``test_over_nbd``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from compute_worker.virt.libvirt.transfer.nbd import HEADER, ConnectionLost
from compute_worker.virt.libvirt.transfer.pace import Pace
from compute_worker.virt.libvirt.transfer.push import Push
from tests.virt.jobs import RecordingJob

WINDOW = 8


class Server:
    """What all its connections wrote, and the windows of it that a flush has brought to the disk."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.lock = threading.Lock()
        self.opened = 0
        self.settled: set[int] = set()
        self.flushed: set[int] = set()

    def connect(self) -> Any:
        return FakeConnection(self)


class FakeConnection:
    def __init__(self, server: Server) -> None:
        self._server = server
        self._written: set[int] = set()

    def open(self) -> None:
        self._server.opened += 1

    def write(self, buffer: memoryview, offset: int) -> None:
        self._fail("write")
        assert bytes(buffer[HEADER.size :]) == bytes([offset // WINDOW]) * WINDOW
        self._written.add(offset // WINDOW)

    def settle(self) -> None:
        with self._server.lock:
            self._server.settled |= self._written

    def flush(self) -> None:
        self._fail("flush")
        with self._server.lock:
            self._server.flushed |= self._server.settled

    def abort(self) -> None:
        return None

    close = abort

    def _fail(self, what: str) -> None:
        if self._server.broken == what:
            raise ConnectionLost(f"lost in {what}")


class Numbered:
    """A disk whose windows are full of their own numbers."""

    def extents(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        yield begin, end

    def zeros(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        return iter(())

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = bytes([offset // WINDOW]) * len(buffer)

    def close(self) -> None:
        return None


def push(server: Server, numbers: list[int], streams: int) -> list[int]:
    """Send these windows; those that were recorded."""
    recorded: list[int] = []

    def record(done: list[int]) -> None:
        assert set(done) <= server.flushed, "a window counts before it is on the destination's disk"
        recorded.extend(done)

    run = Push(
        numbers, window=WINDOW, size=WINDOW * 100, streams=streams, pace=Pace(0), connect=server.connect,
        reader=Numbered,
    )  # fmt: skip
    run.run(RecordingJob(), record, lambda sent: None)
    assert run.sent == WINDOW * len(numbers)
    return recorded


@pytest.mark.parametrize(
    ("numbers", "streams", "connections"),
    [([], 4, 0), ([7], 4, 1), ([7], 1, 1), ([3, 7], 4, 3), (list(range(40)), 4, 5), (list(range(40)), 1, 2)],
)
def test_every_window_is_flushed_and_then_recorded(numbers: list[int], streams: int, connections: int) -> None:
    """By a connection of its own; a single window by the one that sent it: each handshake keeps a guest off."""
    server = Server()
    assert sorted(push(server, numbers, streams)) == numbers
    assert (server.opened, server.flushed) == (connections, set(numbers))


@pytest.mark.parametrize("numbers", [[7], [3, 7]])
@pytest.mark.parametrize("broken", ["write", "flush"])
def test_what_fails_is_raised_and_nothing_counts(numbers: list[int], broken: str) -> None:
    server = Server(broken)
    with pytest.raises(ConnectionLost, match=f"lost in {broken}"):
        push(server, numbers, 4)
    assert server.flushed == set()
