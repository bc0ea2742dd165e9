from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Disk, DiskInfo, ImageMeta, Instance
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks import grow
from compute_worker.virt.libvirt.disks.grow import Grower, Growth, decide
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.libvirt.disks.plan import BlankDisk, DiskPlan
from tests.images.support import Job
from tests.virt.libvirt.disks.support import GIB, UUID, builder, instance, tree

MIB = 1 << 20
IMAGE = ImageMeta(id="img")
LOCAL = BlankDisk("disk.local", "ephemeral_1_ext4", "ext4", GIB, "ephemeral0", "usual")
SWAP = BlankDisk("disk.swap", "swap_16", "swap", 16 * MIB, "swap", "asked for")
SECRET = b"the host's own secret"


def disk(name: str, size: int, fmt: str = "qcow2") -> Disk:
    return Disk(name=name, format=fmt, virtual_size_bytes=size)


def host_header(secret: Path, size: int = GIB) -> bytes:
    """A qcow2 header over a file of the host, as a guest may write it to its raw disk."""
    name = str(secret).encode()
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(name), 16, size, 0, 2, 0x20000, 0x10000, 1, 0, 0)
    return (head + name).ljust(0x30000, b"\0")


# --- the decision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disks", "flavor", "blanks", "backend", "decided"),
    [
        ([disk("disk", GIB)], {"root_gb": 1}, (), "qcow2", Growth()),
        ([disk("disk", GIB)], {"root_gb": 3}, (), "qcow2", Growth(resize=(("disk", 3 * GIB),))),
        ([disk("disk", 5 * GIB)], {"root_gb": 0}, (), "qcow2", Growth()),
        ([disk("disk", GIB, "raw")], {"root_gb": 1}, (), "qcow2", Growth(convert=("disk",))),
        ([disk("disk", GIB, "raw")], {"root_gb": 1}, (), "raw", Growth()),
        ([disk("disk", GIB, "qcow2")], {"root_gb": 1}, (), "raw", Growth()),
        ([disk("disk.config", MIB, "raw")], {}, (), "qcow2", Growth()),
        ([], {}, (LOCAL, SWAP), "qcow2", Growth(make=(LOCAL, SWAP))),
        ([disk("disk.local", GIB // 2)], {}, (LOCAL,), "qcow2", Growth(resize=(("disk.local", GIB),))),
        ([disk("disk.swap", 8 * MIB)], {}, (SWAP,), "qcow2", Growth(drop=("disk.swap",), make=(SWAP,))),
        ([disk("disk.swap", 32 * MIB)], {}, (SWAP,), "qcow2", Growth(drop=("disk.swap",), make=(SWAP,))),
        ([disk("disk.swap", 16 * MIB)], {}, (SWAP,), "qcow2", Growth()),
        ([disk("disk.swap", 16 * MIB, "raw")], {}, (), "qcow2", Growth(drop=("disk.swap",))),
    ],
)  # fmt: skip
def test_decision(
    disks: list[Disk], flavor: dict[str, int], blanks: tuple[BlankDisk, ...], backend: str, decided: Growth
) -> None:
    assert decide(instance(IMAGE, flavor), DiskInfo(disks=disks), DiskPlan(blanks), backend) == decided


@pytest.mark.parametrize(
    ("disks", "blanks", "name"),
    [
        ([disk("disk", 2 * GIB)], (), "disk"),
        ([disk("disk", GIB), disk("disk.local", 2 * GIB)], (LOCAL,), "disk.local"),
        ([disk("disk", GIB), disk("disk.eph0", GIB)], (), "disk.eph0"),
    ],
)
def test_no_disk_shrinks(disks: list[Disk], blanks: tuple[BlankDisk, ...], name: str) -> None:
    with pytest.raises(errors.FlavorDiskTooSmall, match=f"{name} has .* a disk cannot shrink"):
        decide(instance(IMAGE, {"root_gb": 1}), DiskInfo(disks=disks), DiskPlan(blanks), "qcow2")


# --- the deeds ----------------------------------------------------------------------------------------------------


def born(root: Path, job: Job, backend: str, **flavor: int) -> Grower:
    """A host with an instance made by ``backend``."""
    host = builder(root, libvirt={"images_type": backend})
    (root / "images" / "img").write_bytes(b"bootable " * 10_000)
    host.create_disks(instance(IMAGE, {"root_gb": 1, **flavor}), SpawnRequest(), job)
    return Grower(host)


def path(root: Path, name: str = "disk") -> Path:
    return root / "instances" / UUID / name


def head(root: Path) -> bytes:
    with open(path(root), "rb") as file:
        return file.read(MIB)


def seen(root: Path, fmt: str, name: str = "disk", count: int = MIB) -> bytes:
    """The beginning of what a guest reads."""
    out = root / "seen"
    subprocess.run(["qemu-img", "dd", "-f", fmt, "-O", "raw", f"bs={count}", "count=1",
                    f"if={path(root, name)}", f"of={out}"], check=True, timeout=20)  # fmt: skip
    return out.read_bytes()


@pytest.mark.parametrize("backend", ["qcow2", "raw"])
def test_disks_grow_and_change_once(tmp_path: Path, job: Job, backend: str) -> None:
    grower = born(tmp_path, job, backend, swap_mb=16)
    before = seen(tmp_path, backend)
    larger = instance(IMAGE, {"root_gb": 3, "ephemeral_gb": 1, "swap_mb": 32})
    first = grower.grow(larger, job)
    inodes = {entry.name: entry.inode() for entry in os.scandir(path(tmp_path).parent)}
    again = grower.grow(larger, job)
    assert [(d.name, d.virtual_size_bytes, d.format) for d in again.disks] == [
        ("disk", 3 * GIB, backend), ("disk.local", GIB, backend), ("disk.swap", 32 * MIB, backend)
    ]  # fmt: skip
    assert [d.name for d in first.disks] == [d.name for d in again.disks]
    disks = {"disk", "disk.local", "disk.swap"}
    assert {n: i for n, i in inodes.items() if n in disks} == {
        entry.name: entry.inode() for entry in os.scandir(path(tmp_path).parent) if entry.name in disks
    }
    assert seen(tmp_path, backend) == before
    info = subprocess.check_output(["qemu-img", "info", "-f", backend, path(tmp_path)], text=True, timeout=20)
    assert f"({3 * GIB} bytes)" in info


def test_refused_before_anything_is_touched(tmp_path: Path, job: Job) -> None:
    grower = born(tmp_path, job, "qcow2", ephemeral_gb=1, swap_mb=16)
    before = {name: (tmp_path / "instances" / name).stat().st_mtime_ns for name in tree(tmp_path / "instances")}
    with pytest.raises(errors.FlavorDiskTooSmall):
        grower.grow(instance(IMAGE, {"root_gb": 2, "swap_mb": 32}), job)
    assert before == {name: (tmp_path / "instances" / name).stat().st_mtime_ns for name in tree(tmp_path / "instances")}


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_a_header_that_a_guest_wrote_over_its_raw_disk_is_bytes(tmp_path: Path, job: Job, target: str) -> None:
    """CVE-2016-2140, CVE-2026-24708: neither growing nor converting looks at it."""
    born(tmp_path, job, "raw")
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET.ljust(4096))
    with open(path(tmp_path), "r+b") as guest:
        guest.write(host_header(secret))
    before = head(tmp_path)
    grower = Grower(builder(tmp_path, libvirt={"images_type": target}))
    info = grower.grow(instance(IMAGE, {"root_gb": 2}), job)
    assert [(d.format, d.virtual_size_bytes, d.backing) for d in info.disks] == [(target, 2 * GIB, None)]
    assert seen(tmp_path, target) == before
    assert SECRET not in seen(tmp_path, target)
    if target == "qcow2":
        assert "backing" not in subprocess.check_output(["qemu-img", "info", "-f", "qcow2", path(tmp_path)], text=True)


class Died(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("at", range(12))
def test_a_death_inside_a_conversion(tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Whatever is done last before a death: begun again it ends, and the guest reads what it wrote."""
    born(tmp_path, job, "raw")
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET.ljust(4096))
    with open(path(tmp_path), "r+b") as guest:
        guest.write(host_header(secret))
    before = head(tmp_path)
    grower = Grower(builder(tmp_path, libvirt={"images_type": "qcow2"}))
    larger = instance(IMAGE, {"root_gb": 2})
    with monkeypatch.context() as patch:
        steps = _die_at(patch, at)
        try:
            grower.grow(larger, job)
        except Died:
            # What is left must not be taken for what it is not: no raw bytes that disk.info calls qcow2.
            info = InstancesDirectory(tmp_path / "instances").read_disk_info(UUID)
            assert info is not None
            if path(tmp_path).exists() and info.disks[0].format == "qcow2":
                assert head(tmp_path)[:8] != before[:8]
        else:
            assert at >= len(steps), steps
    info = grower.grow(larger, job)
    assert [(d.format, d.virtual_size_bytes) for d in info.disks] == [("qcow2", 2 * GIB)]
    assert seen(tmp_path, "qcow2") == before
    assert not [name for name in tree(tmp_path / "instances") if "converted" in name]


def _die_at(patch: pytest.MonkeyPatch, at: int) -> list[str]:
    steps: list[str] = []

    def dying(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            steps.append(name)
            if len(steps) == at + 1:
                raise Died
            return real(*args, **options)

        return call

    patch.setattr(grow.os, "rename", dying(os.rename, "rename"))
    patch.setattr(Path, "unlink", dying(Path.unlink, "unlink"))
    patch.setattr(files, "fsync", dying(files.fsync, "fsync"))
    return steps


def test_swap_that_is_gone_from_the_flavor_goes(tmp_path: Path, job: Job) -> None:
    grower = born(tmp_path, job, "qcow2", swap_mb=16)
    info = grower.grow(instance(IMAGE, {"root_gb": 1}), job)
    assert [d.name for d in info.disks] == ["disk"]
    assert not path(tmp_path, "disk.swap").exists()


def test_disks_that_were_never_finished_do_not_grow(tmp_path: Path, job: Job) -> None:
    with pytest.raises(errors.Broken, match=r"no disk\.info"):
        Grower(builder(tmp_path)).grow(instance(IMAGE), job)


def test_a_listed_ephemeral_beyond_the_flavor_is_refused(tmp_path: Path, job: Job) -> None:
    from compute_worker.objects import BlockDeviceInfo, EphemeralDisk

    grower = born(tmp_path, job, "qcow2", ephemeral_gb=1)
    listed = BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=5)])
    asked: Instance = instance(IMAGE, {"root_gb": 1, "ephemeral_gb": 1}, block_device_info=listed)
    with pytest.raises(errors.InvalidCommand, match="exceed"):
        grower.check(asked, DiskInfo(disks=[disk("disk", GIB)]))
