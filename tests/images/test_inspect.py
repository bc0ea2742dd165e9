from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.images import inspect
from tests.images.support import Job, qcow2, qcow2_header, qemu_img

MBR = bytes(446) + struct.pack("<B3BB3BII", 0x80, 0, 2, 0, 0x83, 1, 1, 1, 2048, 4096) + bytes(48) + b"\x55\xaa"
SUPERFLOPPY = b"\xeb\x3c\x90NTFS    ".ljust(510, b"\x11") + b"\x55\xaa"


def look(path: Path, declared: str, job: Job) -> inspect.Inspection:
    return inspect.inspect(path, "img", declared, job)


def made(path: Path, fmt: str, *options: str) -> Path:
    qemu_img("create", "-q", "-f", fmt, *options, path, "8M")
    return path


@pytest.mark.parametrize(
    ("fmt", "declared", "options"),
    [
        ("qcow2", "qcow2", ()),
        ("qcow2", "qcow2", ("-o", "compat=0.10")),
        ("vmdk", "vmdk", ("-o", "subformat=monolithicSparse")),
        ("vdi", "vdi", ()),
        ("vhdx", "vhdx", ()),
        ("vpc", "vhd", ()),
    ],
)
def test_good_images(tmp_path: Path, job: Job, fmt: str, declared: str, options: tuple[str, ...]) -> None:
    found = look(made(tmp_path / "x", fmt, *options), declared, job)
    assert found.disk_format == declared
    assert 8 << 20 <= found.virtual_size_bytes < 9 << 20


def test_a_stream_optimized_vmdk(tmp_path: Path, job: Job) -> None:
    source = made(tmp_path / "raw", "raw")
    source.write_bytes(b"x" * (8 << 20))
    options = ["-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    qemu_img("convert", *options, source, tmp_path / "x")
    assert look(tmp_path / "x", "vmdk", job).virtual_size_bytes == 8 << 20


@pytest.mark.parametrize("content", [b"anything", bytes(40_000), MBR + bytes(100_000), SUPERFLOPPY + bytes(100_000)])
@pytest.mark.parametrize("declared", ["raw", "aki", "ari"])
def test_raw_is_what_nothing_else_is(tmp_path: Path, job: Job, content: bytes, declared: str) -> None:
    (tmp_path / "x").write_bytes(content)
    found = look(tmp_path / "x", declared, job)
    assert found.virtual_size_bytes == -(-len(content) // 512) * 512


def test_iso_alone_and_with_a_partition_table(tmp_path: Path, job: Job) -> None:
    iso = bytearray(40_000)
    iso[32_768:32_775] = b"\1CD001\1"
    (tmp_path / "plain").write_bytes(iso)
    iso[: len(MBR)] = MBR
    (tmp_path / "hybrid").write_bytes(iso)
    for name in ("plain", "hybrid"):
        assert look(tmp_path / name, "iso", job).disk_format == "iso"
        with pytest.raises(errors.ImageUnacceptable, match=r"declared raw, its bytes are .*iso"):
            look(tmp_path / name, "raw", job)


@pytest.mark.parametrize("actual", ["qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed", "luks"])
@pytest.mark.parametrize("declared", ["raw", "aki", "ari", "iso", "qcow2"])
def test_what_was_declared_must_be_found(tmp_path: Path, job: Job, actual: str, declared: str) -> None:
    if actual == declared:
        return
    path = tmp_path / "x"
    if actual == "luks":
        path.write_bytes(b"LUKS\xba\xbe\0\1".ljust(100_000, b"\0"))
    else:
        made(path, actual)
    with pytest.raises(errors.ImageUnacceptable, match=f"declared {declared}"):
        look(path, declared, job)


def test_two_formats_at_once_are_neither(tmp_path: Path, job: Job) -> None:
    both = bytearray(made(tmp_path / "x", "qcow2").read_bytes().ljust(40_000, b"\0"))
    both[32_768:32_775] = b"\1CD001\1"
    (tmp_path / "x").write_bytes(both)
    for declared in ("qcow2", "iso", "raw"):
        with pytest.raises(errors.ImageUnacceptable, match="iso and qcow2"):
            look(tmp_path / "x", declared, job)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (qcow2_header(size=1 << 20, backing=b"/etc/passwd"), "backing_file"),
        (qcow2_header(size=1 << 20, incompatible=1 << 2), "data_file"),
        (qcow2_header(size=1 << 20, incompatible=1 << 60), "unknown_features"),
        (qcow2_header(size=1 << 20, version=9), "unknown_features"),
        (qcow2_header(size=1 << 20, crypt=2), "encrypted"),
        (qcow2_header(size=0), "no size"),
    ],
)
def test_qcow2_headers_that_are_refused(tmp_path: Path, job: Job, head: bytes, says: str) -> None:
    (tmp_path / "x").write_bytes(head.ljust(400_000, b"\0"))
    with pytest.raises(errors.ImageUnacceptable, match=says):
        look(tmp_path / "x", "qcow2", job)


