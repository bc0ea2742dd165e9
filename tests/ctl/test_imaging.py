from __future__ import annotations

from collections.abc import Iterator

import pytest

from compute_worker.ctl.imaging import cached_rows, stored_rows
from compute_worker.objects import CachedImage, ImageMeta, StoredImage
from tests.ctl.cell import IMAGE, CtlCell

FIRST, SECOND = "darkroom", "gallery"


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlCell]:
    directory = tmp_path_factory.mktemp("imaging")
    with CtlCell([FIRST, SECOND], directory) as cell:
        (directory / "images" / IMAGE).write_bytes(b"image")
        cell.ready()
        cell.boot("model", "--host", FIRST)
        yield cell


def stored(cell: CtlCell, *options: str) -> dict[str, dict[str, object]]:
    return {entry["image"]["id"]: entry["image"] for entry in cell.ctl("images", "--json", *options).document["images"]}


def test_a_snapshot_is_told_listed_and_booted(cell: CtlCell) -> None:
    result = cell.ctl("snapshot", "model", "--image", "golden-1", "--name", "golden", "--property", "os_distro=debian")
    assert result.code == 0, result
    assert "as image golden-1: done on host darkroom" in result.out
    assert "qcow2, " in result.out
    image = stored(cell, "--property", "os_distro=debian")["golden-1"]
    assert (image["name"], image["disk_format"]) == ("golden", "qcow2")
    booted = cell.ctl("boot", "second", "--flavor", "1/64/1", "--image", "golden-1", "--host", SECOND)
    assert booted.code == 0, booted
    listing = cell.ctl("images")
    assert listing.code == 0
    assert "golden-1" in listing.out and SECOND in listing.out


def test_without_an_id_a_new_one(cell: CtlCell) -> None:
    document = cell.ctl("snapshot", "model", "--cold", "--disk-format", "raw", "--json").document
    assert document["operation"]["state"] == "done"
    assert stored(cell)[document["image"]]["disk_format"] == "raw"


def test_only_what_hosts_keep(cell: CtlCell) -> None:
    document = cell.ctl("images", "--cached", "--json").document
    assert document["images"] == []
    assert [entry["base"]["in_use"] for entry in document["cached"] if entry["host"] == FIRST] == [True]
    assert "golden" not in cell.ctl("images", "--cached").out


def test_backups_rotate_and_say_so(cell: CtlCell) -> None:
    for number in range(3):
        result = cell.ctl("backup", "model", "--image", f"b-{number}", "--rotation", "2", "--type", "weekly")
        assert result.code == 0, result
    assert "image b-0 was beyond the rotation and is deleted" in result.out
    assert set(stored(cell, "--property", "backup_type=weekly")) == {"b-1", "b-2"}


def test_an_image_that_is_there_fails_and_says_why(cell: CtlCell) -> None:
    result = cell.ctl("snapshot", "model", "--image", IMAGE)
    assert result.code == 1
    assert "has an image of this id already" in result.err


@pytest.mark.parametrize(
    "options",
    [
        ("--image", "../x"),
        ("--name", "a\nb"),
        ("--property", "novalue"),
        ("--property", "a\x1b=b"),
        ("--compression", "zlib", "--disk-format", "raw"),
        ("--store", "nosuch"),
    ],
)
def test_what_is_wrong_is_refused(cell: CtlCell, options: tuple[str, ...]) -> None:
    before = stored(cell)
    assert cell.ctl("snapshot", "model", *options).code not in (0, 1)
    assert stored(cell) == before


def test_a_store_that_is_not_there(cell: CtlCell) -> None:
    result = cell.ctl("images", "--store", "nosuch")
    assert result.code != 0
    assert "nosuch" in result.err


def test_rows() -> None:
    image = ImageMeta(id="b", size_bytes=3 << 20, properties={"image_type": "backup", "backup_type": "daily"})
    assert stored_rows([StoredImage(image=image, created_at=40.0)], 100.0) == [
        ("b", "", "raw", "3.0 MiB", "1 min 0 s ago", "daily", "")
    ]
    assert stored_rows([StoredImage(image=ImageMeta(id="c"))], 1.0) == [("c", "", "raw", "", "", "", "")]
    base = CachedImage(name="base", size_bytes=1 << 30, allocated_bytes=1 << 20, used_at=90.0, in_use=True)
    assert cached_rows({"h": [base]}, 100.0) == [("h", "base", "1.0 GiB", "1.0 MiB", "10.0 s ago", "yes")]
