from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import DiskInfo, ImageMeta, Instance
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks.bases import PREFIX, MovingBases, Standing, content_digest, made_here
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.cache import base_name
from compute_worker.virt.libvirt.disks.instance_dir import Arrival
from tests.images.support import Job
from tests.virt.libvirt.disks.support import UUID, builder, instance

IMAGE = ImageMeta(id="img", kernel_id="vmlinuz")
MIGRATION = "4f5b8f01-93b6-4d55-8a0e-0c7e1b8c2a8a"
EPHEMERAL = "ephemeral_1_ext4"
GUEST = instance(IMAGE, {"root_gb": 1, "ephemeral_gb": 1}, migration=MIGRATION)


@pytest.fixture
def source(tmp_path: Path, job: Job) -> DiskBuilder:
    """A host with the instance."""
    host = host_at(tmp_path / "source")
    host.create_disks(GUEST, SpawnRequest(), job)
    return host


@pytest.fixture
def there(tmp_path: Path) -> DiskBuilder:
    """The host it goes to."""
    return host_at(tmp_path / "there")


def host_at(root: Path) -> DiskBuilder:
    root.mkdir()
    (root / "images").mkdir()
    (root / "images" / "img").write_bytes(b"bootable " * 10_000)
    (root / "images" / "vmlinuz").write_bytes(b"kernel " * 1000)
    return builder(root)


def standing(source: DiskBuilder, job: Job) -> tuple[DiskInfo, list[Standing]]:
    info = source.directory.read_disk_info(UUID)
    assert info is not None
    return info, MovingBases(source).standing(info, job)


def send(source: DiskBuilder, there: DiskBuilder, names: list[str]) -> None:
    """As a transport does: disks, and these files of the source."""
    target = there.directory.create(UUID)
    files = {f"{PREFIX}{path.name}": path for path in source.directory.base.iterdir()}
    files["kernel"] = source.directory.path(UUID) / "kernel"
    for name in names:
        subprocess.run(["cp", "--sparse=always", files[name], target / name], check=True, timeout=20)
    info = source.directory.read_disk_info(UUID)
    assert info is not None
    for disk in info.disks:
        subprocess.run(["cp", source.directory.path(UUID) / disk.name, target], check=True, timeout=20)
    there.directory.write_disk_info(UUID, info)


def arrival(bases: list[Standing]) -> Arrival:
    return Arrival(MIGRATION, bases={one.name: one.digest for one in bases if one.digest})


def differ(path: Path) -> None:
    """A base as another mkfs would have made it."""
    with open(path, "r+b") as file:
        file.seek(1 << 20)
        file.write(b"other")


def guest_sees(host: DiskBuilder, name: str) -> str:
    """Digest of a disk as its guest reads it."""
    out = host.directory.root / "seen"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", host.directory.path(UUID) / name, out],
                   check=True, timeout=20)  # fmt: skip
    found = content_digest(out, Job())
    out.unlink()
    return found


