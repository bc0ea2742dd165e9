from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.images import files


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_is_disk_full(number: int, tmp_path: Path) -> None:
    with pytest.raises(errors.DiskFull, match=str(tmp_path)), files.disk_errors(tmp_path):
        raise OSError(number, "full")


def test_other_system_errors_are_broken_and_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(errors.Broken, match="Read-only") as caught, files.disk_errors(tmp_path / "x"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert str(tmp_path / "x") in caught.value.message


def test_write_atomic_replaces_whole_and_leaves_no_part(tmp_path: Path) -> None:
    target = tmp_path / "disk.info"
    files.write_atomic(target, b"old")
    files.write_atomic(target, b"new", mode=0o640)
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.info"]


def test_write_atomic_keeps_the_old_when_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "disk.info"
    files.write_atomic(target, b"old")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(errors.DiskFull):
        files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.info"]


def test_private_files_have_their_mode_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o277)
    try:
        files.create_private(tmp_path / "x", 0o640)
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_private_file_is_a_new_file_for_who_holds_the_old(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with open(path, "wb", buffering=0) as old:
        files.create_private(path)
        old.write(b"late")
    assert path.read_bytes() == b""


def test_unknown_group_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(errors.Broken, match="no-such-group"):
        files.give_to_group(tmp_path / "x", "no-such-group", 0o660)


@pytest.mark.parametrize(
    ("kind", "shared"),
    [("ext4", False), ("tmpfs", False), ("nfs4", True), ("ceph", True), ("fuse.glusterfs", True), ("fuse.x", False)],
)
def test_shared_storage_is_known_by_the_deepest_mount(tmp_path: Path, kind: str, shared: bool) -> None:
    here = str(tmp_path.resolve()).replace(" ", r"\040")
    table = tmp_path / "mountinfo"
    table.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/vda rw\n2 1 8:2 / {here} rw shared:3 - {kind} somewhere rw\n"
        "3 1 8:3 / /elsewhere rw - nfs4 server:/ rw\n"
    )
    assert files.is_shared(tmp_path / "_base", table) is shared


def test_a_tree_goes_while_somebody_else_removes_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    for name in "abc":
        (tmp_path / "tree" / name).touch()
    unlink = os.unlink

    def races(*words: Any, **options: Any) -> None:
        unlink(*words, **options)
        unlink(*words, **options)

    with monkeypatch.context() as racing:
        racing.setattr(os, "unlink", races)
        files.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").touch()
        files.remove_tree(tmp_path / "file")
