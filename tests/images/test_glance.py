from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images.glance import GlanceStore
from tests.images.support import Site, glance_image

DATA = bytes(range(256)) * 64
IMAGE = "6f5be1f0-6f4d-4c8e-9d55-0e4b7d0c1a11"


def store(site: Site) -> GlanceStore:
    return GlanceStore(Images(glance_url=site.url))


def read(opened: object) -> bytes:
    try:
        return b"".join(opened.chunks)  # type: ignore[attr-defined]
    finally:
        opened.close()  # type: ignore[attr-defined]


def test_facts_and_bytes(site: Site) -> None:
    glance_image(site, IMAGE, DATA, disk_format="qcow2")
    facts = store(site).stat(IMAGE)
    assert (facts.size_bytes, facts.disk_format, facts.checksum_algorithm) == (len(DATA), "qcow2", "sha512")
    assert facts.checksum == hashlib.sha512(DATA).hexdigest()
    opened = store(site).open(IMAGE)
    assert (opened.offset, read(opened)) == (0, DATA)


def test_resumes_by_range(site: Site) -> None:
    glance_image(site, IMAGE, DATA)
    opened = store(site).open(IMAGE, 1000)
    assert (opened.offset, read(opened)) == (1000, DATA[1000:])


def test_a_store_behind_it_without_ranges_begins_anew(site: Site) -> None:
    glance_image(site, IMAGE, DATA)
    site.ranges = False
    opened = store(site).open(IMAGE, 1000)
    assert (opened.offset, read(opened)) == (0, DATA)


@pytest.mark.parametrize("status", ["queued", "saving", "deactivated", "deleted"])
def test_only_active_images_are_there(site: Site, status: str) -> None:
    glance_image(site, IMAGE, DATA, status=status)
    with pytest.raises(errors.ImageNotFound, match=status):
        store(site).stat(IMAGE)


def test_a_hash_we_do_not_know_is_no_hash(site: Site) -> None:
    glance_image(site, IMAGE, DATA, os_hash_algo="md5", os_hash_value="0" * 32)
    facts = store(site).stat(IMAGE)
    assert (facts.checksum_algorithm, facts.checksum) == (None, None)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, errors.ImageNotFound),
        (401, errors.ImageUnacceptable),
        (403, errors.ImageUnacceptable),
        (500, errors.ImageStoreUnavailable),
        (503, errors.ImageStoreUnavailable),
    ],
)
def test_statuses(site: Site, status: int, error: type[errors.ComputeError]) -> None:
    site.answers[f"/v2/images/{IMAGE}"] = (status, {}, b"a secret body")
    with pytest.raises(error) as caught:
        store(site).stat(IMAGE)
    assert type(caught.value) is error
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"7"])
def test_an_answer_that_is_no_image(site: Site, body: bytes) -> None:
    site.answers[f"/v2/images/{IMAGE}"] = (200, {"Content-Type": "application/json"}, body)
    with pytest.raises(errors.ImageStoreUnavailable, match="an answer that is not"):
        store(site).stat(IMAGE)


def test_nobody_there() -> None:
    with pytest.raises(errors.ImageStoreUnavailable):
        GlanceStore(Images(glance_url="http://127.0.0.1:9")).stat(IMAGE)


def test_a_broken_stream_is_seen(site: Site) -> None:
    glance_image(site, IMAGE, DATA)
    site.cut = [5000]
    opened = store(site).open(IMAGE)
    with pytest.raises(errors.ImageStoreUnavailable):
        read(opened)


def test_abort_wakes_a_reader_that_waits(site: Site) -> None:
    glance_image(site, IMAGE, DATA)
    site.stall = threading.Event()
    opened = store(site).open(IMAGE)
    ended = threading.Event()

    def drain() -> None:
        try:
            b"".join(opened.chunks)
        except errors.ImageStoreUnavailable:
            ended.set()

    thread = threading.Thread(target=drain)
    thread.start()
    assert site.sent.wait(5)
    opened.abort()
    thread.join(5)
    assert ended.is_set()
    opened.close()


def test_a_cloud_of_clouds_yaml(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glance_image(site, IMAGE, DATA)
    version = {"id": "v2.17", "status": "CURRENT", "links": [{"rel": "self", "href": f"{site.url}/v2/"}]}
    for path in ("/", "/v2", "/v2/"):
        site.answers[path] = (300, {"Content-Type": "application/json"}, json.dumps({"versions": [version]}).encode())
    config = tmp_path / "clouds.yaml"
    config.write_text(
        "clouds:\n  here:\n    auth_type: admin_token\n    auth:\n"
        f"      endpoint: {site.url}\n      token: sesame\n    image_endpoint_override: {site.url}\n"
        "    image_api_version: '2'\n"
    )
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(config))
    assert read(GlanceStore(Images(glance_cloud="here")).open(IMAGE)) == DATA
    assert site.requests[-1][2].get("X-Auth-Token") == "sesame"


def test_neither_cloud_nor_address() -> None:
    with pytest.raises(ValueError, match="glance_cloud"):
        GlanceStore(Images())
