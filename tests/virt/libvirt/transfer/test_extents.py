from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from compute_worker.virt.libvirt.transfer import extents
from tests.virt.libvirt.transfer.support import MIB, write_sparse

some = st.sets(st.integers(0, 40)).map(
    lambda numbers: list(extents.merge((n, n + 1) for n in sorted(numbers)))
)


def members(found: object) -> set[int]:
    return {n for begin, end in found for n in range(begin, end)}  # type: ignore[attr-defined]


@given(some, some)
def test_subtract_is_the_difference_of_sets(one: list[extents.Extent], other: list[extents.Extent]) -> None:
    left = list(extents.subtract(one, other))
    assert members(left) == members(one) - members(other)
    assert left == sorted(left) and all(begin < end for begin, end in left)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)).map(lambda x: (x[0], x[0] + x[1])).filter(bool)))
def test_merge_keeps_every_byte_once(pieces: list[extents.Extent]) -> None:
    merged = list(extents.merge(sorted(pieces)))
    assert members(merged) == members(pieces)
    assert extents.length(merged) == len(members(pieces))
    assert all(one[1] < other[0] for one, other in pairwise(merged))


def test_data_of_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_sparse(path, {MIB: b"x" * 8192, 3 * MIB: b"y" * 4096}, 5 * MIB)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert list(extents.data_extents(fd, 0, 5 * MIB)) == [(MIB, MIB + 8192), (3 * MIB, 3 * MIB + 4096)]
        assert list(extents.data_extents(fd, MIB + 4096, 3 * MIB)) == [(MIB + 4096, MIB + 8192)]
        assert list(extents.data_extents(fd, 4 * MIB, 5 * MIB)) == []
        assert extents.is_zero(fd, 0, MIB)
        assert not extents.is_zero(fd, 0, MIB + 1)
    finally:
        os.close(fd)


def test_zeros_that_are_data_are_zeros(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(3 * MIB) + b"1")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert extents.is_zero(fd, 0, 3 * MIB)
        assert not extents.is_zero(fd, 0, 3 * MIB + 1)
    finally:
        os.close(fd)
