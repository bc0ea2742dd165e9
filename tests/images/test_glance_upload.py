"""Snapshots into an image service: whole or not at all, whatever it does, with tokens that end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images.glance import GlanceStore
from compute_worker.images.store import ORIGIN, Hole, ImageFacts
from compute_worker.objects import ImageMeta
from tests.images.glance_double import Glance, GlanceHandler, KeystoneHandler
from tests.images.support import Job, sha256
from tests.images.uploads import Behaviour, serving
from tests.waiting import wait_for

IMAGE = "6f5be1f0-6f4d-4c8e-9d55-0e4b7d0c1a11"
DATA = bytes(range(256)) * 4096
PIECES = [DATA[:500_000], Hole(3 << 20), DATA[500_000:]]
WHOLE = DATA[:500_000] + bytes(3 << 20) + DATA[500_000:]


def snapshot(operation: str = "op-1", image_id: str = IMAGE, **changes: object) -> ImageMeta:
    fields: dict[str, object] = {
        "id": image_id,
        "name": "golden",
        "disk_format": "qcow2",
        "min_disk_gb": 3,
        "os_type": "linux",
        "properties": {ORIGIN: operation, "base_image_ref": "base", "image_type": "snapshot"},
    }
    return ImageMeta(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def glance() -> Glance:
    return Glance()


@pytest.fixture
def url(behaviour: Behaviour, glance: Glance) -> Iterator[str]:
    with serving(GlanceHandler, behaviour, glance=glance) as address:
        yield address


@pytest.fixture(params=[False, True], ids=["upload", "import"])
def store(url: str, request: pytest.FixtureRequest) -> GlanceStore:
    return GlanceStore(Images(glance_url=url, glance_import=request.param))


@pytest.fixture
def uploading(url: str) -> GlanceStore:
    return GlanceStore(Images(glance_url=url))


def publish(store: GlanceStore, image_id: str = IMAGE) -> ImageFacts:
    for _ in range(5):
        try:
            return store.publish(image_id)
        except errors.ImageImporting:
            continue
    raise AssertionError("it is still importing")


@pytest.mark.parametrize("size", [None, len(WHOLE)])
def test_sent_in_one_pass_and_published(store: GlanceStore, glance: Glance, size: int | None) -> None:
    store.create(snapshot())
    store.create(snapshot())
    facts = store.write(IMAGE, iter(PIECES), size, Job())
    assert (facts.size_bytes, facts.checksum) == (len(WHOLE), sha256(WHOLE))
    assert publish(store) == publish(store)
    record = glance.images[IMAGE]
    assert (record["status"], record["size"], glance.data[IMAGE]) == ("active", len(WHOLE), WHOLE)
    assert (record["disk_format"], record["container_format"]) == ("qcow2", "bare")
    assert (record["min_disk"], record["os_type"], record["base_image_ref"]) == (3, "linux", "base")
    assert (record["visibility"], record["name"]) == ("private", "golden")
    assert store.stat(IMAGE).size_bytes == len(WHOLE)
    opened = store.open(IMAGE)
    assert b"".join(opened.chunks) == WHOLE
    opened.close()


def test_listed_by_properties_over_pages(store: GlanceStore, glance: Glance) -> None:
    glance.page = 2
    for number in range(5):
        image = snapshot(image_id=f"b{number}", properties={ORIGIN: f"op-{number}", "n": str(number % 2)})
        store.create(image)
        store.write(image.id, [b"abc"])
        publish(store, image.id)
    store.create(snapshot(image_id="queued"))
    assert [found.image.id for found in store.list_images({})] == ["b4", "b3", "b2", "b1", "b0"]
    assert [found.image.id for found in store.list_images({"n": "0"})] == ["b4", "b2", "b0"]
    assert [found.image.id for found in store.list_images({}, limit=3)] == ["b4", "b3", "b2"]
    first = store.list_images({"n": "0"})[0]
    assert (first.image.os_type, first.image.min_disk_gb, first.image.size_bytes) == ("linux", 3, 3)
    assert first.created_at > store.list_images({"n": "0"})[1].created_at
    store.delete("b4")
    store.delete("b4")
    assert "b4" not in glance.images


def test_records_that_no_host_could_use_are_left_out(uploading: GlanceStore, glance: Glance) -> None:
    glance.new({"id": "../x", "name": "evil", "disk_format": "raw", "status": "active"})
    glance.new({"id": "odd", "name": "x\ny", "disk_format": "raw", "status": "active"})
    glance.new({"id": "ploop", "name": "x", "disk_format": "ploop", "status": "active"})
    glance.new({"id": "good", "name": "x", "disk_format": "raw", "status": "active"})
    assert [found.image.id for found in uploading.list_images({})] == ["good"]


def test_a_record_that_waits_for_its_bytes_is_taken(store: GlanceStore, glance: Glance) -> None:
    glance.new({"id": IMAGE, "name": "made by the scheduler", "disk_format": None})
    store.create(snapshot())
    store.create(snapshot())
    store.write(IMAGE, PIECES)
    publish(store)
    record = glance.images[IMAGE]
    assert (record["name"], record["disk_format"], record[ORIGIN]) == ("made by the scheduler", "qcow2", "op-1")
    assert "visibility" not in record


def test_an_image_of_somebody_else_is_not_touched(store: GlanceStore, glance: Glance) -> None:
    glance.activate(glance.new({"id": IMAGE, "name": "theirs", "disk_format": "raw"})["id"], b"theirs")
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(snapshot())
    store.withdraw(snapshot())
    store.create(snapshot(image_id="mine"))
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(snapshot("op-2", image_id="mine"))
    store.withdraw(snapshot("op-2", image_id="mine"))
    assert set(glance.images) == {IMAGE, "mine"}


@pytest.mark.parametrize("how_far", ["created", "written", "published"])
def test_withdrawn_nothing_is_left(store: GlanceStore, glance: Glance, how_far: str) -> None:
    store.create(snapshot())
    if how_far != "created":
        store.write(IMAGE, PIECES)
    if how_far == "published":
        publish(store)
    store.withdraw(snapshot())
    store.withdraw(snapshot())
    assert (glance.images, glance.data, glance.staged) == ({}, {}, {})


def test_an_answer_that_was_lost_after_the_last_byte(uploading: GlanceStore, glance: Glance) -> None:
    uploading.create(snapshot())
    uploading.write(IMAGE, PIECES)
    again = uploading.write(IMAGE, iter([b"not sent again"]))
    assert again.size_bytes == len(WHOLE) and glance.data[IMAGE] == WHOLE


@pytest.mark.parametrize("size", [None, len(WHOLE)])
def test_hung_up_in_the_middle_and_sent_again(
    uploading: GlanceStore, behaviour: Behaviour, glance: Glance, size: int | None
) -> None:
    uploading.create(snapshot())
    behaviour.hang_up_after = 1 << 20
    with pytest.raises(errors.ImageStoreUnavailable):
        uploading.write(IMAGE, PIECES, size)
    wait_for(lambda: glance.images[IMAGE]["status"] == "queued", what="the service to notice")
    with pytest.raises(errors.ImageUnacceptable, match="queued"):
        uploading.publish(IMAGE)
    behaviour.hang_up_after = None
    uploading.write(IMAGE, PIECES, size)
    assert publish(uploading).size_bytes == len(WHOLE)


def test_a_full_store(uploading: GlanceStore, behaviour: Behaviour, glance: Glance) -> None:
    uploading.create(snapshot())
    behaviour.full_after, behaviour.full_status = 2, 413
    with pytest.raises(errors.DiskFull, match="image store glance"):
        uploading.write(IMAGE, [b"abc"], 3)
    behaviour.full_after = None
    uploading.withdraw(snapshot())
    assert glance.images == {}


@pytest.mark.parametrize(
    ("status", "error", "times"),
    [
        (403, errors.ImageUnacceptable, 1),
        (400, errors.ImageUnacceptable, 1),
        (413, errors.DiskFull, 1),
        (503, errors.ImageStoreUnavailable, 3),
        (429, errors.ImageStoreUnavailable, 3),
    ],
)
def test_a_service_that_refuses(
    uploading: GlanceStore, behaviour: Behaviour, status: int, error: type[Exception], times: int
) -> None:
    behaviour.refuse["POST"] = status
    with pytest.raises(error):
        uploading.create(snapshot())
    assert behaviour.methods().count("POST") == times


def test_small_requests_are_asked_again(store: GlanceStore, behaviour: Behaviour, glance: Glance) -> None:
    behaviour.refuse_once = {"POST": [503], "GET": [502, 500], "DELETE": [503]}
    store.create(snapshot())
    store.write(IMAGE, PIECES)
    store.withdraw(snapshot())
    assert glance.images == {}


def test_an_import_that_fails(url: str, glance: Glance) -> None:
    store = GlanceStore(Images(glance_url=url, glance_import=True))
    store.create(snapshot())
    store.write(IMAGE, PIECES)
    glance.import_fails = True
    with pytest.raises(errors.ImageUnacceptable, match="could not import"):
        publish(store)
    store.withdraw(snapshot())
    assert glance.images == {}


def test_cancelled_while_the_service_reads_nothing(
    uploading: GlanceStore, behaviour: Behaviour, glance: Glance
) -> None:
    job, ended = Job(), []
    uploading.create(snapshot())
    behaviour.stall_after = 1 << 16

    def write() -> None:
        with pytest.raises(errors.Cancelled):
            uploading.write(IMAGE, (bytes(1 << 20) for _ in range(64)), job=job)
        ended.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    assert behaviour.stalled.wait(10)
    job.cancel()
    wait_for(lambda: ended, deadline=5, what="the upload to end")
    thread.join()
    behaviour.go_on.set()
    uploading.withdraw(snapshot())
    assert glance.images == {}


def test_nobody_listens() -> None:
    store = GlanceStore(Images(glance_url="http://127.0.0.1:1"))
    for call in (lambda: store.create(snapshot()), lambda: store.withdraw(snapshot()), lambda: store.list_images({})):
        with pytest.raises(errors.ImageStoreUnavailable):
            call()


def test_a_protected_image_stays(uploading: GlanceStore, glance: Glance) -> None:
    uploading.create(snapshot())
    glance.images[IMAGE]["protected"] = True
    with pytest.raises(errors.ImageUnacceptable, match="403"):
        uploading.withdraw(snapshot())


# --- with tokens ------------------------------------------------------------------------------------------------------


class Cloud:
    """A store behind an identity service, configured by ``clouds.yaml``."""

    def __init__(self, store: GlanceStore, issued: list[str], lifetime: list[float]) -> None:
        self.store, self.issued, self.lifetime = store, issued, lifetime


@pytest.fixture
def cloud(url: str, glance: Glance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    issued: list[str] = []
    lifetime = [3600.0]
    glance.tokens = set()
    keystone = Behaviour()
    about = {"glance": glance, "issued": issued, "image_url": url, "lifetime": lifetime}
    with serving(KeystoneHandler, keystone, **about) as identity:
        (tmp_path / "clouds.yaml").write_text(
            f"""clouds:
  lab:
    auth: {{auth_url: "{identity}/v3", username: u, password: secret-of-the-test, project_name: p,
           user_domain_name: Default, project_domain_name: Default}}
    image_api_version: "2"
    image_endpoint_override: "{url}/v2"
    region_name: r
