from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, ImageMeta, InjectedFile
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.cache import base_name
from tests.images.support import Job, qcow2, qemu_img
from tests.virt.libvirt.disks.support import GIB, OTHER, UUID, builder, instance, tree

IMAGE = ImageMeta(id="cow", disk_format="qcow2", kernel_id="vmlinuz", ramdisk_id="initrd", os_type="linux")
FLAVOR = {"root_gb": 1, "ephemeral_gb": 3, "swap_mb": 16}
LISTED = BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1), EphemeralDisk(size_gb=2, guest_format="vfat")])
REQUEST = SpawnRequest(injected_files=[InjectedFile(path="/etc/motd", content_base64="aGk=")], admin_password="sesame")
FULL = instance(IMAGE, FLAVOR, block_device_info=LISTED)


def put_images(root: Path) -> None:
    images = root / "images"
    images.mkdir()
    qcow2(images / "cow", 16, b"root disk content")
    (images / "vmlinuz").write_bytes(b"kernel " * 1000)
    (images / "initrd").write_bytes(b"ramdisk " * 1000)


@pytest.fixture(params=["qcow2", "raw"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> DiskBuilder:
    put_images(tmp_path)
    return builder(tmp_path, libvirt={"images_type": request.param})


def test_everything_an_instance_can_have(host: DiskBuilder, job: Job) -> None:
    fmt = host.backend.format
    info = host.create_disks(FULL, REQUEST, job)
    directory = host.directory.path(UUID)
    assert [(disk.name, disk.format, disk.virtual_size_bytes) for disk in info.disks[:4]] == [
        ("disk", fmt, GIB),
        ("disk.eph0", fmt, GIB),
        ("disk.eph1", fmt, 2 * GIB),
        ("disk.swap", fmt, 16 << 20),
    ]
    assert [disk.label for disk in info.disks] == [None, "ephemeral0", "ephemeral1", "swap", "config-2"]
    assert (info.disks[4].name, info.disks[4].format, info.image) == ("disk.config", "raw", "cow")
    assert set(os.listdir(directory)) == {
        *(disk.name for disk in info.disks), "kernel", "ramdisk", "disk.info", "images.json",
    }  # fmt: skip
    assert (directory / "kernel").read_bytes() == b"kernel " * 1000
    assert (directory / "ramdisk").read_bytes() == b"ramdisk " * 1000
    for disk in info.disks:
        assert disk.allocated_bytes == (directory / disk.name).stat().st_blocks * 512
        assert (directory / disk.name).stat().st_mode & 0o777 == 0o600
        seen = json.loads(qemu_img("info", "--output=json", "-f", disk.format, directory / disk.name))
        assert seen["virtual-size"] == disk.virtual_size_bytes
        assert seen.get("backing-filename") == (f"../_base/{disk.backing}" if disk.backing else None)
    assert host.disk_info(UUID) == info


def test_the_guest_sees_image_and_file_systems(host: DiskBuilder, job: Job, tmp_path: Path) -> None:
    info = host.create_disks(FULL, REQUEST, job)
    kinds = {"disk.eph0": "ext4", "disk.eph1": "vfat", "disk.swap": "swap", "disk.config": "iso9660"}
    for disk in info.disks:
        flat = tmp_path / "flat"
        qemu_img("convert", "-f", disk.format, "-O", "raw", host.directory.path(UUID) / disk.name, flat)
        if disk.name == "disk":
            with open(flat, "rb") as content:
                assert content.read(17) == b"root disk content"
            continue
        kind = subprocess.check_output(["blkid", "-p", "-o", "value", "-s", "TYPE", flat], text=True).strip()
        assert kind == kinds[disk.name]


def test_what_was_made_is_not_touched_again(host: DiskBuilder, job: Job) -> None:
    info = host.create_disks(FULL, REQUEST, job)
    disk = host.directory.path(UUID) / "disk"
    with open(disk, "r+b") as guest:
        guest.seek(0, os.SEEK_END)
        guest.write(b"written by the guest")
    before = (disk.stat().st_ino, disk.stat().st_mtime_ns)
    assert host.create_disks(FULL, SpawnRequest(), job) == info
    assert (disk.stat().st_ino, disk.stat().st_mtime_ns) == before


def test_without_root_gb_the_disk_is_as_large_as_the_image(host: DiskBuilder, job: Job) -> None:
    info = host.create_disks(instance(IMAGE), SpawnRequest(), job)
    assert [(disk.name, disk.virtual_size_bytes) for disk in info.disks] == [("disk", 16 << 20)]


def test_the_images_own_minimum_counts_before_anything_is_asked(host: DiskBuilder, job: Job) -> None:
    guest = instance(ImageMeta(id="nosuch", min_disk_gb=2), {"root_gb": 1})
    with pytest.raises(errors.FlavorDiskTooSmall):
        host.prepare_images(guest, job)
    assert tree(host.directory.root) == set()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"block_device_info": BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1, guest_format="zfs")])},
         errors.InvalidBDMFormat),
        ({"block_device_info": BlockDeviceInfo(block_device_mapping=[{"x": 1}])}, errors.NotSupported),
        ({"image": ImageMeta(id="cow", store="nosuch")}, errors.NotSupported),
    ],
)  # fmt: skip
def test_refusals_come_before_anything_is_made(
    host: DiskBuilder, job: Job, changes: dict[str, Any], error: type[errors.ComputeError]
) -> None:
    fields = {"image": IMAGE, **changes}
    guest = instance(fields.pop("image"), FLAVOR, **fields)
    for call in (
        lambda: host.check(guest, SpawnRequest()),
        lambda: host.prepare_images(guest, job),
        lambda: host.create_disks(guest, SpawnRequest(), job),
    ):
        with pytest.raises(error):
            call()
    assert tree(host.directory.root) == set()


