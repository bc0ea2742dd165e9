"""Published attacks on image handling, replayed against the whole path from store to disk.

Each ends in one typed error before the guest has a disk, and leaves nothing but what is allowed: bases of good images.
"""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.images import fetch
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, ImageMeta
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.cache import base_name
from tests.images.support import Job, Site, qcow2, qcow2_header, qemu_img, sha256
from tests.virt.libvirt.disks.support import UUID, builder, instance, tree

SECRET = b"root:$6$secret-of-the-host:19000:0:99999:7:::\n" * 100
MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(params=["qcow2", "raw"])
def host(tmp_path: Path, request: pytest.FixtureRequest) -> DiskBuilder:
    (tmp_path / "shadow").write_bytes(SECRET)
    (tmp_path / "images").mkdir()
    return builder(tmp_path, libvirt={"images_type": request.param})


@pytest.fixture
def store(tmp_path: Path, host: DiskBuilder) -> Path:
    return tmp_path / "images"


def boot(host: DiskBuilder, disk_format: str, job: Job | None = None, root_gb: int = 1, **fields: Any) -> None:
    image = ImageMeta(id="evil", disk_format=disk_format, **fields)
    host.create_disks(instance(image, {"root_gb": root_gb}), SpawnRequest(), job or Job())


def refused(host: DiskBuilder, error: type[errors.ComputeError], *args: Any, **fields: Any) -> errors.ComputeError:
    """Boot, be refused, undo as the operation does; nothing may be left."""
    with pytest.raises(error) as caught:
        boot(host, *args, **fields)
    assert not (host.directory.path(UUID) / "disk").exists()
    host.remove(UUID)
    host.undo_prepare_images(instance(ImageMeta(id="evil", disk_format=args[0], **{
        key: value for key, value in fields.items() if key not in ("job", "root_gb")
    })))  # fmt: skip
    assert tree(host.directory.root) == set()
    assert "secret-of-the-host" not in str(caught.value.to_dict())
    return caught.value


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("declared", ["qcow2", "raw", "iso", "vmdk"])
def test_cve_2011_3147_backing_file(host: DiskBuilder, store: Path, tmp_path: Path, fmt: str, declared: str) -> None:
    backing = tmp_path / "shadow"
    if fmt == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "shadow", tmp_path / "neighbour")
        backing = tmp_path / "neighbour"
    qemu_img("create", "-f", "qcow2", "-F", fmt, "-b", backing, store / "evil", "8M")
    refused(host, errors.ImageUnacceptable, declared)


def test_cve_2011_3147_a_protocol_as_backing_file(host: DiskBuilder, store: Path) -> None:
    head = qcow2_header(size=8 * MIB, backing=b'json:{"driver":"file","filename":"/etc/shadow"}')
    (store / "evil").write_bytes(head.ljust(4 * 65_536, b"\0"))
    refused(host, errors.ImageUnacceptable, "qcow2")


def test_cve_2013_2096_virtual_size(host: DiskBuilder, store: Path) -> None:
    qemu_img("create", "-f", "qcow2", store / "evil", "512G")
    assert (store / "evil").stat().st_size < MIB
    error = refused(host, errors.FlavorDiskTooSmall, "qcow2")
    assert error.kwargs["needed"] == 512 * GIB


def test_cve_2013_2096_virtual_size_where_no_flavor_limits_it(host: DiskBuilder, store: Path) -> None:
    qemu_img("create", "-f", "qcow2", store / "evil", "2T")
    refused(host, errors.ImageUnacceptable, "qcow2", root_gb=0)


def test_cve_2013_4463_4469_a_bomb_is_not_unpacked(host: DiskBuilder, store: Path, job: Job) -> None:
    """1 GiB and a bit, compressed a thousandfold; it must be refused by its header, not by filling the disk."""
    with open(store / "flat", "wb") as flat:
        flat.write(b"\xaa" * (32 * MIB))
        flat.truncate(GIB + MIB)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", store / "flat", store / "evil")
    os.unlink(store / "flat")
    refused(host, errors.FlavorDiskTooSmall, "qcow2", job=job)
    assert {phase for phase, _, _ in job.reports} == {fetch.PHASE}


def test_cve_2013_4463_4469_a_cached_bomb_is_held_against_every_flavor(host: DiskBuilder, store: Path) -> None:
    qcow2(store / "evil", 1100, b"x")
    boot(host, "qcow2", root_gb=2)
    host.remove(UUID)
    with pytest.raises(errors.FlavorDiskTooSmall):
        boot(host, "qcow2", root_gb=1)


