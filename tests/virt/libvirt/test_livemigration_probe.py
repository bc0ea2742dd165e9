"""Whether two hosts see one directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compute_worker.virt.libvirt import livemigration_probe as probe


def test_one_directory(tmp_path: Path) -> None:
    name, content = probe.make(tmp_path, "", "")
    assert (tmp_path / name).exists()
    assert probe.seen(tmp_path, name, content)
    assert list(tmp_path.iterdir()) == [], "the file has done its work"


def test_two_directories(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    name, content = probe.make(there, "", "")
    assert not probe.seen(here, name, content)
    assert (there / name).exists(), "somebody else's file is not removed"


def test_directories_that_are_known_to_differ_need_no_file(tmp_path: Path) -> None:
    assert probe.make(tmp_path, "a", "b") == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert not probe.seen(tmp_path, "", "")


def test_equal_ids_are_no_proof(tmp_path: Path) -> None:
    name, _ = probe.make(tmp_path, "a", "a")
    assert (tmp_path / name).exists()


def test_a_file_with_other_content_is_somebody_else_s(tmp_path: Path) -> None:
    name, content = probe.make(tmp_path, "", "")
    assert not probe.seen(tmp_path, name, content[::-1] + "0")
    assert not probe.seen(tmp_path, name, "")
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["../secret", "probe-x", "probe-" + "0" * 31, "/etc/passwd", "locks"])
def test_only_names_that_could_be_ours_are_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    inside = tmp_path / "inside"
    inside.mkdir()
    assert not probe.seen(inside, name, "x")
    probe.remove(inside, name)
    assert (tmp_path / "secret").exists()


def test_what_outlived_its_question_goes(tmp_path: Path) -> None:
    old, young = tmp_path / f"probe-{'0' * 32}", tmp_path / f"probe-{'1' * 32}"
    for path in (old, young):
        path.touch()
    os.utime(old, (1, 1))
    probe.clean(tmp_path)
    assert not old.exists() and young.exists()
    probe.clean(tmp_path, young.stat().st_mtime + probe.LIFETIME + 1)
    assert not young.exists()
