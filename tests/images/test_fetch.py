from __future__ import annotations

import hashlib
import os
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images import fetch
from compute_worker.images.http import HttpStore
from compute_worker.images.store import ImageFacts, ImageStore, Opened
from compute_worker.objects import ImageMeta
from tests.images.support import Job, Site, sha256

DATA = random.Random(7).randbytes(3_000_000)
SUM = sha256(DATA)
IMAGE = ImageMeta(id="cirros")
BIG = 1 << 40


def bring(site: Site, part: Path, job: Job, facts: ImageFacts | None = None, attempts: int = 5) -> ImageFacts:
    store = HttpStore(Images(http_url=site.url))
    facts = facts or fetch.agree(IMAGE, store.stat("cirros"), BIG)
    fetch.fetch(store, IMAGE, facts, part, job, max_bytes=BIG, attempts=attempts)
    return facts


def with_sum(**changes: object) -> ImageFacts:
    return replace(ImageFacts(len(DATA), "sha256", SUM, None, '"v1"'), **changes)  # type: ignore[arg-type]


@pytest.fixture
def served(site: Site) -> Site:
    site.files["/cirros"], site.etag = DATA, '"v1"'
    return site


def test_whole_with_progress(served: Site, tmp_path: Path, job: Job) -> None:
    part = tmp_path / "x.part"
    bring(served, part, job)
    assert part.read_bytes() == DATA
    assert job.reports[-1] == (fetch.PHASE, len(DATA), len(DATA))
    counted = [done for _, done, _ in job.reports if done is not None]
    assert counted == sorted(counted)


def test_an_interrupted_stream_goes_on_where_it_broke(served: Site, tmp_path: Path, job: Job) -> None:
    served.cut = [1_000_000, 500_000]
    bring(served, tmp_path / "x.part", job, with_sum())
    assert (tmp_path / "x.part").read_bytes() == DATA
    asked = [headers.get("Range") for headers in served.gets()]
    assert asked == [None, "bytes=1000000-", "bytes=1500000-"]
    assert len(job.reasons) == 2


def test_a_server_without_ranges_is_read_again_whole(served: Site, tmp_path: Path, job: Job) -> None:
    served.cut, served.ranges = [1_000_000], False
    bring(served, tmp_path / "x.part", job, with_sum())
    assert (tmp_path / "x.part").read_bytes() == DATA


def test_a_changed_image_is_read_again_whole(served: Site, tmp_path: Path, job: Job) -> None:
    served.cut = [1_000_000]
    old = with_sum(checksum=None, checksum_algorithm=None, validator='"v0"')
    bring(served, tmp_path / "x.part", job, old)
    assert (tmp_path / "x.part").read_bytes() == DATA


def test_attempts_are_bounded_and_what_came_is_kept(served: Site, tmp_path: Path, job: Job) -> None:
    served.cut = [100_000] * 10
    with pytest.raises(errors.ImageStoreUnavailable):
        bring(served, tmp_path / "x.part", job, with_sum(), attempts=2)
    assert (tmp_path / "x.part").read_bytes() == DATA[:300_000]
    served.cut = []
    bring(served, tmp_path / "x.part", job, with_sum())
    assert (tmp_path / "x.part").read_bytes() == DATA
    assert served.gets()[-1]["Range"] == "bytes=300000-"


def test_what_a_dead_process_left_is_not_trusted_without_a_checksum(served: Site, tmp_path: Path, job: Job) -> None:
    (tmp_path / "x.part").write_bytes(DATA[:1000])
    bring(served, tmp_path / "x.part", job)
    assert (tmp_path / "x.part").read_bytes() == DATA
    assert "Range" not in served.gets()[-1]


@pytest.mark.parametrize("left", [b"\0" * 1000, DATA + b"more", b"x" * len(DATA)])
def test_garbage_left_behind_is_found_by_the_checksum(served: Site, tmp_path: Path, job: Job, left: bytes) -> None:
    (tmp_path / "x.part").write_bytes(left)
    bring(served, tmp_path / "x.part", job, with_sum())
    assert (tmp_path / "x.part").read_bytes() == DATA


def test_a_whole_part_is_not_downloaded_again(served: Site, tmp_path: Path, job: Job) -> None:
    (tmp_path / "x.part").write_bytes(DATA)
    bring(served, tmp_path / "x.part", job, with_sum())
    assert served.gets() == []


def test_a_wrong_checksum(served: Site, tmp_path: Path, job: Job) -> None:
    with pytest.raises(errors.ImageChecksumMismatch) as caught:
        bring(served, tmp_path / "x.part", job, with_sum(checksum="0" * 64))
    assert caught.value.kwargs["actual"] == SUM