@pytest.mark.parametrize(
    "head",
    [
        qcow2_header(size=1 << 62),
        qcow2_header(size=8 * MIB, l1_size=0x7FFF_FFFF),
        qcow2_header(size=8 * MIB)[:20] + struct.pack(">I", 63) + qcow2_header(size=8 * MIB)[24:],
        qcow2_header(size=8 * MIB)[:56] + struct.pack(">I", 0xFFFF_FFFF) + qcow2_header(size=8 * MIB)[60:],
        qcow2_header(size=8 * MIB)[:60] + struct.pack(">IQ", 0xFFFF_FFFF, 65_536) + qcow2_header(size=8 * MIB)[72:],
    ],
    ids=["virtual size", "huge L1", "cluster bits", "refcount table", "snapshots"],
)
def test_cve_2015_5162_crafted_headers_cost_nothing(host: DiskBuilder, store: Path, head: bytes) -> None:
    (store / "evil").write_bytes(head.ljust(8 * 65_536, b"\0"))
    begin = time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    refused(host, errors.ImageUnacceptable, "qcow2")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used.ru_utime
    assert spent < 5
    assert time.monotonic() - begin < 30


def test_cve_2015_5162_limits_reach_qemu_img(
    host: DiskBuilder, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qemu-img that eats processor and memory, as the vulnerable ones did, is stopped."""
    tools = tmp_path / "tools"
    tools.mkdir()
    greedy = tools / "qemu-img"
    qcow2(store / "evil", 8)
    tight = builder(tmp_path, images={"qemu_img_cpu_seconds": 1, "qemu_img_memory_mb": 256})
    monkeypatch.setattr("compute_worker.virt.libvirt.disks.process.PATH", f"{tools}:/usr/bin")
    monkeypatch.setattr(
        "compute_worker.virt.libvirt.disks.process._ENVIRONMENT", {"PATH": f"{tools}:/usr/bin:/bin", "LC_ALL": "C"}
    )
    greedy.write_text("#!/bin/sh\nwhile :; do :; done\n")
    greedy.chmod(0o755)
    assert "SIGXCPU" in refused(tight, errors.ImageUnacceptable, "qcow2").message
    greedy.write_text(f"#!{sys.executable} -I\nbytearray(1 << 30)\n")
    assert "MemoryError" in refused(tight, errors.ImageUnacceptable, "qcow2").message


def vmdk_descriptor(kind: str, extent: str) -> str:
    return f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="{kind}"\n{extent}\nddb.x = "1"\n'


def sparse_vmdk(text: str, capacity: int) -> bytes:
    head = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, capacity, 128, 1, 20, 512, 21, 26, 128)
    return (head.ljust(512, b"\0") + text.encode()).ljust(128 * 512, b"\0") + bytes(MIB)


@pytest.mark.parametrize("declared", ["vmdk", "raw", "qcow2"])
@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentFlat", "streamOptimized", "monolithicSparse"])
def test_cve_2022_47951_vmdk_descriptor(
    host: DiskBuilder, store: Path, tmp_path: Path, kind: str, declared: str
) -> None:
    extent = f'RW 9 FLAT "{tmp_path / "shadow"}" 0'
    (store / "evil").write_text(vmdk_descriptor(kind, extent))
    refused(host, errors.ImageUnacceptable, declared)


@pytest.mark.parametrize(
    ("capacity", "name"),
    [(0, "/etc/shadow"), (16_384, "/etc/shadow"), (0, "0123456789abcdef0123456789abcdef01234567_0123456789ab")],
)
def test_cve_2022_47951_vmdk_descriptor_inside(host: DiskBuilder, store: Path, capacity: int, name: str) -> None:
    """Also an extent beside it, which in the cache would be another tenant's image."""
    for kind in ("monolithicSparse", "monolithicFlat"):
        text = vmdk_descriptor(kind, f'RW 16384 FLAT "{name}" 0')
        (store / "evil").write_bytes(sparse_vmdk(text, capacity))
        refused(host, errors.ImageUnacceptable, "vmdk")


def test_cve_2022_47951_vmdk_parent(host: DiskBuilder, store: Path, tmp_path: Path) -> None:
    """The VMDK's own kind of backing file, in a descriptor that is otherwise allowed."""
    for path in (store / "evil", tmp_path / "shadow"):
        qemu_img("create", "-f", "vmdk", "-o", "subformat=monolithicSparse", path, "8M")
    content = (store / "evil").read_bytes()
    hint = f'\nparentFileNameHint="{tmp_path}/shadow"\n'.encode()
    at = content.index(b"\n# Extent description")
    end = content.index(b"\0", at)
    text = content[512:at] + hint + content[at:end]
    (store / "evil").write_bytes(content[:512] + text.ljust(20 * 512, b"\0") + content[512 + 20 * 512 :])
    assert "it has a backing file" in refused(host, errors.ImageUnacceptable, "vmdk").message


@pytest.mark.parametrize("declared", ["qcow2", "raw"])
def test_cve_2024_32498_external_data_file(host: DiskBuilder, store: Path, tmp_path: Path, declared: str) -> None:
    evil, data = store / "evil", tmp_path / "data"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", evil, "1M")
    os.unlink(data)
    content = evil.read_bytes().replace(str(data).encode(), str(tmp_path / "shadow").encode()[: len(str(data))])
    evil.write_bytes(content)
    refused(host, errors.ImageUnacceptable, declared)


def test_cve_2024_40767_declared_raw_is_qcow2(host: DiskBuilder, store: Path, tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "shadow", store / "evil", "8M")
    error = refused(host, errors.ImageUnacceptable, "raw")
    assert "declared raw, its bytes are qcow2" in error.message


def test_cve_2024_40767_what_is_cached_already_is_looked_at_again(
    host: DiskBuilder, store: Path, tmp_path: Path
) -> None:
    (store / "evil").write_bytes(b"harmless" * 100_000)
    boot(host, "raw")
    host.remove(UUID)
    base = host.directory.base / base_name(ImageMeta(id="evil", disk_format="raw"))
    os.unlink(base)
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "shadow", base, "8M")
    with pytest.raises(errors.ImageUnacceptable, match="in the cache must be raw"):
        boot(host, "raw")
    host.undo_prepare_images(instance(ImageMeta(id="evil", disk_format="raw")))
    assert tree(host.directory.root) == {f"_base/{base.name}"}


