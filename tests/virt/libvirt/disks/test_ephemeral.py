from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.virt.libvirt.disks import ephemeral
from tests.images.support import Job

EVERYTHING = frozenset(ephemeral.FORMATS) | {"swap"}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("os_type", "guest_format", "available", "chosen"),
    [
        (None, None, EVERYTHING, "ext4"),
        ("linux", None, EVERYTHING, "ext4"),
        ("windows", None, EVERYTHING, "ntfs"),
        ("Windows", None, EVERYTHING - {"ntfs"}, "vfat"),
        ("plan9", None, EVERYTHING, "ext4"),
        ("windows", "xfs", EVERYTHING, "xfs"),
        (None, "ext2", EVERYTHING, "ext2"),
    ],
)
def test_choice(os_type: str | None, guest_format: str | None, available: frozenset[str], chosen: str) -> None:
    assert ephemeral.choose_format(os_type, guest_format, "ext4", available)[0] == chosen


@pytest.mark.parametrize("guest_format", ["reiserfs", "swap", "", "ext4 ", "../x", "-F", "xfs"])
def test_what_nobody_can_make(guest_format: str) -> None:
    with pytest.raises(errors.InvalidBDMFormat):
        ephemeral.choose_format("linux", guest_format, "ext4", EVERYTHING - {"xfs"})


def test_a_default_that_is_not_installed_is_named() -> None:
    with pytest.raises(errors.InvalidBDMFormat, match="default_ephemeral_format"):
        ephemeral.choose_format(None, None, "btrfs", EVERYTHING)


@given(st.text(max_size=300))
def test_no_os_type_makes_a_new_base(os_type: str) -> None:
    fs, _ = ephemeral.choose_format(os_type, None, "ext4", EVERYTHING)
    assert ephemeral.base_name(5, fs) in {"ephemeral_5_ext4", "ephemeral_5_ntfs"}


@pytest.mark.parametrize("fs", sorted(ephemeral.available_formats()))
def test_every_file_system_of_this_host_is_made_with_its_label(fs: str, tmp_path: Path, job: Job) -> None:
    path = tmp_path / "x"
    ephemeral.make(path, fs, GIB, "ephemeral15" if fs != "swap" else "swap", job)
    words = ["blkid", "-p", "-o", "export", path]
    found = dict(
        line.partition("=")[::2] for line in subprocess.check_output(words, text=True).splitlines() if "=" in line
    )
    assert found["TYPE"] == fs
    assert found["LABEL"].lower() == ("ephemeral15" if fs != "swap" else "swap")
    assert path.stat().st_size == GIB
    assert path.stat().st_blocks * 512 < GIB // 8
    assert path.stat().st_mode & 0o777 == 0o600


def test_this_host_makes_what_linux_guests_need() -> None:
    assert {"ext2", "ext3", "ext4", "vfat", "swap"} <= ephemeral.available_formats()


def test_names_of_bases() -> None:
    assert ephemeral.base_name(20, "ext4") == "ephemeral_20_ext4"
    assert ephemeral.base_name(20, "ext4", 2) == "ephemeral_20_ext4_2"
    assert ephemeral.swap_base_name(512) == "swap_512"


@pytest.mark.parametrize("fs", ["ext2", "ext3", "ext4", "vfat", "swap"])
def test_the_same_bytes_on_every_host(fs: str, tmp_path: Path, job: Job) -> None:
    """An overlay that moves stands on a base that was made at its destination."""
    made = []
    for name, label in (("a", "ephemeral0"), ("b", "ephemeral0"), ("c", "ephemeral1")):
        ephemeral.make(tmp_path / name, fs, GIB // 16, label, job)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] != made[2]