"""
        )
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
        yield Cloud(GlanceStore(Images(glance_cloud="lab")), issued, lifetime)


def test_with_a_token(cloud: Cloud, glance: Glance) -> None:
    cloud.store.create(snapshot())
    cloud.store.write(IMAGE, PIECES, len(WHOLE))
    publish(cloud.store)
    assert glance.data[IMAGE] == WHOLE
    assert len(cloud.issued) == 1
    assert [found.image.id for found in cloud.store.list_images({ORIGIN: "op-1"})] == [IMAGE]


def test_a_token_that_ends_before_any_request_is_renewed(cloud: Cloud, glance: Glance) -> None:
    steps = [
        lambda: cloud.store.create(snapshot()),
        lambda: cloud.store.write(IMAGE, PIECES),
        lambda: cloud.store.publish(IMAGE),
        lambda: cloud.store.withdraw(snapshot()),
    ]
    for step in steps:
        assert glance.tokens is not None
        glance.tokens.clear()
        step()
    assert len(cloud.issued) == 4
    assert glance.images == {}


def test_a_token_that_ends_between_look_and_upload(cloud: Cloud, glance: Glance, behaviour: Behaviour) -> None:
    cloud.store.create(snapshot())
    behaviour.refuse_once = {"PUT": [401]}
    with pytest.raises(errors.ImageStoreUnavailable, match="token"):
        cloud.store.write(IMAGE, PIECES)
    assert glance.images[IMAGE]["status"] == "queued"
    cloud.store.write(IMAGE, PIECES)
    assert glance.data[IMAGE] == WHOLE
    assert len(cloud.issued) == 2


def test_a_token_that_is_known_to_have_ended_is_not_sent(cloud: Cloud, glance: Glance) -> None:
    cloud.lifetime[0] = 1.0  # the library renews what ends within half a minute
    cloud.store.create(snapshot())
    cloud.store.write(IMAGE, PIECES)
    assert glance.data[IMAGE] == WHOLE
    assert len(cloud.issued) >= 3


def test_neither_token_nor_password_in_a_log(cloud: Cloud, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    cloud.store.create(snapshot())
    cloud.store.write(IMAGE, PIECES)
    publish(cloud.store)
    assert "secret-of-the-test" not in caplog.text
    assert "token-0" not in caplog.text