def test_undo_leaves_only_whole_bases(host: DiskBuilder, job: Job) -> None:
    bases = host.prepare_images(FULL, job)
    (host.directory.base / f"{base_name(IMAGE)}.part").write_bytes(b"x")
    host.undo_prepare_images(FULL)
    host.undo_prepare_images(FULL)
    assert tree(host.directory.root) == {f"_base/{base.name}" for base in bases}


def test_undo_of_fetching_never_removes_finished_disks(host: DiskBuilder, job: Job) -> None:
    host.create_disks(FULL, REQUEST, job)
    host.undo_prepare_images(FULL)
    assert host.disk_info(UUID) is not None
    host.remove(UUID)
    host.remove(UUID)
    assert {name for name in tree(host.directory.root) if not name.startswith("_base/")} == set()


def test_a_name_for_the_group_and_nobody_else(tmp_path: Path, job: Job) -> None:
    import grp

    put_images(tmp_path)
    group = grp.getgrgid(os.getgid()).gr_name
    host = builder(tmp_path, libvirt={"disk_owner_group": group})
    host.create_disks(FULL, REQUEST, job)
    directory = host.directory.path(UUID)
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()}
    assert (modes["disk"], modes["disk.config"], modes["kernel"], modes["disk.info"]) == (0o660, 0o640, 0o640, 0o600)
    assert {path.stat().st_mode & 0o777 for path in host.directory.base.iterdir()} == {0o640}


def test_missing_bases_come_back_before_a_start(tmp_path: Path, job: Job) -> None:
    put_images(tmp_path)
    host = builder(tmp_path)
    info = host.create_disks(FULL, REQUEST, job)
    backings = {disk.backing for disk in info.disks if disk.backing}
    assert len(backings) == 4
    for name in backings:
        (host.directory.base / name).unlink()
    (host.directory.path(UUID) / "kernel").unlink()
    host.restore_bases(FULL, job)
    host.restore_bases(FULL, job)
    assert backings <= set(os.listdir(host.directory.base))
    assert (host.directory.path(UUID) / "kernel").read_bytes() == b"kernel " * 1000
    sizes = {name: (host.directory.base / name).stat().st_size for name in backings}
    assert sizes[base_name(IMAGE)] == 16 << 20
    assert sizes["ephemeral_2_vfat_1"] == 2 * GIB


def test_a_base_that_its_image_no_longer_gives_is_an_error(tmp_path: Path, job: Job) -> None:
    put_images(tmp_path)
    host = builder(tmp_path)
    host.create_disks(FULL, REQUEST, job)
    (host.directory.base / base_name(IMAGE)).unlink()
    other = instance(ImageMeta(id="vmlinuz"), FLAVOR, block_device_info=LISTED)
    with pytest.raises(errors.Broken, match="stands on"):
        host.restore_bases(other, job)
    with pytest.raises(errors.Broken, match=r"no disk\.info"):
        host.restore_bases(instance(IMAGE, uuid=OTHER), job)