# --- digests ------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(pieces=st.dictionaries(st.integers(0, 40), st.sampled_from([b"\0" * 4096, b"x" * 4096]), max_size=6))
def test_a_digest_does_not_see_holes(tmp_path_factory: pytest.TempPathFactory, pieces: dict[int, bytes]) -> None:
    root, size = tmp_path_factory.mktemp("digest"), 64 * 4096 + 5
    content = bytearray(size)
    with open(root / "sparse", "wb") as sparse:
        for at, piece in pieces.items():
            content[at * 4096 : (at + 1) * 4096] = piece
            sparse.seek(at * 4096)
            sparse.write(piece)
        sparse.truncate(size)
    (root / "full").write_bytes(content)
    (root / "longer").write_bytes(bytes(content) + b"\0")
    (root / "other").write_bytes(bytes(content[:-1]) + b"z")
    digests = [content_digest(root / name, Job()) for name in ("sparse", "full", "longer", "other")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_only_bases_made_here_are_compared_by_their_bytes(source: DiskBuilder, job: Job) -> None:
    _, found = standing(source, job)
    assert {one.name: bool(one.digest) for one in found} == {base_name(IMAGE): False, EPHEMERAL: True}
    assert {one.name: made_here(one.name) for one in found} == {base_name(IMAGE): False, EPHEMERAL: True}
    filled = [MovingBases(source).with_digest(one, job) for one in found]
    assert all(len(one.digest) == 64 for one in filled)


# --- the destination ----------------------------------------------------------------------------------------------


def test_what_the_store_has_and_mkfs_makes_is_not_sent(source: DiskBuilder, there: DiskBuilder, job: Job) -> None:
    info, bases = standing(source, job)
    assert MovingBases(there).wanted(GUEST, info, bases, job) == {}
    send(source, there, [])
    for _ in range(2):
        MovingBases(there).settle(GUEST, arrival(bases), job)
    assert there.directory.read_disk_info(UUID) == info
    assert (there.directory.path(UUID) / "kernel").exists()
    assert {name: guest_sees(there, name) for name in ("disk", "disk.local")} == {
        name: guest_sees(source, name) for name in ("disk", "disk.local")
    }


def test_an_image_that_is_gone_comes_from_the_source(
    source: DiskBuilder, there: DiskBuilder, job: Job, tmp_path: Path
) -> None:
    for name in ("img", "vmlinuz"):
        (tmp_path / "there" / "images" / name).unlink()
    info, bases = standing(source, job)
    wanted = MovingBases(there).wanted(GUEST, info, bases, job)
    assert set(wanted) == {PREFIX + base_name(IMAGE), "kernel"}
    assert "is not in store" in wanted["kernel"]
    send(source, there, list(wanted))
    assert MovingBases(there).wanted(GUEST, info, bases, job) == {}, "it has come"
    with pytest.raises(errors.MigrationFailed, match="not what the source has"):
        MovingBases(there).settle(GUEST, arrival(bases), job)
    bases = [MovingBases(source).with_digest(one, job) for one in bases]
    for _ in range(2):
        MovingBases(there).settle(GUEST, arrival(bases), job)
    base = there.directory.base / base_name(IMAGE)
    assert base.read_bytes() == (source.directory.base / base.name).read_bytes()
    assert base.stat().st_mode & 0o777 == 0o644
    assert {name for name in os.listdir(there.directory.path(UUID)) if name.startswith(PREFIX)} == set()
    assert guest_sees(there, "disk") == guest_sees(source, "disk")


def test_a_base_that_was_altered_on_the_way_is_not_taken(source: DiskBuilder, there: DiskBuilder, job: Job) -> None:
    _, bases = standing(source, job)
    bases = [MovingBases(source).with_digest(one, job) for one in bases]
    send(source, there, [PREFIX + base_name(IMAGE)])
    sent = there.directory.path(UUID) / (PREFIX + base_name(IMAGE))
    sent.write_bytes(sent.read_bytes().replace(b"bootable", b"bootAble", 1))
    with pytest.raises(errors.MigrationFailed, match="not what the source has"):
        MovingBases(there).settle(GUEST, arrival(bases), job)
    assert not (there.directory.base / base_name(IMAGE)).exists()


def test_a_base_made_here_with_other_bytes_stays_and_the_source_s_comes_beside_it(
    source: DiskBuilder, there: DiskBuilder, job: Job
) -> None:
    info, bases = standing(source, job)
    MovingBases(there).wanted(GUEST, info, bases, job)
    differ(there.directory.base / EPHEMERAL)
    wanted = MovingBases(there).wanted(GUEST, info, bases, job)
    assert wanted == {PREFIX + EPHEMERAL: "the one made here has other bytes"}
    send(source, there, list(wanted))
    for _ in range(2):
        MovingBases(there).settle(GUEST, arrival(bases), job)
    digest = next(one.digest for one in bases if one.name == EPHEMERAL)
    name = f"{EPHEMERAL}_x{digest[:12]}"
    found = there.directory.read_disk_info(UUID)
    assert found is not None
    assert {disk.name: disk.backing for disk in found.disks}["disk.local"] == name
    assert guest_sees(there, "disk.local") == guest_sees(source, "disk.local")
    assert name in MovingBases(there).names(bases)
    assert MovingBases(there).wanted(GUEST, info, bases, job) == {}, "the next one finds it"
    assert EPHEMERAL in there.cache.prune({"img"}, now=1e12), "nobody uses it"
    assert (there.directory.base / name).exists(), "somebody does"
    (there.directory.base / name).unlink()
    with pytest.raises(errors.Broken, match="came from another host and is gone"):
        there.restore_bases(GUEST, job)


@pytest.mark.parametrize("when", ["cut short", "made anew"])
def test_it_moves_on_to_a_third_host(
    source: DiskBuilder, there: DiskBuilder, job: Job, tmp_path: Path, when: str
) -> None:
    """A base that came from elsewhere keeps its name and is never made anew."""
    info, bases = standing(source, job)
    digest = next(one.digest for one in bases if one.name == EPHEMERAL)
    name = f"{EPHEMERAL}_x{digest[:12]}"
    os.rename(source.directory.base / EPHEMERAL, source.directory.base / name)
    disks = [msgspec.structs.replace(d, backing=name) if d.backing == EPHEMERAL else d for d in info.disks]
    source.directory.write_disk_info(UUID, msgspec.structs.replace(info, disks=disks))
    source.qemu_img.point_to(source.directory.path(UUID) / "disk.local", f"../_base/{name}", "raw", job)
    info, bases = standing(source, job)
    third = MovingBases(there)
    if when == "made anew":
        third.wanted(GUEST, info, bases, job)
    assert third.wanted(GUEST, info, bases, job) == {PREFIX + name: "it is not here"}
    send(source, there, [PREFIX + name])
    third.settle(GUEST, arrival(bases), job)
    assert guest_sees(there, "disk.local") == guest_sees(source, "disk.local")


def test_a_base_of_another_size_is_said_before_anything_moves(
    source: DiskBuilder, there: DiskBuilder, job: Job
) -> None:
    info, bases = standing(source, job)
    (there.directory.base / base_name(IMAGE)).write_bytes(b"another image under the same name")
    with pytest.raises(errors.MigrationFailed, match=r"has 33 bytes here and \d+ at the source"):
        MovingBases(there).wanted(GUEST, info, bases, job)


def test_a_file_system_that_cannot_be_made_there_is_sent(
    source: DiskBuilder, there: DiskBuilder, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compute_worker.virt.libvirt.disks import ephemeral

    info, bases = standing(source, job)
    monkeypatch.delitem(ephemeral._MAKERS, "ext4")
    wanted = MovingBases(there).wanted(GUEST, info, bases, job)
    assert set(wanted) == {PREFIX + EPHEMERAL} and "cannot be made here" in wanted[PREFIX + EPHEMERAL]
    send(source, there, list(wanted))
    MovingBases(there).settle(GUEST, arrival(bases), job)
    assert guest_sees(there, "disk.local") == guest_sees(source, "disk.local")


def test_a_missing_base_at_the_source_is_named(source: DiskBuilder, job: Job) -> None:
    info, _ = standing(source, job)
    (source.directory.base / EPHEMERAL).unlink()
    with pytest.raises(errors.Broken, match=EPHEMERAL):
        MovingBases(source).standing(info, job)


def test_only_its_own_files_are_offered(source: DiskBuilder, job: Job) -> None:
    _, bases = standing(source, job)
    directory = source.directory.path(UUID)
    assert set(MovingBases(source).offered(bases, directory)) == {
        "kernel", "ramdisk", PREFIX + EPHEMERAL, PREFIX + base_name(IMAGE)
    }  # fmt: skip


def test_an_instance_without_disks_has_no_bases(there: DiskBuilder, job: Job) -> None:
    guest: Instance = GUEST
    with pytest.raises(errors.Broken, match=r"no disk\.info"):
        MovingBases(there).settle(guest, arrival([]), job)
