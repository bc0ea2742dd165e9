"""The bytes of an image file, in one pass, from a disk that stands still."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from compute_worker.images.store import Hole, Piece
from compute_worker.virt.driver import Job
from compute_worker.virt.libvirt.snapshot import qcow2_writer, reading
from compute_worker.virt.libvirt.snapshot.reading import Reader, Still
from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.extents import Extent

PHASE = "upload"


@dataclass(frozen=True, slots=True)
class Stream:
    """An image of ``size_bytes`` in ``pieces``, which are read as they are asked for. ``read_bytes``: how many of them
    come from the guest's disk, the others from the parent image."""

    size_bytes: int
    pieces: Iterator[Piece]
    read_bytes: int


def stream(still: Still, disk_format: str, connect: Callable[[], Reader], job: Job) -> Stream:
    """The disk as ``raw`` or ``qcow2``. Never with a backing file. Reports ``upload`` in bytes of the disk's data.

    :raises ValueError: the disk is larger than a qcow2 of ours can be.
    """
    if disk_format == "raw":
        pieces = _raw(still, _read(still.data, connect, job))
        return Stream(still.size, pieces, _from_disk(still, still.data))
    layout = qcow2_writer.plan(still.size, still.data)
    data = list(layout.data)
    return Stream(layout.size_bytes, _qcow2(layout, _read(data, connect, job)), _from_disk(still, data))


def _from_disk(still: Still, data: Sequence[Extent]) -> int:
    parents = extents.subtract(data, still.dirty) if still.dirty is not None else ()
    return extents.length(data) - extents.length(parents)


def _read(data: Iterable[Extent], connect: Callable[[], Reader], job: Job) -> Iterator[bytearray]:
    wanted = list(data)
    total, done = extents.length(wanted), 0
    job.report(PHASE, 0, total)
    for piece in reading.read(reading.gather(wanted), connect, job):
        yield piece
        done += len(piece)
        job.report(PHASE, done, total)


def _qcow2(layout: qcow2_writer.Layout, data: Iterator[bytearray]) -> Iterator[Piece]:
    yield from qcow2_writer.head(layout)
    yield from data
    if layout.padding:
        yield bytes(layout.padding)


def _raw(still: Still, data: Iterator[bytearray]) -> Iterator[Piece]:
    at = 0
    for gathered, piece in zip(reading.gather(still.data), data, strict=True):
        view = memoryview(piece)
        for begin, end in gathered:
            if begin > at:
                yield Hole(begin - at)
            yield view[: end - begin]
            view, at = view[end - begin :], end
    if at < still.size:
        yield Hole(still.size - at)
