from __future__ import annotations

import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images.http import HttpStore
from tests.images.support import Site, web_server

DATA = bytes(range(256)) * 64


def store(site: Site) -> HttpStore:
    return HttpStore(Images(http_url=site.url + "/images"))


def read(opened: object) -> bytes:
    try:
        return b"".join(opened.chunks)  # type: ignore[attr-defined]
    finally:
        opened.close()  # type: ignore[attr-defined]


def test_size_and_bytes(site: Site) -> None:
    site.files["/images/cirros"] = DATA
    site.etag = '"v1"'
    facts = store(site).stat("cirros")
    assert (facts.size_bytes, facts.validator) == (len(DATA), '"v1"')
    assert read(store(site).open("cirros")) == DATA


def test_a_weak_etag_is_no_validator(site: Site) -> None:
    site.files["/images/cirros"], site.etag = DATA, 'W/"v1"'
    assert store(site).stat("cirros").validator is None


def test_resumes_by_range_while_nothing_changed(site: Site) -> None:
    site.files["/images/cirros"], site.etag = DATA, '"v1"'
    opened = store(site).open("cirros", 1000, '"v1"')
    assert opened.offset == 1000
    assert read(opened) == DATA[1000:]
    assert site.gets()[-1]["If-Range"] == '"v1"'


@pytest.mark.parametrize("why", ["changed", "no ranges", "beyond"])
def test_begins_anew_where_it_cannot_resume(site: Site, why: str) -> None:
    site.files["/images/cirros"], site.etag = DATA, '"v2"'
    site.ranges = why != "no ranges"
    opened = store(site).open("cirros", len(DATA) if why == "beyond" else 1000, '"v2"' if why == "beyond" else '"v1"')
    assert opened.offset == 0
    assert read(opened) == DATA


def test_a_range_nobody_asked_for_is_not_believed(site: Site) -> None:
    site.answers["/images/x"] = (206, {"Content-Range": "bytes 5-9/10"}, b"56789")
    with pytest.raises(errors.ImageStoreUnavailable, match="range"):
        store(site).open("x", 4)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, errors.ImageNotFound),
        (410, errors.ImageNotFound),
        (403, errors.ImageUnacceptable),
        (400, errors.ImageUnacceptable),
        (429, errors.ImageStoreUnavailable),
        (500, errors.ImageStoreUnavailable),
        (503, errors.ImageStoreUnavailable),
    ],
)
def test_statuses(site: Site, status: int, error: type[errors.ComputeError]) -> None:
    site.answers["/images/x"] = (status, {}, b"")
    with pytest.raises(error) as caught:
        store(site).stat("x")
    assert type(caught.value) is error


def test_redirects_stay_on_the_server(site: Site) -> None:
    site.files["/real"] = DATA
    site.answers["/images/near"] = (302, {"Location": "/real"}, b"")
    site.answers["/images/circle"] = (302, {"Location": "/images/circle"}, b"")
    assert store(site).stat("near").size_bytes == len(DATA)
    with pytest.raises(errors.ImageUnacceptable, match="circles"):
        store(site).stat("circle")


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest", "http://127.0.0.1:1/x", "file:///etc/passwd", "https://127.0.0.1/x"]
)
def test_redirects_elsewhere_are_refused(site: Site, target: str) -> None:
    site.answers["/images/far"] = (301, {"Location": target}, b"")
    with pytest.raises(errors.ImageUnacceptable, match="another server"):
        store(site).stat("far")


def test_compressed_answers_are_refused(site: Site) -> None:
    site.answers["/images/x"] = (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b")
    with pytest.raises(errors.ImageUnacceptable, match="compresses"):
        store(site).open("x")


def test_nobody_there() -> None:
    with pytest.raises(errors.ImageStoreUnavailable, match="refused"):
        HttpStore(Images(http_url="http://127.0.0.1:9")).stat("x")


@pytest.mark.parametrize("url", ["", "ftp://x/", "file:///etc", "http://user:secret@x/"])
def test_unusable_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="http_url") as caught:
        HttpStore(Images(http_url=url))
    assert "secret" not in str(caught.value)


def test_abort_wakes_a_reader_that_waits(site: Site) -> None:
    site.files["/images/x"], site.stall = DATA, threading.Event()
    opened = store(site).open("x")
    got: list[bytes] = []

    def drain() -> None:
        try:
            got.extend(opened.chunks)
        except errors.ImageStoreUnavailable:
            got.append(b"aborted")

    thread = threading.Thread(target=drain)
    thread.start()
    assert site.sent.wait(5)
    opened.abort()
    thread.join(5)
    assert not thread.is_alive()
    assert len(b"".join(got)) < len(DATA)
    opened.close()


def test_https_is_checked_against_the_given_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *words.split(), "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with web_server(Site(), lambda sock: context.wrap_socket(sock, server_side=True)) as site:
        site.files["/cirros"] = DATA
        url = site.url.replace("http:", "https:")
        trusting = HttpStore(Images(http_url=url, http_ca_file=str(cert)))
        assert read(trusting.open("cirros")) == DATA
        with pytest.raises(errors.ImageStoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            HttpStore(Images(http_url=url)).stat("cirros")
