"""Snapshots into an http store: whole or not at all, whatever the server does."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator

import pytest

from compute_worker import errors
from compute_worker.config import Images
from compute_worker.images.http import HttpStore
from compute_worker.images.http_upload import ABOUT
from compute_worker.images.store import ORIGIN, Hole
from compute_worker.objects import ImageMeta
from tests.images.support import Job, sha256
from tests.images.uploads import Behaviour, ShelfHandler, serving
from tests.waiting import wait_for

DATA = bytes(range(256)) * 4096
PIECES = [DATA[:500_000], Hole(3 << 20), DATA[500_000:]]
WHOLE = DATA[:500_000] + bytes(3 << 20) + DATA[500_000:]


def snapshot(operation: str = "op-1", image_id: str = "snap") -> ImageMeta:
    return ImageMeta(id=image_id, disk_format="raw", name="golden", properties={ORIGIN: operation})


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
def files() -> dict[str, bytes]:
    return {}


@pytest.fixture
def store(behaviour: Behaviour, files: dict[str, bytes]) -> Iterator[HttpStore]:
    with serving(ShelfHandler, behaviour, files=files) as url:
        yield HttpStore(Images(http_url=f"{url}/images"))


@pytest.mark.parametrize("size", [None, len(WHOLE)])
def test_sent_in_one_pass_and_published(
    store: HttpStore, behaviour: Behaviour, files: dict[str, bytes], size: int | None
) -> None:
    store.create(snapshot())
    store.create(snapshot())
    facts = store.write("snap", iter(PIECES), size, Job())
    assert (facts.size_bytes, facts.checksum) == (len(WHOLE), sha256(WHOLE))
    assert files["/images/snap"] == WHOLE
    sent = [headers for method, path, headers in behaviour.requests if (method, path) == ("PUT", "/images/snap")]
    assert [headers.get("Content-Length") for headers in sent] == [size and str(size)]
    published = store.publish("snap")
    assert published == store.publish("snap")
    assert (published.size_bytes, published.checksum, published.disk_format) == (len(WHOLE), sha256(WHOLE), "raw")
    opened = store.open("snap")
    assert b"".join(opened.chunks) == WHOLE
    opened.close()


def test_an_image_that_is_there_is_not_replaced(store: HttpStore, files: dict[str, bytes]) -> None:
    files["/images/theirs"] = b"x"
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(snapshot(image_id="theirs"))
    store.withdraw(snapshot(image_id="theirs"))
    store.create(snapshot())
    with pytest.raises(errors.ImageUnacceptable, match="already"):
        store.create(snapshot("op-2"))
    store.withdraw(snapshot("op-2"))
    assert set(files) == {"/images/theirs", f"/images/snap{ABOUT}"}


def test_withdrawn_nothing_is_left(store: HttpStore, files: dict[str, bytes]) -> None:
    store.create(snapshot())
    store.write("snap", PIECES)
    store.publish("snap")
    store.withdraw(snapshot())
    store.withdraw(snapshot())
    assert files == {}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (405, errors.ImageUnacceptable),
        (403, errors.ImageUnacceptable),
        (301, errors.ImageUnacceptable),
        (503, errors.ImageStoreUnavailable),
        (507, errors.DiskFull),
        (413, errors.DiskFull),
    ],
)
def test_a_server_that_takes_nothing_says_so_first(
    store: HttpStore, behaviour: Behaviour, files: dict[str, bytes], status: int, error: type[errors.ComputeError]
) -> None:
    behaviour.refuse["PUT"] = status
    with pytest.raises(error):
        store.create(snapshot())
    assert files == {}


@pytest.mark.parametrize("size", [None, len(WHOLE)])
@pytest.mark.parametrize("status", [507, 413])
def test_full_in_the_middle(
    store: HttpStore, behaviour: Behaviour, files: dict[str, bytes], size: int | None, status: int
) -> None:
    store.create(snapshot())
    behaviour.full_after, behaviour.full_status = 1 << 20, status
    with pytest.raises((errors.DiskFull, errors.ImageStoreUnavailable)):
        store.write("snap", PIECES, size)
    assert "/images/snap" not in files
    behaviour.full_after = None
    store.withdraw(snapshot())
    assert files == {}


def test_full_at_the_last_byte_is_said_to_be_full(store: HttpStore, behaviour: Behaviour) -> None:
    store.create(snapshot())
    behaviour.full_after = 2
    with pytest.raises(errors.DiskFull, match="image store http"):
        store.write("snap", [b"abc"], 3)


@pytest.mark.parametrize("size", [None, len(WHOLE)])
def test_hung_up_in_the_middle_and_sent_again(
    store: HttpStore, behaviour: Behaviour, files: dict[str, bytes], size: int | None
) -> None:
    store.create(snapshot())
    behaviour.hang_up_after = 1 << 20
    with pytest.raises(errors.ImageStoreUnavailable):
        store.write("snap", PIECES, size)
    with pytest.raises(errors.ImageUnacceptable, match=r"whole|not in store"):
        store.publish("snap")
    behaviour.hang_up_after = None
    store.write("snap", PIECES, size)
    assert store.publish("snap").checksum == sha256(WHOLE)


def test_cancelled_while_the_server_reads_nothing(
    store: HttpStore, behaviour: Behaviour, files: dict[str, bytes]
) -> None:
    job, ended = Job(), []
    store.create(snapshot())
    behaviour.stall_after = 1 << 16

    def write() -> None:
        with pytest.raises(errors.Cancelled):
            store.write("snap", (bytes(1 << 20) for _ in range(64)), job=job)
        ended.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    assert behaviour.stalled.wait(10)
    job.cancel()
    wait_for(lambda: ended, deadline=5, what="the upload to end")
    thread.join()
    behaviour.go_on.set()
    store.withdraw(snapshot())
    assert files == {}


def test_a_source_that_breaks_leaves_no_image(store: HttpStore, files: dict[str, bytes]) -> None:
    def pieces() -> Iterator[bytes]:
        yield DATA
        raise errors.GuestFailed(instance="x", reason="its disk is gone")

    store.create(snapshot())
    with pytest.raises(errors.GuestFailed):
        store.write("snap", pieces())
    with pytest.raises(errors.ImageUnacceptable, match="announced"):
        store.write("snap", [b"abc"], 4)
    with pytest.raises(errors.ImageUnacceptable, match="announced"):
        store.write("snap", [b"abc"], 2)
    assert "/images/snap" not in files


def test_a_server_that_lost_a_part_is_found_out(store: HttpStore, files: dict[str, bytes]) -> None:
    store.create(snapshot())
    store.write("snap", [b"abcdef"])
    files["/images/snap"] = b"abc"
    with pytest.raises(errors.ImageUnacceptable, match="3 bytes of it, 6 were sent"):
        store.publish("snap")


def test_nobody_listens() -> None:
    store = HttpStore(Images(http_url="http://127.0.0.1:1"))
    for call in (lambda: store.create(snapshot()), lambda: store.withdraw(snapshot()), lambda: store.delete("snap")):
        with pytest.raises(errors.ImageStoreUnavailable):
            call()


def test_memory_is_bounded_whatever_the_size(store: HttpStore, behaviour: Behaviour) -> None:
    store.create(snapshot())
    tracemalloc.start()
    try:
        behaviour.discard = True
        facts = store._put("snap", (Hole(32 << 20) for _ in range(8)), None, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert facts[0] == 256 << 20
    assert peak < 8 << 20


def test_backups_are_not_for_it(store: HttpStore) -> None:
    assert not store.lists
    with pytest.raises(errors.NotSupported):
        store.list_images({})
