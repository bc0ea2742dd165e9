from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images import sparse
from compute_worker.images.file import FileStore
from compute_worker.images.store import ORIGIN, Hole
from compute_worker.objects import ImageMeta
from tests.images.support import Job, sha256

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cirros").write_bytes(b"0123456789")
    (tmp_path / "secret").write_bytes(b"root:x")
    return FileStore(Images(file_path=str(tmp_path / "images")))


def read(store: FileStore, image_id: str, offset: int = 0, validator: str | None = None) -> tuple[int, bytes]:
    opened = store.open(image_id, offset, validator)
    try:
        return opened.offset, b"".join(opened.chunks)
    finally:
        opened.close()


def test_bytes_from_any_offset(store: FileStore) -> None:
    assert store.stat("cirros").size_bytes == 10
    assert read(store, "cirros") == (0, b"0123456789")
    assert read(store, "cirros", 4, store.stat("cirros").validator) == (4, b"456789")


def test_a_changed_file_is_read_from_its_beginning(store: FileStore, tmp_path: Path) -> None:
    before = store.stat("cirros").validator
    (tmp_path / "images" / "cirros").write_bytes(b"abcdefghijk")
    assert read(store, "cirros", 4, before) == (0, b"abcdefghijk")


def test_what_is_not_a_file_inside_is_not_found(store: FileStore, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "out").symlink_to(tmp_path / "secret")
    (images / "loop").symlink_to("loop")
    (images / "dir").mkdir()
    os.mkfifo(images / "fifo")
    for image_id in ("nosuch", "out", "loop", "dir", "fifo", "../secret", "dir/x", "cirros/x"):
        with pytest.raises(errors.ImageNotFound):
            store.stat(image_id)
        with pytest.raises(errors.ImageNotFound):
            store.open(image_id)


def test_a_link_within_the_directory_is_an_alias(store: FileStore, tmp_path: Path) -> None:
    (tmp_path / "images" / "alias").symlink_to("cirros")
    assert read(store, "alias") == (0, b"0123456789")


def test_a_missing_directory_may_come_back(tmp_path: Path) -> None:
    with pytest.raises(errors.ImageStoreUnavailable, match="No such file"):
        FileStore(Images(file_path=str(tmp_path / "gone"))).stat("x")


def snapshot(operation: str = "op-1", **changes: Any) -> ImageMeta:
    properties = {ORIGIN: operation, **changes.pop("properties", {})}
    return ImageMeta(id="snap", disk_format="qcow2", properties=properties, **changes)


def names(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "images").iterdir())


def test_an_image_is_seen_when_published_and_not_before(store: FileStore, tmp_path: Path) -> None:
    image = snapshot()
    store.create(image)
    store.create(image)
    store.write("snap", iter([b"abc", b"def"]), 6)
    facts = store.write("snap", iter([b"abc", b"defg"]), 7)
    assert (facts.size_bytes, facts.checksum) == (7, sha256(b"abcdefg"))
    with pytest.raises(errors.ImageNotFound):
        store.stat("snap")
    assert store.list_images({ORIGIN: "op-1"}) == []
    assert store.publish("snap") == store.publish("snap")
    found = store.stat("snap")
    assert (found.size_bytes, found.checksum, found.disk_format) == (7, sha256(b"abcdefg"), "qcow2")
    assert read(store, "snap") == (0, b"abcdefg")
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(image)
    assert names(tmp_path) == [".snap.json", "cirros", "snap"]


def test_a_withdrawn_image_leaves_nothing(store: FileStore, tmp_path: Path) -> None:
    store.create(snapshot())
    with pytest.raises(errors.ImageUnacceptable, match="announced"):
        store.write("snap", iter([b"abc"]), 4)
    store.withdraw(snapshot())
    store.withdraw(snapshot())
    assert names(tmp_path) == ["cirros"]
    with pytest.raises(errors.ImageNotFound):
        store.publish("snap")


