from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.output import Output
from compute_worker.demo import living, scenario
from compute_worker.demo.embedded import embedded_demo
from compute_worker.demo.living import problems
from compute_worker.demo.stage import FIRST, SceneFailed, Stage

BOOT, TICK = r"BOOT \d+", r"tick (\d+) up="


def lines(*ticks: int) -> str:
    return "".join(f"tick {n} up=1\n" for n in ticks)


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([f"BOOT 1\n{lines(1, 2, 3)}", lines(4, 5), lines(6)], []),
        (["BOOT 1\ntick 3 up=1\nti", "ck 4 up=1\ntick 5 up=2\n"], []),
        ([lines(1, 2, 3), lines(5)], ["5 after 3"]),
        ([lines(3, 4), lines(4, 5)], ["4 after 4", "4 on two hosts"]),
        ([lines(3), f"BOOT 2\n{lines(4)}"], ["it booted anew"]),
        ([lines(1, 9, 3), lines(4)], ["3 after 9"]),
    ],
)
def test_what_consoles_say_of_a_guest_that_moved(texts: list[str], found: list[str]) -> None:
    assert problems(texts, BOOT, TICK, 3) == found


@pytest.fixture
def stage() -> Iterator[Stage]:
    with embedded_demo() as cell:
        stage = Stage(cell, Output(stdout=io.StringIO(), stderr=io.StringIO()))
        scenario.boot_with_kernel(stage)
        stage.booted(FIRST, 1)
        yield stage


def test_there_back_and_aborted(stage: Stage) -> None:
    told = living.there_and_back(stage)
    assert told.startswith("node1 -> node2: ") and "stood still for" in told and "its own instances directory" in told
    assert stage.guest(FIRST)[1] == "node1"
    told = living.aborted(stage)
    assert told.startswith("it goes on on node1 (tick ") and told.endswith("nothing is left on node2")
    scenario.delete(stage)
    assert scenario.nothing_left(stage)


def test_a_busy_guest_until_the_policy_acts(stage: Stage) -> None:
    told = living.busy(stage)
    assert told.startswith("node1 -> node2 in ") and " by pause: " in told
    scenario.delete(stage)
    assert scenario.nothing_left(stage)


def test_a_guest_that_nothing_had_to_be_done_about_is_no_success(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(stage.cell), "busy", lambda self, instance: instance)
    with pytest.raises(SceneFailed, match="nothing had to be done about it"):
        living.busy(stage)


def test_a_move_that_fails_is_no_success(stage: Stage) -> None:
    cell: Any = stage.cell
    cell._hosts["node2"].faults.fail("receive", errors.DiskFull(path="instances"))
    with pytest.raises(SceneFailed, match=r"live_migration: undone: .*no space left"):
        living.there_and_back(stage)


def test_one_that_arrives_before_it_is_aborted_is_no_success(stage: Stage) -> None:
    cell: Any = stage.cell
    for host in cell._hosts.values():
        host.link_rate = 1e12
    with pytest.raises(SceneFailed, match="before it could be aborted"):
        living.aborted(stage)