def vmdk(descriptor: str, capacity: int = 16_384) -> bytes:
    head = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, capacity, 128, 1, 20, 512, 21, 26, 128)
    return head.ljust(512, b"\0") + descriptor.encode().ljust(20 * 512, b"\0") + bytes(100_000)


def descriptor(kind: str, extent: str) -> str:
    return f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="{kind}"\n{extent}\n'


@pytest.mark.parametrize(
    "content",
    [
        vmdk(descriptor("monolithicFlat", 'RW 16384 FLAT "/etc/passwd" 0')),
        vmdk(descriptor("twoGbMaxExtentSparse", 'RW 16384 SPARSE "x-s001.vmdk"')),
        vmdk(descriptor("monolithicSparse", 'RW 16384 FLAT "/etc/passwd" 0')),
        vmdk(descriptor("monolithicSparse", 'RW 16384 FLAT "neighbour" 0'), capacity=0),
        vmdk("nonsense here\n"),
        vmdk(""),
        descriptor("monolithicFlat", 'RW 16384 FLAT "/etc/passwd" 0').encode(),
        descriptor("monolithicSparse", 'RW 16384 SPARSE "neighbour"').encode(),
        descriptor("streamOptimized", 'RW 16384 SPARSE "neighbour"').encode().ljust(2000, b"#"),
    ],
)
def test_vmdk_that_names_other_files(tmp_path: Path, job: Job, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(errors.ImageUnacceptable):
        look(tmp_path / "x", "vmdk", job)


def test_unknown_declarations(tmp_path: Path, job: Job) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(errors.ImageUnacceptable, match="'ploop'"):
        look(tmp_path / "x", "ploop", job)


def test_looking_at_a_large_file_is_cancelled(tmp_path: Path, job: Job) -> None:
    (tmp_path / "x").write_bytes(b"x" * 500_000)
    job.cancel()
    with pytest.raises(errors.Cancelled):
        look(tmp_path / "x", "raw", job)


@settings(max_examples=150, deadline=None)
@given(
    head=st.sampled_from([b"", b"QFI\xfb", b"KDMV", b"vhdxfile", b"conectix", b"QED\0", b"LUKS\xba\xbe", b"# Disk"]),
    body=st.binary(max_size=600),
    pad=st.sampled_from([0, 4000, 300_000]),
    declared=st.sampled_from(sorted(inspect.ACCEPTED)),
)
def test_any_bytes_are_accepted_or_refused_by_one_error(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, body: bytes, pad: int, declared: str
) -> None:
    path = tmp_path_factory.mktemp("inspect") / "x"
    path.write_bytes(head + body + bytes(pad))
    try:
        found = look(path, declared, Job())
    except errors.ImageUnacceptable:
        return
    assert found.disk_format == declared
    if declared in inspect.PLAIN:
        assert found.virtual_size_bytes >= path.stat().st_size
    else:
        assert found.virtual_size_bytes > 0


def test_a_base_is_checked_by_its_beginning_alone(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(MBR)
    with open(base, "r+b") as out:
        out.truncate(1 << 40)
    assert inspect.check_base(base, "img") == 1 << 40


@pytest.mark.parametrize("fmt", ["qcow2", "vmdk", "vdi", "vhdx", "qed", "vpc"])
def test_a_base_that_is_an_image_is_refused(tmp_path: Path, fmt: str) -> None:
    with pytest.raises(errors.ImageUnacceptable, match="in the cache must be raw"):
        inspect.check_base(made(tmp_path / "base", fmt), "img")


def test_a_base_that_is_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").touch()
    with pytest.raises(errors.ImageUnacceptable, match="empty"):
        inspect.check_base(tmp_path / "base", "img")


def test_compressed_qcow2(tmp_path: Path, job: Job) -> None:
    path = qcow2(tmp_path / "x", 8, b"content" * 10_000, compress="yes")
    assert look(path, "qcow2", job).virtual_size_bytes == 8 << 20
