from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images.file import FileStore
from compute_worker.images.http import HttpStore
from compute_worker.images.store import CHUNK_BYTES, Hole, ImageFacts, ImageStore, ImageStores, Opened, flat
from compute_worker.objects import ImageMeta


class ReadOnly(ImageStore):
    name = "readonly"

    def stat(self, image_id: str) -> ImageFacts:
        return ImageFacts()

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        return Opened(0, iter(()), lambda: None, lambda: None)


def test_stores_come_by_name_once_and_the_default_is_configured(tmp_path: Path) -> None:
    stores = ImageStores(Images(store="file", file_path=str(tmp_path), http_url="http://127.0.0.1:1"))
    assert isinstance(stores.get(), FileStore)
    assert stores.get() is stores.get("file")
    assert isinstance(stores.get("http"), HttpStore)


@pytest.mark.parametrize(
    ("name", "says"),
    [("nosuch", "no such entry"), ("http", "http_url"), ("glance", "glance_url"), ("../x", "no such entry")],
)
def test_a_store_that_is_not_there_is_refused(name: str, says: str) -> None:
    with pytest.raises(errors.NotSupported, match=says):
        ImageStores(Images()).get(name)


@pytest.mark.parametrize("image_id", ["../x", "/etc/passwd", "a/b", "", ".x", "-x", "a..b", "x\0", "x\n", "a" * 129])
def test_ids_are_never_paths(image_id: str) -> None:
    with pytest.raises(errors.ImageNotFound):
        ReadOnly().check_id(image_id)


def test_holes_become_zeros_a_chunk_at_a_time() -> None:
    pieces = list(flat([b"ab", Hole(CHUNK_BYTES + 3), bytearray(b"c")]))
    assert [len(piece) for piece in pieces] == [2, CHUNK_BYTES, 3, 1]
    assert b"".join(pieces) == b"ab" + bytes(CHUNK_BYTES + 3) + b"c"


def test_a_store_takes_no_images_unless_it_says_how() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"

    store = ReadOnly()
    assert store.local_path("x") is None
    for call in (
        lambda: store.create(ImageMeta(id="x")),
        lambda: store.write("x", chunks()),
        lambda: store.publish("x"),
        lambda: store.withdraw(ImageMeta(id="x")),
        lambda: store.write_delta("x", "y", [], 0),
        lambda: store.list_images({}),
        lambda: store.delete("x"),
    ):
        with pytest.raises(errors.NotSupported, match="readonly"):
            call()
