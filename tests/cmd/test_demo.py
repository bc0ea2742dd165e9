from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compute_worker.cmd import demo
from compute_worker.demo.scenario import SCENES


def test_embedded_is_good_quick_and_leaves_nothing(tmp_path: Path) -> None:
    """As anybody runs it: no root, no broker, no configuration; its limit with a margin for a busy machine."""
    began = time.monotonic()
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary)}
    program = [sys.executable, "-m", "compute_worker.cmd.demo", "--embedded"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SCENES)} of {len(SCENES)} steps good" in done.stdout
    assert "define (2 attempts)" in done.stdout
    assert list(temporary.iterdir()) == []
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr
    assert time.monotonic() - began < 60


def test_a_scene_that_fails_is_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from compute_worker.demo import scenario
    from compute_worker.demo.stage import Scene, Stage

    def fail(stage: Stage) -> str:
        raise AssertionError("no")

    monkeypatch.setattr(scenario, "SCENES", (Scene("fails", fail),))
    assert demo.main(["--embedded"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_an_installed_package_shows_it_embedded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "SOURCE_TREE", tmp_path)
    monkeypatch.setattr(demo, "embedded", lambda: 0)
    assert demo.main([]) == 0
    assert "need the source tree" in capsys.readouterr().err
    assert demo.main(["--real"]) == 2
    assert "need the source tree" in capsys.readouterr().err


def test_without_root_it_is_shown_embedded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(demo, "embedded", lambda: 0)
    assert demo.main([]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "need root" in told[0] and demo.INSTEAD in told[0]


@pytest.mark.parametrize(("argv", "options"), [([], ["--or-embedded"]), (["--real"], [])])
def test_from_a_source_tree_it_becomes_the_real_one(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], options: list[str]
) -> None:
    class Became(Exception):
        """Instead of exec."""

    def became(program: str, words: list[str]) -> None:
        assert words == [sys.executable, "-m", "tests.lab.demo", *options] and program == sys.executable
        assert Path.cwd() == demo.SOURCE_TREE
        raise Became

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "execv", became)
    monkeypatch.chdir(demo.SOURCE_TREE / "tests")
    with pytest.raises(Became):
        demo.main(argv)


def test_both_at_once_is_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--embedded", "--real"])
    assert ended.value.code == 2