def test_more_bytes_than_announced(served: Site, tmp_path: Path, job: Job) -> None:
    with pytest.raises(errors.ImageUnacceptable, match="more than 1000"):
        bring(served, tmp_path / "x.part", job, with_sum(size_bytes=1000))
    assert (tmp_path / "x.part").stat().st_size <= 1000


def test_cancel_between_chunks(served: Site, tmp_path: Path, job: Job) -> None:
    with pytest.raises(errors.Cancelled):
        bring(served, tmp_path / "x.part", job.cancel_after(1))
    assert (tmp_path / "x.part").stat().st_size < len(DATA)


def test_cancel_while_the_server_is_silent(served: Site, tmp_path: Path, job: Job) -> None:
    served.stall = threading.Event()
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            bring(served, tmp_path / "x.part", job)
        except errors.ComputeError as exc:
            outcome.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    assert served.sent.wait(5)
    job.cancel()
    thread.join(5)
    assert [type(exc) for exc in outcome] == [errors.Cancelled]


def test_holes_stay_holes(served: Site, tmp_path: Path, job: Job) -> None:
    sparse = b"begin" + bytes(20 << 20) + b"end" + bytes(4 << 20)
    served.files["/cirros"] = sparse
    bring(served, tmp_path / "x.part", job)
    assert (tmp_path / "x.part").read_bytes() == sparse
    assert (tmp_path / "x.part").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("image", "facts", "says"),
    [
        (ImageMeta(id="x", size_bytes=5), ImageFacts(size_bytes=6), "announced"),
        (ImageMeta(id="x"), ImageFacts(size_bytes=0), "empty"),
        (ImageMeta(id="x"), ImageFacts(size_bytes=101), "max_image_gb"),
        (ImageMeta(id="x", disk_format="raw"), ImageFacts(disk_format="qcow2"), "qcow2"),
        (ImageMeta(id="x", checksum="a" * 64), ImageFacts(checksum_algorithm="sha256", checksum="b" * 64), "sha256"),
    ],
)
def test_contradictions_are_seen_before_a_byte_is_read(image: ImageMeta, facts: ImageFacts, says: str) -> None:
    with pytest.raises(errors.ImageUnacceptable, match=says):
        fetch.agree(image, facts, 100)


def test_the_caller_and_the_store_complete_each_other() -> None:
    facts = fetch.agree(ImageMeta(id="x", size_bytes=5, checksum="a" * 128), ImageFacts(), 100)
    assert (facts.size_bytes, facts.checksum_algorithm, facts.checksum) == (5, "sha512", "a" * 128)
    facts = fetch.agree(ImageMeta(id="x"), ImageFacts(checksum_algorithm="sha256", checksum="b" * 64), 100)
    assert facts.checksum == "b" * 64


class Shaky(ImageStore):
    """Breaks off after each number of bytes in turn, in chunks of any size."""

    name = "shaky"

    def __init__(self, data: bytes, cuts: list[int], chunk: int, resumes: bool) -> None:
        self.data, self.cuts, self.chunk, self.resumes = data, cuts, chunk, resumes

    def stat(self, image_id: str) -> ImageFacts:
        return ImageFacts(size_bytes=len(self.data))

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        begin = offset if self.resumes else 0
        end = begin + self.cuts.pop(0) if self.cuts else len(self.data)
        whole = range(begin, min(end, len(self.data)), self.chunk)
        pieces = (self.data[at : min(at + self.chunk, end)] for at in whole)
        return Opened(begin, pieces, lambda: None, lambda: None)


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.one_of(st.binary(min_size=1, max_size=5000), st.integers(1, 200_000).map(bytes)), min_size=1, max_size=6
    ).map(b"".join),
    cuts=st.lists(st.integers(0, 150_000), max_size=4),
    chunk=st.integers(1000, 1 << 20),
    resumes=st.booleans(),
    left=st.integers(0, 50_000),
)
def test_any_interruptions_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int], chunk: int, resumes: bool, left: int
) -> None:
    part = tmp_path_factory.mktemp("fetch") / "x.part"
    part.write_bytes(data[:left])
    facts = ImageFacts(len(data), "sha256", hashlib.sha256(data).hexdigest())
    store = Shaky(data, cuts, chunk, resumes)
    original, fetch._FIRST_DELAY = fetch._FIRST_DELAY, 0.001  # type: ignore[misc]
    try:
        fetch.fetch(store, IMAGE, facts, part, Job(), max_bytes=BIG, attempts=5)
    finally:
        fetch._FIRST_DELAY = original  # type: ignore[misc]
    assert part.read_bytes() == data
    os.unlink(part)
