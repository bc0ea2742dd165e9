"""Files with holes: writing pieces at offsets, copying without the holes, summing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from typing import TYPE_CHECKING

from compute_worker.images.store import CHUNK_BYTES, Hole, Piece, flat

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

_FICLONE = 0x40049409
_COPY_BYTES = 16 << 20
_CANNOT_CLONE = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS})


def put(fd: int, piece: Piece, offset: int) -> None:
    """Write ``piece`` at ``offset``; a hole is not written (the caller truncates to the final size).

    :raises OSError: also when the disk is full after a part of it.
    """
    if isinstance(piece, Hole):
        return
    view = memoryview(piece).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def write_out(fd: int, begin: int, end: int) -> None:
    """Let the kernel begin to write that part of a file to the disk, without waiting: the ``fsync`` at the end, which
    tells of errors, is short then. Linux does this for what nobody is said to need; what is still dirty stays in memory
    (``generic_fadvise`` in its mm/fadvise.c)."""
    os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_DONTNEED)


def put_over(fd: int, piece: Piece, offset: int) -> None:
    """The same over what may be there already: a hole is written as zeros."""
    for data in flat([piece]):
        put(fd, data, offset)
        offset += len(data)


def clone(source: int, target: int, job: Job | None = None) -> None:
    """Make empty file ``target`` a copy of ``source``: sharing its blocks where the file system can (reflink), else
    copying data and leaving holes out."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as exc:
        if exc.errno not in _CANNOT_CLONE:
            raise
        _copy(source, target, job)


def _copy(source: int, target: int, job: Job | None) -> None:
    size, offset = os.fstat(source).st_size, 0
    os.ftruncate(target, size)
    while offset < size:
        try:
            begin = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        offset = begin
        end = os.lseek(source, begin, os.SEEK_HOLE)
        while offset < end:
            if job is not None:
                job.check()
            done = os.copy_file_range(source, target, min(_COPY_BYTES, end - offset), offset, offset)
            if not done:
                return  # cut short under us: the caller compares sizes
            offset += done


def sha256(fd: int, job: Job | None = None) -> str:
    """Of the whole file, whatever the descriptor's position."""
    digest, offset = hashlib.sha256(), 0
    while data := os.pread(fd, CHUNK_BYTES, offset):
        if job is not None:
            job.check()
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()
