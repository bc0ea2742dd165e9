from __future__ import annotations

import os
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images.file import FileStore
from compute_worker.objects import ImageMeta


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


def test_an_image_is_seen_when_published_and_not_before(store: FileStore, tmp_path: Path) -> None:
    image = ImageMeta(id="snap")
    store.create(image)
    store.create(image)
    store.write("snap", iter([b"abc", b"def"]), 6)
    store.write("snap", iter([b"abc", b"defg"]), 7)
    with pytest.raises(errors.ImageNotFound):
        store.stat("snap")
    assert store.publish("snap").size_bytes == 7
    assert store.publish("snap").size_bytes == 7
    store.abort("snap")
    assert read(store, "snap") == (0, b"abcdefg")
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(image)


def test_an_aborted_image_leaves_nothing(store: FileStore, tmp_path: Path) -> None:
    store.create(ImageMeta(id="snap"))
    with pytest.raises(errors.ImageUnacceptable, match="announced"):
        store.write("snap", iter([b"abc"]), 4)
    store.abort("snap")
    store.abort("snap")
    assert [entry.name for entry in (tmp_path / "images").iterdir()] == ["cirros"]
    with pytest.raises(errors.ImageNotFound):
        store.publish("snap")
