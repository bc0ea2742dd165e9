"""Pieces in order from several readers at once, and from two disks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.virt.libvirt.snapshot.reading import (
    AHEAD,
    PARTS,
    STREAMS,
    Gathered,
    Merged,
    Reader,
    Unreadable,
    gather,
    read,
)
from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.extents import Extent
from compute_worker.virt.libvirt.transfer.nbd import ConnectionLost, Part
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.libvirt.transfer.test_extents import some
from tests.waiting import wait_for


class Memory:
    """A disk in memory. ``gate``: a read waits for it."""

    def __init__(self, content: bytes | bytearray, gate: threading.Event | None = None) -> None:
        self.content = content
        self.gate = gate
        self.read: list[Extent] = []
        self.aborted = threading.Event()
        self.closed = 0

    def read_parts(self, parts: Iterable[Part]) -> None:
        while self.gate is not None and not self.gate.wait(0.01):
            if self.aborted.is_set():
                raise ConnectionLost("aborted")
        for offset, buffer in parts:
            self.read.append((offset, offset + len(buffer)))
            buffer[:] = self.content[offset : offset + len(buffer)]

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.closed += 1


def test_pieces_come_in_their_order_and_few_are_ahead() -> None:
    disk = Memory(bytes(range(200)))
    pieces = [((at, at + 3), (at + 5, at + 6)) for at in range(0, 180, 4)]
    asked: list[Gathered] = []

    def given_out() -> Iterator[Gathered]:
        for piece in pieces:
            asked.append(piece)
            yield piece

    found = []
    for number, data in enumerate(read(given_out(), lambda: disk, RecordingJob())):
        found.append(bytes(data))
        assert len(asked) <= number + AHEAD
    assert found == [b"".join(disk.content[begin:end] for begin, end in piece) for piece in pieces]
    assert disk.closed == STREAMS


@given(data=some, most=st.integers(1, 9))
def test_scattered_data_are_gathered(data: list[Extent], most: int) -> None:
    pieces = list(gather(data, most))
    assert list(extents.merge(part for piece in pieces for part in piece)) == list(extents.merge(data))
    assert all(0 < extents.length(piece) <= most for piece in pieces)
    assert all(extents.length(piece) == most for piece in pieces[:-1])


def test_a_piece_has_not_too_many_parts() -> None:
    pieces = list(gather([(2 * at, 2 * at + 1) for at in range(PARTS + 3)]))
    assert [len(piece) for piece in pieces] == [PARTS, 3]


def test_nothing_to_read() -> None:
    assert list(read([], lambda: Memory(b""), RecordingJob())) == []


def test_cancelled_while_it_waits_for_the_disk() -> None:
    disk, job = Memory(bytes(100), threading.Event()), RecordingJob()
    thread, raised = in_thread(list, read([((0, 10),)], lambda: disk, job))
    wait_for(lambda: job.looks > 0, what="the first piece")
    job.cancel()
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)


def test_nobody_wants_the_rest() -> None:
    disk = Memory(bytes(1000))
    pieces = read([((at, at + 1),) for at in range(1000)], lambda: disk, RecordingJob())
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert len(disk.read) <= AHEAD and disk.closed == STREAMS


def test_a_disk_that_cannot_be_read_or_reached() -> None:
    class Bad(Memory):
        def read_parts(self, parts: Iterable[Part]) -> None:
            raise ConnectionLost("it is gone")

    def nobody() -> Reader:
        raise ConnectionLost("nobody listens")

    with pytest.raises(Unreadable, match="it is gone"):
        list(read([((0, 1),)], lambda: Bad(b"x"), RecordingJob()))
    with pytest.raises(Unreadable, match="nobody listens"):
        list(read([((0, 1),)], nobody, RecordingJob()))


@given(dirty=some, begin=st.integers(0, 40), count=st.integers(1, 10))
def test_each_byte_comes_from_the_disk_that_has_it(dirty: list[Extent], begin: int, count: int) -> None:
    now, parent = Memory(b"n" * 100), Memory(b"p" * 100)
    buffer = bytearray(count)
    half = count // 2
    view = memoryview(buffer)
    Merged(now, parent, dirty).read_parts([(begin, view[:half]), (begin + half, view[half:])])
    written = {at for first, last in dirty for at in range(first, last)}
    assert buffer == bytes(b"n"[0] if at in written else b"p"[0] for at in range(begin, begin + count))
    assert extents.length(now.read) + extents.length(parent.read) == count


def test_both_are_left() -> None:
    now, parent = Memory(b""), Memory(b"")
    both = Merged(now, parent, [])
    both.abort()
    both.close()
    assert now.aborted.is_set() and parent.aborted.is_set() and now.closed == parent.closed == 1