def test_also_a_published_one_and_never_another_operations(store: FileStore, tmp_path: Path) -> None:
    store.create(snapshot())
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(snapshot("op-2"))
    store.withdraw(snapshot("op-2"))
    store.write("snap", [b"abc"])
    store.publish("snap")
    store.withdraw(snapshot("op-2"))
    store.withdraw(ImageMeta(id="cirros", properties={ORIGIN: "op-2"}))
    assert names(tmp_path) == [".snap.json", "cirros", "snap"]
    store.withdraw(snapshot())
    assert names(tmp_path) == ["cirros"]


def test_an_image_that_came_meanwhile_is_not_replaced(store: FileStore, tmp_path: Path) -> None:
    store.create(snapshot())
    store.write("snap", [b"abc"])
    (tmp_path / "images" / "snap").write_bytes(b"theirs")
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.publish("snap")
    assert read(store, "snap") == (0, b"theirs")


@pytest.mark.parametrize("died", ["created", "written", "linked"])
def test_a_successor_goes_on_where_it_died(store: FileStore, tmp_path: Path, died: str) -> None:
    images = tmp_path / "images"
    store.create(snapshot())
    if died == "created":
        (images / ".snap.part").unlink()
    else:
        store.write("snap", [b"abc"])
    if died == "linked":
        os.link(images / ".snap.part", images / "snap")
    else:
        store = FileStore(Images(file_path=str(images)))
        store.create(snapshot())
        store.write("snap", [b"abc"])
    assert store.publish("snap").checksum == sha256(b"abc")
    assert names(tmp_path) == [".snap.json", "cirros", "snap"]


def test_nobody_else_reads_it(store: FileStore, tmp_path: Path) -> None:
    store.create(snapshot())
    store.write("snap", [b"abc"])
    assert (tmp_path / "images" / ".snap.part").stat().st_mode & 0o777 == 0o600
    store.publish("snap")
    assert (tmp_path / "images" / "snap").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "images" / ".snap.json").stat().st_mode & 0o777 == 0o600


def test_holes_take_no_place_and_count(store: FileStore) -> None:
    store.create(snapshot())
    pieces = [b"a" * 4096, Hole(64 << 20), b"z" * 4096, Hole(1 << 20)]
    facts = store.write("snap", pieces, job=Job())
    whole = b"a" * 4096 + bytes(64 << 20) + b"z" * 4096 + bytes(1 << 20)
    assert (facts.size_bytes, facts.checksum) == (len(whole), sha256(whole))
    store.publish("snap")
    path = store.local_path("snap")
    assert path is not None and path.stat().st_blocks * 512 <= 1 << 20
    assert path.read_bytes() == whole


