"""One layer of a qcow2 on the source, read over a unix socket: what is in it, and what of it has been written since."""

from __future__ import annotations

import os
import socket
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.export import Export
from compute_worker.virt.libvirt.transfer.extents import Extent
from compute_worker.virt.libvirt.transfer.nbd import Connection, ConnectionLost, NbdError, SourceFailed
from compute_worker.virt.libvirt.transfer.receiver import overlay_node

DEPTH = "qemu:allocation-depth"
ALLOCATION = "base:allocation"
_ASK_BYTES = 1 << 30
_ZERO = 2
_STREAMS = 17


class PlannedReader:
    """Reads chosen parts of a disk over a connection of its own.

    :param data: what is to be sent; ``blank``: what is to be made zeros. Both sorted.
    :raises SourceFailed: from every method, when the disk cannot be read.
    """

    def __init__(self, connection: Connection, data: Sequence[Extent], blank: Sequence[Extent]) -> None:
        self._connection = connection
        self._data = data
        self._blank = blank
        _reading(connection.open)

    def extents(self, begin: int, end: int) -> Iterator[Extent]:
        """What of the range is to be sent."""
        return within(self._data, begin, end)

    def zeros(self, begin: int, end: int) -> Iterator[Extent]:
        """What of the range is to be made zeros."""
        return within(self._blank, begin, end)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer."""
        _reading(lambda: self._connection.read_into(buffer, offset))

    def close(self) -> None:
        """Leave."""
        self._connection.close()


def within(some: Sequence[Extent], begin: int, end: int) -> Iterator[Extent]:
    """The parts of sorted extents that lie in the range."""
    for first, last in some[max(0, bisect_right(some, (begin, begin)) - 1) :]:
        if first >= end:
            return
        if last > begin < end:
            yield max(first, begin), min(last, end)


def unix_address(directory_fd: int, name: str) -> Path:
    """A socket in a directory, however long its path is: the kernel takes 107 bytes of it."""
    return Path(f"/proc/self/fd/{directory_fd}/{name}")


def spans(connection: Connection, context: str, chosen: Callable[[int], bool]) -> list[Extent]:
    """The parts of a disk whose flags in ``context`` are ``chosen``."""
    found: list[Extent] = []
    at = 0
    while at < connection.size:
        pieces = connection.block_status(context, at, min(_ASK_BYTES, connection.size - at))
        if not pieces:
            raise NbdError(f"no answer about {context} at {at}")
        for piece in pieces:
            end = min(at + piece.length, connection.size)
            if chosen(piece.flags):
                found.append((at, end))
            at = end
    return list(extents.merge(found))


def allocated(connection: Connection) -> list[Extent]:
    """What the layer itself holds, data or zeros."""
    return spans(connection, DEPTH, lambda flags: flags == 1)


def zeros(connection: Connection) -> list[Extent]:
    """What reads as zeros without being read."""
    return spans(connection, ALLOCATION, lambda flags: bool(flags & _ZERO))


class FrozenLayer:
    """A qcow2 file that nobody writes to, behind a ``qemu-nbd`` of its own while the context is open.

    :param directory: where its socket is; nobody else may search it.
    :param bitmap: a persistent bitmap that :meth:`dirty` is asked about.
    """

    def __init__(self, path: Path, directory: Path, bitmap: str, seconds: float) -> None:
        self._path = path
        self._directory = directory
        self._bitmap = bitmap
        self._seconds = seconds

    def __enter__(self) -> FrozenLayer:
        self._fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._address = unix_address(self._fd, f"{self._path.name}.nbd")
        self._address.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._address))
        listener.listen(_STREAMS)
        options = [
            "--read-only",
            # Until it is told to end: connections come and go.
            "--persistent",
            "--allocation-depth",
            f"--bitmap={self._bitmap}",
            f"--shared={_STREAMS}",
            "--",
            overlay_node(self._path),
        ]
        self._export = Export(str(self._path), listener, options, self._seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._export.stop()
        self._address.unlink(missing_ok=True)
        os.close(self._fd)

    def connection(self, contexts: Iterable[str] = ()) -> Connection:
        """A connection to it, not yet open."""
        self._export.touch()
        return Connection(self._address, "", contexts=tuple(contexts))

    def look(self) -> tuple[int, list[Extent], list[Extent], list[Extent]]:
        """Its virtual size; what it holds; what of it reads as zeros; what was written since the bitmap began.

        :raises SourceFailed: it cannot be read, or its bitmap is missing or cannot be believed.
        """
        dirty = f"qemu:dirty-bitmap:{self._bitmap}"
        connection = self.connection((DEPTH, ALLOCATION, dirty))
        try:
            connection.open()
            try:
                found = allocated(connection), zeros(connection), spans(connection, dirty, lambda flags: flags == 1)
                return connection.size, *found
            finally:
                connection.close()
        except ConnectionLost as exc:
            self._export.stop()
            raise SourceFailed(self._export.problem or str(exc)) from None
        except NbdError as exc:
            raise SourceFailed(str(exc)) from None


def _reading(act: Callable[[], None]) -> None:
    try:
        act()
    except NbdError as exc:
        raise SourceFailed(f"reading the disk on this host: {exc}") from None
