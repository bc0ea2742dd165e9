from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from tests.images.support import Job, qcow2

MIB = 1 << 20


@pytest.fixture
def tool() -> QemuImg:
    return QemuImg(30, 2048)


def test_overlay_names_its_base_as_told(tool: QemuImg, tmp_path: Path, job: Job) -> None:
    (tmp_path / "base").write_bytes(bytes(MIB))
    tool.create_overlay(tmp_path / "disk", 8 * MIB, "base", "raw", job)
    info = tool.info(tmp_path / "disk", "qcow2", job)
    assert (info.format, info.virtual_size_bytes, info.backing) == ("qcow2", 8 * MIB, "base")
    assert not info.encrypted


def test_convert_reports_and_keeps_holes(tool: QemuImg, tmp_path: Path, job: Job) -> None:
    source = qcow2(tmp_path / "image", 64, b"x" * MIB, compress="yes")
    tool.convert(source, "qcow2", tmp_path / "raw", "raw", 64 * MIB, job, "converting")
    assert (tmp_path / "raw").stat().st_size == 64 * MIB
    assert (tmp_path / "raw").stat().st_blocks * 512 < 4 * MIB
    assert (tmp_path / "raw").read_bytes()[:MIB] == b"x" * MIB
    assert job.reports[-1] == ("converting", 64 * MIB, 64 * MIB)


def test_a_qcow2_header_in_a_raw_disk_is_just_bytes(tool: QemuImg, tmp_path: Path, job: Job) -> None:
    disk = qcow2(tmp_path / "disk", 8)
    size = -(-disk.stat().st_size // 512) * 512
    assert tool.info(disk, "raw", job).virtual_size_bytes == size
    assert tool.resize(disk, "raw", size + MIB, job)
    assert disk.stat().st_size == size + MIB


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_resize_grows_once_and_never_shrinks(tool: QemuImg, tmp_path: Path, job: Job, fmt: str) -> None:
    disk = tmp_path / "disk"
    tool.create(disk, fmt, 4 * MIB, job)
    assert tool.resize(disk, fmt, 8 * MIB, job)
    assert not tool.resize(disk, fmt, 8 * MIB, job)
    with pytest.raises(errors.Broken, match="cannot shrink"):
        tool.resize(disk, fmt, 4 * MIB, job)
    assert tool.info(disk, fmt, job).virtual_size_bytes == 8 * MIB


def test_check_and_measure(tool: QemuImg, tmp_path: Path, job: Job) -> None:
    disk = qcow2(tmp_path / "disk", 8, b"x" * MIB)
    assert tool.check(disk, "qcow2", job)["check-errors"] == 0
    required, most = tool.measure(disk, "qcow2", "qcow2", job)
    assert MIB < required < most


def test_a_wrong_format_is_an_error_not_a_guess(tool: QemuImg, tmp_path: Path, job: Job) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with pytest.raises(errors.CommandFailed, match="qemu-img info failed"):
        tool.info(tmp_path / "disk", "qcow2", job)


def test_paths_are_absolute_so_that_none_is_an_option_or_a_protocol(tool: QemuImg, job: Job) -> None:
    with pytest.raises(ValueError, match="absolute"):
        tool.info(Path("nbd:unix:x"), "raw", job)


def test_limits_hold(tmp_path: Path, job: Job) -> None:
    disk = qcow2(tmp_path / "disk", 8)
    with pytest.raises(errors.CommandFailed):
        QemuImg(30, 1).info(disk, "qcow2", job)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compress_makes_a_disk_that_stands_alone(tool: QemuImg, tmp_path: Path, job: Job, compression: str) -> None:
    base, disk, made = tmp_path / "base", tmp_path / "disk", tmp_path / "made"
    base.write_bytes(b"x" * MIB)
    tool.create_overlay(disk, 4 * MIB, str(base), "raw", job)
    source = {"driver": "qcow2", "file": {"driver": "file", "filename": str(disk)}}
    tool.compress("json:" + json.dumps(source), made, compression, 4 * MIB, job, "compressing")
    seen = tool.info(made, "qcow2", job)
    assert seen.backing is None and seen.details["compression-type"] == compression
    tool.convert(made, "qcow2", tmp_path / "raw", "raw", 4 * MIB, job, "converting")
    assert (tmp_path / "raw").read_bytes() == b"x" * MIB + bytes(3 * MIB) and made.stat().st_size < MIB


def test_bitmaps_go_by_the_beginning_of_their_names(tool: QemuImg, tmp_path: Path, job: Job) -> None:
    disk = tmp_path / "disk"
    tool.create(disk, "qcow2", MIB, job)
    for name in ("ours-1", "ours-2", "theirs"):
        subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(disk), name], check=True, timeout=20)
    tool.remove_bitmaps(disk, "ours-", job, keep="ours-2")
    assert {one["name"] for one in tool.info(disk, "qcow2", job).details["bitmaps"]} == {"ours-2", "theirs"}
    tool.remove_bitmaps(disk, "", job)
    assert not tool.info(disk, "qcow2", job).details.get("bitmaps")
