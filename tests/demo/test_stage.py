from __future__ import annotations

import io
from typing import Any

import pytest

from compute_worker.ctl.output import Output
from compute_worker.demo.stage import Scene, SceneFailed, Stage, play


def stage() -> tuple[Stage, io.StringIO]:
    out = io.StringIO()
    cell: Any = None
    return Stage(cell, Output(stdout=out, stderr=io.StringIO())), out


def good(stage: Stage) -> str:
    stage.say("something \x1b[2J")
    return "all [b]fine[/b]"


def bad(stage: Stage) -> str:
    stage.require(False, "the guest is gone")
    return "never"


def test_every_scene_is_told_and_timed() -> None:
    on, out = stage()
    assert play(on, [Scene("first", good), Scene("second", good)])
    told = out.getvalue()
    assert " 1. first" in told and r"something \x1b[2J" in told and "good: all [b]fine[/b]" in told
    assert "2 of 2 steps good in 0.0 s" in told


def test_the_first_failure_ends_it_and_stands_in_the_table() -> None:
    on, out = stage()
    assert not play(on, [Scene("first", bad), Scene("later", good)])
    told = out.getvalue()
    assert "FAILED: SceneFailed: the guest is gone" in told and "later" not in told
    assert "0 of 2 steps good" in told


def test_until_says_what_did_not_come() -> None:
    on, _ = stage()
    assert on.until(lambda: 5, 1.0, "five") == 5
    with pytest.raises(SceneFailed, match="waited 0 s for Godot"):
        on.until(lambda: None, 0.0, "Godot")