def test_cve_2024_40767_a_cached_format_does_not_excuse_another_declaration(host: DiskBuilder, store: Path) -> None:
    qcow2(store / "evil", 8, b"good")
    boot(host, "qcow2")
    host.remove(UUID)
    with pytest.raises(errors.ImageUnacceptable, match="declared raw"):
        boot(host, "raw")


def test_cve_2024_4467_an_image_inside_the_image(host: DiskBuilder, store: Path, tmp_path: Path) -> None:
    """The outer qcow2 is clean; its content, once unpacked, would be a qcow2 over a host file."""
    inner = tmp_path / "inner"
    qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "shadow", inner, "8M")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", inner, store / "evil")
    refused(host, errors.ImageUnacceptable, "qcow2")


def test_cve_2014_0134_2015_7548_2026_24708_a_header_written_by_the_guest_is_data(
    tmp_path: Path, host: DiskBuilder, store: Path
) -> None:
    """The guest of a raw disk writes a qcow2 header over it; whatever we do next treats the disk as raw."""
    (store / "evil").write_bytes(bytes(MIB))
    boot(host, "raw")
    disk = host.directory.path(UUID) / "disk"
    info = host.disk_info(UUID)
    assert info is not None
    fmt = info.disks[0].format
    if fmt == "raw":
        qemu_img("create", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "shadow", tmp_path / "header", "8M")
        with open(disk, "r+b") as guest:
            guest.write((tmp_path / "header").read_bytes())
    assert host.qemu_img.resize(disk, fmt, 2 * GIB, Job())
    assert host.qemu_img.info(disk, fmt, Job()).virtual_size_bytes == 2 * GIB
    flat = tmp_path / "flat"
    host.qemu_img.convert(disk, fmt, flat, "raw", 2 * GIB, Job(), "reading")
    with open(flat, "rb") as content:
        assert SECRET[:40] not in content.read(16 * MIB)


def test_cve_2013_6437_os_types_make_no_bases(host: DiskBuilder, store: Path) -> None:
    (store / "evil").write_bytes(b"x" * MIB)
    for number in range(8):
        image = ImageMeta(id="evil", os_type=f"os{number}/../../x")
        host.create_disks(instance(image, {"root_gb": 1, "ephemeral_gb": 1}), SpawnRequest(), Job())
        host.remove(UUID)
    assert tree(host.directory.root) == {f"_base/{base_name(ImageMeta(id='evil'))}", "_base/ephemeral_1_ext4"}


