from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.layer import FrozenLayer, within
from compute_worker.virt.libvirt.transfer.nbd import SourceFailed
from tests.virt.libvirt.transfer.fakeguest import qemu_io
from tests.virt.libvirt.transfer.support import MIB, processes
from tests.virt.libvirt.transfer.test_extents import members, some


@given(some, st.integers(0, 45), st.integers(0, 45))
def test_within_is_the_common_part(extents_: list[extents.Extent], begin: int, end: int) -> None:
    found = list(within(extents_, begin, end))
    assert members(found) == members(extents_) & set(range(begin, end))
    assert all(first < last for first, last in found)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Over a base that is not there: nobody may want it."""
    path = tmp_path / "disk"
    words = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "gone", str(path), "8M"]
    subprocess.run(words, check=True, timeout=20)
    return path


def whole_clusters(path: Path, *commands: str) -> None:
    """Written without the base being opened."""
    node = f'json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{path}"}}}}'
    words = ["qemu-io", *(word for one in commands for word in ("-c", one)), node]
    subprocess.run(words, check=True, capture_output=True, timeout=20)


def test_what_it_holds_and_what_was_written_since(disk: Path, tmp_path: Path) -> None:
    whole_clusters(disk, "write -P 1 0 64k", "write -P 1 1M 128k")
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(disk), "since"], check=True, timeout=20)
    whole_clusters(disk, "write -P 2 1M 64k", "write -z 4M 64k")
    with FrozenLayer(disk, tmp_path, "since", 60) as frozen:
        size, held, blank, dirty = frozen.look()
    kib = 1024
    assert size == 8 * MIB
    assert held == [(0, 64 * kib), (MIB, MIB + 128 * kib), (4 * MIB, 4 * MIB + 64 * kib)]
    assert dirty == [(MIB, MIB + 64 * kib), (4 * MIB, 4 * MIB + 64 * kib)]
    assert list(extents.subtract(dirty, blank)) == [(MIB, MIB + 64 * kib)]
    assert os.listdir(tmp_path) == ["disk"] and not processes("qemu-nbd", str(tmp_path))


@pytest.mark.parametrize("bitmap", ["missing", "inconsistent"])
def test_a_bitmap_that_is_not_there_or_cannot_be_believed(disk: Path, tmp_path: Path, bitmap: str) -> None:
    if bitmap == "inconsistent":
        subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", str(disk)], check=True, timeout=20)
        subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(disk), bitmap], check=True, timeout=20)
        qemu_io(disk, "write 0 64k", crash=True)
    with FrozenLayer(disk, tmp_path, bitmap, 60) as frozen, pytest.raises(SourceFailed, match=bitmap):
        frozen.look()
    assert not processes("qemu-nbd", str(tmp_path))
