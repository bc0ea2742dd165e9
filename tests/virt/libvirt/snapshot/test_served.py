"""Disks that nobody writes to, behind a real qemu-nbd."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compute_worker.virt.libvirt.snapshot.reading import Unreadable, read
from compute_worker.virt.libvirt.snapshot.served import Served, node
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.snapshot.fakeguest import qemu
from tests.virt.libvirt.transfer.support import processes

MIB = 1 << 20


def test_base_and_overlay_are_read_as_one(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "disk"
    base.write_bytes(b"b" * MIB)
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "elsewhere", overlay, 4 * MIB)
    source = node(overlay, "qcow2", base)
    qemu("qemu-io", "-c", "write -P 99 128k 64k", "-c", "write -P 99 3M 64k", source)
    with Served("disk", source, tmp_path, 60) as served:
        still = served.look()
        assert (still.size, still.data, still.dirty) == (4 * MIB, ((0, MIB), (3 * MIB, 3 * MIB + 65536)), None)
        found = b"".join(read([((100 << 10, 200 << 10),)], served.connect, RecordingJob()))
        assert found == b"b" * (28 << 10) + b"c" * (64 << 10) + b"b" * (8 << 10)
    assert sorted(os.listdir(tmp_path)) == ["base", "disk"] and not processes("qemu-nbd", str(tmp_path))


def test_a_name_in_the_disk_is_not_followed(tmp_path: Path) -> None:
    """CVE-2015-7548: what stands in a raw disk is data, and a qcow2 stands on what was written down alone."""
    secret, disk = tmp_path / "secret", tmp_path / "disk"
    secret.write_bytes(b"s" * MIB)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, disk, MIB)
    content = disk.read_bytes()
    for source, wanted in ((node(disk, "raw"), content[:65536]), (node(disk, "qcow2"), bytes(65536))):
        with Served("disk", source, tmp_path, 60) as served:
            assert b"".join(read([((0, 65536),)], served.connect, RecordingJob())) == wanted


def test_a_node_names_everything() -> None:
    found = json.loads(node(Path("/i/disk"), "qcow2", Path("/b/base")).removeprefix("json:"))
    assert found["backing"] == {"driver": "raw", "file": {"driver": "file", "filename": "/b/base"}}
    assert "backing" not in json.loads(node(Path("/i/disk"), "raw", Path("/b/base")).removeprefix("json:"))
    assert json.loads(node(Path('/i/"disk'), "qcow2").removeprefix("json:"))["backing"] is None


def test_a_disk_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"nothing of the kind")
    with Served("disk", node(tmp_path / "disk", "qcow2"), tmp_path, 60) as served, pytest.raises(Unreadable):
        served.look()