@pytest.mark.parametrize(
    "image_id", ["../shadow", "../../shadow", "/etc/shadow", "evil/../../shadow", "..", "evil\0", "-evil"]
)
@pytest.mark.parametrize("as_kernel", [False, True])
def test_cve_2011_4596_traversal_in_ids(host: DiskBuilder, store: Path, image_id: str, as_kernel: bool) -> None:
    """What the wire would refuse is refused here too, were it ever to come by another way."""
    (store / "evil").write_bytes(b"x" * MIB)
    bad = ImageMeta(id="evil", kernel_id=image_id) if as_kernel else ImageMeta(id=image_id)
    with pytest.raises(errors.ImageNotFound):
        host.create_disks(instance(bad), SpawnRequest(), Job())
    host.undo_prepare_images(instance(bad))
    assert tree(host.directory.root) == set()


def test_a_file_system_nobody_can_make_is_refused_first(host: DiskBuilder, store: Path) -> None:
    listed = BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1, guest_format="ext4; rm -rf /")])
    guest = instance(ImageMeta(id="evil"), {"ephemeral_gb": 1}, block_device_info=listed)
    with pytest.raises(errors.InvalidBDMFormat):
        host.create_disks(guest, SpawnRequest(), Job())
    assert tree(host.directory.root) == set()


def test_a_wrong_checksum(host: DiskBuilder, store: Path) -> None:
    (store / "evil").write_bytes(b"x" * MIB)
    refused(host, errors.ImageChecksumMismatch, "raw", checksum_algorithm="sha256", checksum=sha256(b"other"))


@pytest.mark.parametrize("declared", ["qcow2", "vmdk", "vdi", "vhd", "vhdx", "iso"])
def test_bytes_that_are_not_what_they_say(host: DiskBuilder, store: Path, declared: str) -> None:
    (store / "evil").write_bytes(os.urandom(MIB))
    refused(host, errors.ImageUnacceptable, declared)


@pytest.mark.parametrize("declared", ["qcow2", "vmdk", "vhdx"])
def test_images_cut_short(host: DiskBuilder, store: Path, tmp_path: Path, declared: str) -> None:
    (tmp_path / "flat").write_bytes(os.urandom(MIB))
    qemu_img("convert", "-f", "raw", "-O", declared, tmp_path / "flat", tmp_path / "whole")
    (store / "evil").write_bytes((tmp_path / "whole").read_bytes()[:40_000])
    refused(host, errors.ImageUnacceptable, declared)


def test_an_empty_image(host: DiskBuilder, store: Path) -> None:
    (store / "evil").touch()
    refused(host, errors.ImageUnacceptable, "raw")


def test_a_truncated_download(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_FIRST_DELAY", 0.001)
    site.files["/evil"] = os.urandom(MIB)
    site.ranges = False
    site.cut = [1000] * 100
    remote = builder(tmp_path, images={"store": "http", "http_url": site.url})
    refused(remote, errors.ImageStoreUnavailable, "raw")
    assert len(site.gets()) == 6


def test_a_download_that_never_ends(site: Site, tmp_path: Path) -> None:
    """No length is announced, and more comes than this host takes: it stops there."""
    site.answers["/evil"] = (200, {"Content-Length": "", "Connection": "close"}, os.urandom(2 * MIB))
    remote = builder(tmp_path, images={"store": "http", "http_url": site.url})
    assert "more than" in refused(remote, errors.ImageUnacceptable, "raw", size_bytes=MIB).message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB (root), else a limit on the size of every file."""
    target = tmp_path / "small"
    target.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", target], check=False, capture_output=True
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted.returncode != 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (24 * MIB, before[1]))
    try:
        yield target
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted.returncode == 0:
            subprocess.run(["umount", target], check=True)


@pytest.mark.parametrize("where", ["download", "conversion"])
def test_a_full_disk(small_disk: Path, tmp_path: Path, where: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[1], before[1]))
    if where == "download":
        (images / "evil").write_bytes(os.urandom(MIB) * 32)
    else:
        qcow2(images / "evil", 64, b"\xaa" * (48 * MIB), compress="yes")
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    host = builder(small_disk, images={"file_path": str(images)})
    error = refused(host, errors.DiskFull, "raw" if where == "download" else "qcow2")
    assert str(small_disk) in error.message
    assert error.reschedulable