def test_a_large_image_is_on_its_way_to_the_disk_before_its_end(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part once, in order, and the file is the same."""
    told: list[tuple[int, int]] = []
    write_out = sparse.write_out

    def see(fd: int, begin: int, end: int) -> None:
        told.append((begin, end))
        write_out(fd, begin, end)

    monkeypatch.setattr(sparse, "write_out", see)
    store.create(snapshot())
    store.write("snap", [bytes([number]) * MIB for number in range(37)])
    store.publish("snap")
    assert told == [(at * MIB, (at + 8) * MIB) for at in range(0, 32, 8)]
    assert read(store, "snap") == (0, b"".join(bytes([number]) * MIB for number in range(37)))


PATCHES = st.lists(
    st.tuples(st.integers(0, 200), st.one_of(st.binary(min_size=1, max_size=50), st.integers(1, 50).map(Hole))),
    max_size=6,
)


@settings(max_examples=50, deadline=None)
@given(parent=st.binary(max_size=250), patches=PATCHES, size=st.integers(250, 300))
def test_a_delta_over_a_copy_of_its_parent(
    tmp_path_factory: pytest.TempPathFactory, parent: bytes, patches: list[tuple[int, bytes | Hole]], size: int
) -> None:
    root = tmp_path_factory.mktemp("images")
    (root / "parent").write_bytes(parent)
    store = FileStore(Images(file_path=str(root)))
    expected = bytearray(parent.ljust(size, b"\0"))
    for offset, piece in patches:
        data = bytes(piece.size) if isinstance(piece, Hole) else piece
        expected[offset : offset + len(data)] = data
    store.create(snapshot())
    facts = store.write_delta("snap", "parent", iter(patches), size, Job())
    store.publish("snap")
    assert read(store, "snap") == (0, bytes(expected[:size]))
    assert facts.checksum == sha256(bytes(expected[:size]))
    assert (root / "parent").read_bytes() == parent


def test_a_parent_that_is_gone(store: FileStore) -> None:
    store.create(snapshot())
    with pytest.raises(errors.ImageNotFound):
        store.write_delta("snap", "nosuch", [(0, b"x")], 1)


def test_cancelled_between_two_pieces(store: FileStore, tmp_path: Path) -> None:
    job = Job()

    def pieces() -> Iterator[bytes]:
        yield b"abc"
        job.cancel()
        yield b"def"

    store.create(snapshot())
    with pytest.raises(errors.Cancelled):
        store.write("snap", pieces(), job=job)
    store.withdraw(snapshot())
    assert names(tmp_path) == ["cirros"]


def test_a_full_store_says_where(store: FileStore, tmp_path: Path) -> None:
    store.create(snapshot())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(errors.DiskFull, match=r"\.snap\.part"):
            store.write("snap", [bytes(1 << 19)] * 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    store.withdraw(snapshot())
    assert names(tmp_path) == ["cirros"]


def test_what_fails_where_the_pieces_come_from_is_no_fault_of_the_store(store: FileStore) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"abc"
        raise errors.GuestFailed(instance="x", reason="its disk is gone")

    store.create(snapshot())
    with pytest.raises(errors.GuestFailed):
        store.write("snap", pieces())


def test_listed_the_newest_first_by_properties(store: FileStore, tmp_path: Path) -> None:
    for number in range(3):
        image = ImageMeta(id=f"backup-{number}", name=f"n{number}", properties={"kind": "daily", "n": str(number % 2)})
        store.create(image)
        store.write(image.id, [b"abc"])
        store.publish(image.id)
    assert [found.image.id for found in store.list_images({"kind": "daily"})] == ["backup-2", "backup-1", "backup-0"]
    assert [found.image.name for found in store.list_images({"kind": "daily", "n": "0"})] == ["n2", "n0"]
    assert [found.image.id for found in store.list_images({"kind": "daily"}, limit=1)] == ["backup-2"]
    everything = {found.image.id: found.image for found in store.list_images({})}
    assert set(everything) == {"backup-0", "backup-1", "backup-2", "cirros"}
    assert everything["cirros"].size_bytes == 10
    store.delete("backup-1")
    store.delete("backup-1")
    assert not [name for name in names(tmp_path) if "backup-1" in name]


def test_a_note_counts_for_the_file_it_was_written_for(store: FileStore, tmp_path: Path) -> None:
    store.create(snapshot())
    store.write("snap", [b"abc"])
    store.publish("snap")
    (tmp_path / "images" / "snap").write_bytes(b"QFI\xfb and another file")
    assert store.stat("snap").checksum is None
    assert store.list_images({ORIGIN: "op-1"}) == []
    assert {f.image.id: f.image.disk_format for f in store.list_images({})} == {"cirros": "raw", "snap": "qcow2"}


@pytest.mark.parametrize("image_id", ["../x", "a/b", "", ".snap.json", "a\n"])
def test_an_id_is_never_a_path(store: FileStore, tmp_path: Path, image_id: str) -> None:
    for touch in (store.delete, store.publish, store.local_path, lambda name: store.write(name, [b"x"])):
        with pytest.raises(errors.ImageNotFound):
            touch(image_id)
    assert names(tmp_path) == ["cirros"]
