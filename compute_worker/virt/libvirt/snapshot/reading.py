"""Reading a disk that stands still behind an NBD export: where its data is, and the data, in order, some ahead."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from compute_worker.virt.driver import Job
from compute_worker.virt.libvirt.transfer import extents, layer
from compute_worker.virt.libvirt.transfer.extents import Extent
from compute_worker.virt.libvirt.transfer.nbd import Connection, NbdError, Part

PIECE = 2 << 20
PARTS = 64
"""Extents that one piece is gathered from, at most: a disk's data is scattered in what may be 64 KiB each."""
STREAMS = 2
AHEAD = 8
"""Pieces that are read or wait for the store: 16 MiB in memory, whatever the disk's size."""
Gathered = tuple[Extent, ...]
"""What one piece holds, one after the other."""


class Unreadable(Exception):
    """The disk that stands still cannot be read (any more)."""


@dataclass(frozen=True, slots=True)
class Still:
    """A disk at a point in time: its size, what of it is not zeros, and what was written since the parent's point in
    time (``None``: there is no parent, or it is not known)."""

    size: int
    data: tuple[Extent, ...]
    dirty: tuple[Extent, ...] | None = None


class Reader(Protocol):
    """Reads parts of a disk; used by one thread, but for :meth:`abort`."""

    def read_parts(self, parts: Iterable[Part]) -> None:
        """Fill the buffers.

        :raises NbdError: it cannot be read.
        """

    def abort(self) -> None:
        """Whoever waits in :meth:`read_parts` leaves; from any thread."""

    def close(self) -> None:
        """Done with it."""


def look(connection: Connection, dirty: str = "") -> Still:
    """Open the connection (with its contexts) and ask it.

    :param dirty: the metadata context of what was written since the parent.
    :raises NbdError: no answer, or no such context.
    """
    connection.open()
    try:
        zeros = layer.zeros(connection)
        data = tuple(extents.subtract([(0, connection.size)], zeros))
        written = tuple(layer.spans(connection, dirty, lambda flags: flags == 1)) if dirty else None
        return Still(connection.size, data, written)
    finally:
        connection.close()


class Merged:
    """The disk of now, read where it was written since the parent's point in time; the rest from the parent."""

    def __init__(self, now: Reader, parent: Reader, dirty: Sequence[Extent]) -> None:
        self._now = now
        self._parent = parent
        self._dirty = dirty

    def read_parts(self, parts: Iterable[Part]) -> None:
        """Some from here, some from there."""
        now: list[Part] = []
        parent: list[Part] = []
        for offset, buffer in parts:
            end, at = offset + len(buffer), offset
            for first, last in layer.within(self._dirty, offset, end):
                parent.append((at, buffer[at - offset : first - offset]))
                now.append((first, buffer[first - offset : last - offset]))
                at = last
            parent.append((at, buffer[at - offset :]))
        for reader, some in ((self._parent, parent), (self._now, now)):
            reader.read_parts([part for part in some if len(part[1])])

    def abort(self) -> None:
        """Both."""
        self._now.abort()
        self._parent.abort()

    def close(self) -> None:
        """Both."""
        self._now.close()
        self._parent.close()


def gather(data: Iterable[Extent], most: int = PIECE) -> Iterator[Gathered]:
    """The same extents, in their order, as pieces of at most ``most`` bytes."""
    piece: list[Extent] = []
    room = most
    for begin, end in data:
        at = begin
        while at < end:
            last = min(end, at + room)
            piece.append((at, last))
            room -= last - at
            at = last
            if not room or len(piece) == PARTS:
                yield tuple(piece)
                piece, room = [], most
    if piece:
        yield tuple(piece)


def read(pieces: Iterable[Gathered], connect: Callable[[], Reader], job: Job) -> Iterator[bytearray]:
    """The bytes of ``pieces`` in their order, a few of them read ahead over several connections.

    :param connect: makes an open reader for one thread.
    :raises Unreadable: the disk cannot be read; says why.
    :raises Cancelled: every connection is closed.
    """
    readers: list[Reader] = []
    idle: queue.SimpleQueue[Reader] = queue.SimpleQueue()

    def fetch(piece: Gathered) -> bytearray:
        buffer = bytearray(extents.length(piece))
        reader = idle.get()
        try:
            reader.read_parts(_spread(piece, memoryview(buffer)))
        finally:
            idle.put(reader)
        return buffer

    def abort() -> None:
        for reader in readers:
            reader.abort()

    pool = ThreadPoolExecutor(STREAMS, "snapshot-read")
    waiting: deque[Future[bytearray]] = deque()
    try:
        with job.on_cancel(abort):
            for _ in range(STREAMS):
                readers.append(connect())
                idle.put(readers[-1])
            for piece in pieces:
                job.check()
                waiting.append(pool.submit(fetch, piece))
                if len(waiting) >= AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                job.check()
                yield waiting.popleft().result()
    except NbdError as exc:
        job.check()
        raise Unreadable(str(exc)) from None
    finally:
        for future in waiting:
            future.cancel()
        # Nobody waits for what is not wanted any more.
        abort()
        pool.shutdown()
        for reader in readers:
            with suppress(NbdError):
                reader.close()


def _spread(piece: Gathered, buffer: memoryview) -> Iterator[Part]:
    at = 0
    for begin, end in piece:
        yield begin, buffer[at : at + end - begin]
        at += end - begin
