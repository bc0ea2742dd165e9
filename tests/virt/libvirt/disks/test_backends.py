from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import ImageMeta
from compute_worker.virt.libvirt.disks import backends
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from tests.images.support import Job

MIB = 1 << 20
TOOL = QemuImg(30, 2048)


def test_backends_come_by_name() -> None:
    assert isinstance(backends.load("raw", TOOL), backends.RawBackend)
    assert isinstance(backends.load("qcow2", TOOL), backends.Qcow2Backend)
    with pytest.raises(errors.Broken, match="images_type"):
        backends.load("lvm", TOOL)


@pytest.mark.parametrize("name", ["raw", "qcow2"])
def test_a_disk_begins_like_its_base_and_has_its_own_size(name: str, tmp_path: Path, job: Job) -> None:
    backend = backends.load(name, TOOL)
    base, disk = tmp_path / "_base" / "b1", tmp_path / "guest" / "disk"
    base.parent.mkdir()
    disk.parent.mkdir()
    base.write_bytes(random.Random(1).randbytes(MIB))
    backend.make(disk, base, 8 * MIB, job)
    disk.parent.rename(tmp_path / "guest_resize")
    moved = tmp_path / "guest_resize" / "disk"
    flat = tmp_path / "flat"
    TOOL.convert(moved, backend.format, flat, "raw", 8 * MIB, job, "reading")
    assert flat.read_bytes() == base.read_bytes() + bytes(7 * MIB)
    described = backend.describe("disk", base, 8 * MIB)
    assert (described.format, described.virtual_size_bytes) == (backend.format, 8 * MIB)
    assert described.backing == ("b1" if name == "qcow2" else None)


def test_these_backends_clone_nothing(tmp_path: Path, job: Job) -> None:
    backend = backends.load("raw", TOOL)
    assert not backend.supports_clone
    assert not backend.clone(ImageMeta(id="x"), tmp_path / "disk", MIB, job)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300_000)), max_size=8))
def test_a_sparse_copy_has_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bool, int]]
) -> None:
    where = tmp_path_factory.mktemp("copy")
    with open(where / "old", "wb") as out:
        for data, size in pieces:
            if data:
                out.write(os.urandom(size))
            else:
                out.seek(size, os.SEEK_CUR)
        out.truncate()
    backends.sparse_copy(where / "old", where / "new", Job())
    assert (where / "new").read_bytes() == (where / "old").read_bytes()


def test_holes_are_not_copied_and_progress_is_told(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "old", "wb") as out:
        out.write(b"x" * MIB)
        out.seek(1 << 34)
        out.write(b"end")

    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refused)
    backends.sparse_copy(tmp_path / "old", tmp_path / "new", job)
    assert (tmp_path / "new").stat().st_size == (1 << 34) + 3
    assert (tmp_path / "new").stat().st_blocks * 512 < 4 * MIB
    with open(tmp_path / "new", "rb") as copied:
        assert copied.read(MIB) == b"x" * MIB
        copied.seek(1 << 34)
        assert copied.read() == b"end"
    assert job.reports[-1][2] == (1 << 34) + 3


def test_a_copy_is_cancelled(tmp_path: Path, job: Job) -> None:
    (tmp_path / "old").write_bytes(b"x" * MIB)
    job.cancel()
    with pytest.raises(errors.Cancelled):
        backends.sparse_copy(tmp_path / "old", tmp_path / "new", job)
