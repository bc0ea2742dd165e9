"""Where the data of a sparse file is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

Extent = tuple[int, int]
"""First byte, and the byte after the last."""

_LOOK_BYTES = 1 << 20
_ZEROS = memoryview(bytes(_LOOK_BYTES))


def data_extents(fd: int, begin: int, end: int) -> Iterator[Extent]:
    """Parts of ``begin`` to ``end`` that are not holes, in order. A file system that knows no holes has none."""
    at = begin
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        if first >= end:
            return
        at = min(end, os.lseek(fd, first, os.SEEK_HOLE))
        yield first, at


def subtract(some: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """What of ``some`` none of ``others`` covers. Both are sorted and do not overlap themselves."""
    rest = iter(others)
    other = next(rest, None)
    for extent in some:
        begin, end = extent
        while other is not None and other[1] <= begin:
            other = next(rest, None)
        while other is not None and other[0] < end:
            if other[0] > begin:
                yield begin, other[0]
            begin = other[1]
            if begin >= end:
                break
            other = next(rest, None)
        if begin < end:
            yield begin, end


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes with neighbours joined; ``extents`` are sorted by their beginnings and may overlap."""
    current: Extent | None = None
    for begin, end in extents:
        if current is None:
            current = begin, end
        elif begin <= current[1]:
            current = current[0], max(current[1], end)
        else:
            yield current
            current = begin, end
    if current is not None:
        yield current


def length(extents: Iterable[Extent]) -> int:
    """Bytes in all of them."""
    return sum(end - begin for begin, end in extents)


def is_zero(fd: int, begin: int, end: int) -> bool:
    """Whether every byte there reads as zero."""
    for first, last in data_extents(fd, begin, end):
        for at in range(first, last, _LOOK_BYTES):
            piece = os.pread(fd, min(_LOOK_BYTES, last - at), at)
            if piece != _ZEROS[: len(piece)]:
                return False
    return True
