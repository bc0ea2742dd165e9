from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compute_worker.images.store import Hole, flat
from compute_worker.virt.libvirt.snapshot.image import stream
from compute_worker.virt.libvirt.snapshot.reading import PIECE, Still
from compute_worker.virt.libvirt.transfer import extents
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.snapshot.test_reading import Memory

SIZE = 3 * PIECE + 512
NOISE = (bytes(range(1, 252)) * (SIZE // 251 + 1))[:SIZE]
PLACES = st.lists(st.tuples(st.integers(0, SIZE // 512 - 1), st.integers(1, 9)), max_size=5)


def _some(places: list[tuple[int, int]]) -> list[extents.Extent]:
    return list(extents.merge(sorted((at * 512, min(SIZE, (at + n) * 512)) for at, n in places)))


@given(places=PLACES, disk_format=st.sampled_from(["raw", "qcow2"]))
def test_as_many_bytes_as_announced_and_few_of_them_read(places: list[tuple[int, int]], disk_format: str) -> None:
    data = _some(places)
    disk = Memory(bytearray(SIZE))
    for begin, end in data:
        disk.content[begin:end] = NOISE[begin:end]
    job = RecordingJob()
    made = stream(Still(SIZE, tuple(data)), disk_format, lambda: disk, job)
    pieces = list(made.pieces)
    content = b"".join(flat(pieces))
    assert len(content) == made.size_bytes and made.read_bytes == extents.length(disk.read)
    if disk_format == "raw":
        assert content == disk.content and extents.length(data) == made.read_bytes
        assert sum(piece.size for piece in pieces if isinstance(piece, Hole)) == SIZE - extents.length(data)
    assert job.reports[-1] == ("upload", made.read_bytes, made.read_bytes)


def test_what_comes_from_the_parent_is_not_counted() -> None:
    disk = Memory(bytes(SIZE))
    still = Still(SIZE, ((0, PIECE),), ((512, 1024), (PIECE, PIECE + 512)))
    assert stream(still, "raw", lambda: disk, RecordingJob()).read_bytes == 512
