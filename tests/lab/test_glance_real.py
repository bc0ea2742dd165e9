"""The glance store against Glance itself: what goes in comes out, is listed, and is gone when it is withdrawn."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images import fetch
from compute_worker.images.glance import GlanceStore
from compute_worker.images.store import ORIGIN, Hole, ImageFacts
from compute_worker.objects import ImageMeta
from tests.images.support import Job, qcow2, sha256
from tests.lab import glance
from tests.waiting import wait_for

pytestmark = pytest.mark.lab

DATA = bytes(range(256)) * 4096
PIECES = [DATA, Hole(5 << 20), DATA]
WHOLE = DATA + bytes(5 << 20) + DATA


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    directory = tmp_path_factory.mktemp("glance")
    with glance.running(directory) as url:
        yield url, directory


@pytest.fixture(params=[False, True], ids=["upload", "import"])
def store(service: tuple[str, Path], request: pytest.FixtureRequest) -> GlanceStore:
    return GlanceStore(Images(glance_url=service[0], glance_import=request.param))


def snapshot(operation: str = "op-1", **changes: object) -> ImageMeta:
    fields: dict[str, object] = {
        "id": str(uuid.uuid4()),
        "name": "golden \N{SNOWMAN} 'x' \"y\"",
        "disk_format": "raw",
        "min_disk_gb": 1,
        "os_type": "linux",
        "properties": {ORIGIN: operation, "base_image_ref": "base", "image_type": "backup"},
    }
    return ImageMeta(**(fields | changes))  # type: ignore[arg-type]


def publish(store: GlanceStore, image_id: str) -> ImageFacts:
    found: list[ImageFacts] = []

    def try_it() -> bool:
        try:
            found.append(store.publish(image_id))
        except errors.ImageImporting:
            return False
        return True

    wait_for(try_it, deadline=60, what="the image to be active")
    return found[0]


@pytest.mark.parametrize("size", [None, len(WHOLE)])
def test_in_and_out(store: GlanceStore, size: int | None, tmp_path: Path) -> None:
    image = snapshot()
    store.create(image)
    store.create(image)
    facts = store.write(image.id, iter(PIECES), size, Job())
    assert (facts.size_bytes, facts.checksum) == (len(WHOLE), sha256(WHOLE))
    published = publish(store, image.id)
    assert (published.size_bytes, published.checksum_algorithm) == (len(WHOLE), "sha512")
    agreed = fetch.agree(image, store.stat(image.id), 1 << 30)
    part = tmp_path / "part"
    fetch.fetch(store, image, agreed, part, Job(), max_bytes=1 << 30, attempts=2)
    assert part.read_bytes() == WHOLE
    listed = store.list_images({ORIGIN: "op-1"})
    found = next(entry for entry in listed if entry.image.id == image.id)
    assert (found.image.name, found.image.min_disk_gb, found.image.os_type) == (image.name, 1, "linux")
    assert found.image.properties["base_image_ref"] == "base"
    store.withdraw(image)
    with pytest.raises(errors.ImageNotFound):
        store.stat(image.id)


def test_a_qcow2_is_taken_as_one(store: GlanceStore, tmp_path: Path) -> None:
    path = qcow2(tmp_path / "disk", 8, DATA)
    image = snapshot(disk_format="qcow2")
    store.create(image)
    store.write(image.id, [path.read_bytes()], path.stat().st_size)
    publish(store, image.id)
    assert store.stat(image.id).disk_format == "qcow2"
    store.delete(image.id)


@pytest.mark.parametrize("how_far", ["created", "broken off", "written"])
def test_withdrawn_nothing_is_left(
    store: GlanceStore, service: tuple[str, Path], how_far: str
) -> None:
    def breaks() -> Iterator[bytes]:
        yield DATA
        raise errors.GuestFailed(instance="x", reason="its disk is gone")

    image = snapshot()
    store.create(image)
    if how_far == "broken off":
        with pytest.raises(errors.GuestFailed):
            store.write(image.id, breaks())
        with pytest.raises((errors.ImageUnacceptable, errors.ImageImporting)):
            store.publish(image.id)
    elif how_far == "written":
        store.write(image.id, PIECES)
    store.withdraw(snapshot("op-2", id=image.id))
    store.withdraw(image)
    assert [entry for entry in store.list_images({}) if entry.image.id == image.id] == []
    images = service[1] / "images"
    wait_for(lambda: not [path for path in images.rglob("*") if image.id in path.name], what="its data to go")


def test_an_image_of_somebody_else(store: GlanceStore) -> None:
    image = snapshot()
    store.create(image)
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(snapshot("op-2", id=image.id))
    store.withdraw(image)
