"""The streaming writer against qemu-img: what it writes is sound, and is the disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker.virt.libvirt.snapshot import qcow2_writer
from compute_worker.virt.libvirt.snapshot.qcow2_writer import CLUSTER
from compute_worker.virt.libvirt.transfer.extents import Extent

GIB = 1 << 30
SECTOR = 512
SIZES = st.integers(1, 3 << 11).map(lambda n: n * SECTOR) | st.sampled_from([GIB // 2, GIB // 2 + SECTOR, 3 * GIB])


def qemu_img(*words: object) -> str:
    return subprocess.run(
        ["qemu-img", *map(str, words)], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def write(path: Path, disk_bytes: int, data: Sequence[Extent], source: Path) -> qcow2_writer.Layout:
    layout = qcow2_writer.plan(disk_bytes, data)
    with open(path, "wb") as out, open(source, "rb") as disk:
        for piece in qcow2_writer.head(layout):
            out.write(piece)
        for begin, end in layout.data:
            disk.seek(begin)
            out.write(disk.read(end - begin))
        out.write(bytes(layout.padding))
    return layout


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=SIZES, places=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 300)), max_size=8))
def test_any_disk_comes_out_whole_and_sound(
    tmp_path: Path, size: int, places: list[tuple[float, int]]
) -> None:
    source, target = tmp_path / "raw", tmp_path / "made"
    sectors = size // SECTOR
    found = []
    with open(source, "wb") as out:
        out.truncate(size)
        for number, (where, count) in enumerate(places, 1):
            first = min(int(where * sectors), sectors - 1)
            last = min(sectors, first + count)
            out.seek(first * SECTOR)
            out.write(bytes([number]) * ((last - first) * SECTOR))
            found.append((first * SECTOR, last * SECTOR))
    layout = write(target, size, sorted(found), source)
    assert target.stat().st_size == layout.size_bytes
    checked = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", target))
    assert checked["check-errors"] == 0 and not checked.get("leaks") and not checked.get("corruptions"), checked
    assert checked["image-end-offset"] == layout.size_bytes
    assert "Images are identical." in qemu_img("compare", "-f", "raw", "-F", "qcow2", source, target)
    info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", target))
    assert info["virtual-size"] == size and "backing-filename" not in info and info["cluster-size"] == CLUSTER


def test_an_empty_disk_is_tables_alone(tmp_path: Path) -> None:
    (tmp_path / "raw").touch()
    layout = write(tmp_path / "made", 10 * GIB, [], tmp_path / "raw")
    assert (tmp_path / "made").stat().st_size == layout.size_bytes == 4 * CLUSTER
    qemu_img("check", "-f", "qcow2", tmp_path / "made")


@pytest.mark.parametrize(("disk", "data"), [(3 << 40, [(0, 3 << 40)]), (64 << 40, [(0, SECTOR), (63 << 40, 64 << 40)])])
def test_the_counters_of_a_large_image_count_themselves(disk: int, data: list[Extent]) -> None:
    layout = qcow2_writer.plan(disk, data)
    assert layout.block_clusters * (CLUSTER // 2) >= layout.clusters
    assert layout.table_clusters * (CLUSTER // 8) >= layout.block_clusters
    assert (layout.block_clusters - 1) * (CLUSTER // 2) < layout.clusters


def test_a_large_disk_s_tables_are_sound(tmp_path: Path) -> None:
    """Several clusters of L1, of refcounts and of their table's blocks: checked by qemu-img, the data a hole."""
    disk = 6 << 40
    layout = qcow2_writer.plan(disk, [(0, 5 * GIB), ((5 << 40) + 7, (5 << 40) + 8)])
    with open(tmp_path / "made", "wb") as out:
        for piece in qcow2_writer.head(layout):
            out.write(piece)
        out.truncate(layout.size_bytes)
    assert layout.l1_clusters == 2 and layout.block_clusters == 3
    qemu_img("check", "-f", "qcow2", tmp_path / "made")


@pytest.mark.parametrize("size", [0, -1, (256 << 40) * 8 + 1])
def test_a_disk_that_cannot_be(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be made"):
        qcow2_writer.plan(size, [])

