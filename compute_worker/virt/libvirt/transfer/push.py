"""Send windows of a disk over several NBD connections at once.

A window counts when it has been flushed at the destination; one more connection does nothing but flush, twice a second,
so that no stream ever waits for the destination's disk to catch up. A single window needs only one.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from compute_worker.virt.driver import Job
from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.extents import Extent
from compute_worker.virt.libvirt.transfer.nbd import HEADER, Connection
from compute_worker.virt.libvirt.transfer.pace import Pace

CHUNK = 2 << 20
"""Bytes in one request. Measured against qemu-nbd 7.2: with 1 MiB both sides need half as much processor time again."""
_LOOK_SECONDS = 0.25
_RECORD_SECONDS = 0.5
_ALIVE_SECONDS = 10.0
"""How often the destination hears of us even when no window is done."""


class Reader(Protocol):
    """Reads a disk; used by one thread."""

    def extents(self, begin: int, end: int) -> Iterator[Extent]:
        """What of the range is to be sent."""

    def zeros(self, begin: int, end: int) -> Iterator[Extent]:
        """What of the range is to be made zeros, and not to be read."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer."""

    def close(self) -> None:
        """Done with it."""


class FileReader:
    """A file that nobody writes to; its holes are not sent. Any number of threads may share the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def extents(self, begin: int, end: int) -> Iterator[Extent]:
        """Its data."""
        return extents.data_extents(self._fd, begin, end)

    def zeros(self, begin: int, end: int) -> Iterator[Extent]:
        """None: holes are there already."""
        return iter(())

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """:raises OSError: it became shorter."""
        at = 0
        while at < len(buffer):
            got = os.preadv(self._fd, [buffer[at:]], offset + at)
            if not got:
                raise OSError(5, "the file became shorter while it was sent")
            at += got

    def close(self) -> None:
        """The descriptor is its owner's."""


class Push:
    """One run over ``windows`` (numbers of windows of ``window`` bytes of a disk of ``size``).

    :param connect: makes a connection to the destination, not yet open, for one thread.
    :param reader: makes a reader of the disk, for one thread.
    """

    def __init__(
        self,
        windows: Iterable[int],
        *,
        window: int,
        size: int,
        streams: int,
        pace: Pace,
        connect: Callable[[], Connection],
        reader: Callable[[], Reader],
    ) -> None:
        self._todo = deque(windows)
        self._window = window
        self._size = size
        self._streams = min(streams, len(self._todo))
        self._pace = pace
        self._connect = connect
        self._reader = reader
        self._connections: list[Connection] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._written: list[int] = []
        self._done: list[int] = []
        self._running = 0
        self._flushing = False
        self._error: BaseException | None = None
        self.sent = 0

    def run(self, job: Job, record: Callable[[list[int]], None], report: Callable[[int], None]) -> None:
        """Send them all. ``record`` gets numbers of windows that are on the destination's disk, twice a second
        (also none, to say that we live); ``report`` the bytes sent so far. Both are called from this thread.

        If the process dies inside, what was recorded is there; the rest is sent again.

        :raises Cancelled: every connection is closed.
        :raises NbdError: as the first stream that failed met it.
        """
        threads: list[threading.Thread] = []
        try:
            with job.on_cancel(self._abort):
                # All of them before the first byte: a server ends when its last client leaves.
                for target in self._targets():
                    connection = self._connect()
                    self._connections.append(connection)
                    job.check()
                    connection.open()
                    threads.append(threading.Thread(target=target, args=(connection,), name="push", daemon=True))
                self._running, self._flushing = self._streams, bool(threads)
                for thread in threads:
                    thread.start()
                self._attend(job, record, report)
        finally:
            if self._flushing:
                self._abort()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for connection in self._connections:
                connection.close()
        job.check()
        if self._error is not None:
            raise self._error

    def _targets(self) -> list[Callable[[Connection], None]]:
        """What each connection does."""
        if len(self._todo) == 1:
            # What is left to send when a guest is off: a second handshake would take longer than the flush.
            return [self._alone]
        return [self._flush, *[self._stream] * self._streams] if self._todo else []

    def _abort(self) -> None:
        self._stop.set()
        for connection in list(self._connections):
            connection.abort()
        with self._changed:
            self._changed.notify_all()

    def _attend(self, job: Job, record: Callable[[list[int]], None], report: Callable[[int], None]) -> None:
        recorded = time.monotonic()
        while True:
            with self._changed:
                if self._flushing:
                    self._changed.wait(_LOOK_SECONDS)
                flushing, done = self._flushing, self._done
            job.check()
            report(self.sent)
            quiet = time.monotonic() - recorded
            if (done and quiet > _RECORD_SECONDS) or quiet > _ALIVE_SECONDS or (not flushing and done):
                with self._changed:
                    done, self._done = self._done, []
                record(done)
                recorded = time.monotonic()
            if not flushing:
                return

    def _flush(self, connection: Connection) -> None:
        """Until every stream has ended: flush what they have written since."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: not self._running, _RECORD_SECONDS)
                    running, written = self._running, self._written
                    self._written = []
                if written and not self._stop.is_set():
                    connection.flush()
                with self._changed:
                    self._done += written if not self._stop.is_set() else []
                if not running:
                    return
        except BaseException as exc:
            self._fail(exc)
        finally:
            with self._changed:
                self._flushing = False
                self._changed.notify_all()

    def _fail(self, exc: BaseException) -> None:
        with self._changed:
            self._error = self._error or exc
        self._abort()

    def _alone(self, connection: Connection) -> None:
        self._stream(connection)
        self._flush(connection)

    def _stream(self, connection: Connection) -> None:
        try:
            reader = self._reader()
            try:
                self._send_windows(connection, reader)
            finally:
                reader.close()
        except BaseException as exc:
            self._fail(exc)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _send_windows(self, connection: Connection, reader: Reader) -> None:
        buffer = memoryview(bytearray(HEADER.size + CHUNK))
        while not self._stop.is_set():
            try:
                number = self._todo.popleft()
            except IndexError:
                return
            begin = number * self._window
            end = min(begin + self._window, self._size)
            for first, last in reader.zeros(begin, end):
                connection.write_zeroes(first, last - first)
            for first, last in reader.extents(begin, end):
                for at in range(first, last, CHUNK):
                    count = min(CHUNK, last - at)
                    self._pace.take(count, self._stop)
                    if self._stop.is_set():
                        return
                    reader.read_into(buffer[HEADER.size : HEADER.size + count], at)
                    connection.write(buffer[: HEADER.size + count], at)
                    with self._changed:
                        self.sent += count
            connection.settle()
            with self._changed:
                self._written.append(number)
