"""Every message of a move mishandled, and schedules of two faults."""

from __future__ import annotations

import os
import threading

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compute_worker.operations.database import Closed
from tests.manager.cell import Cell
from tests.manager.machine import quiet_deaths
from tests.manager.movematrix import messages_of_scene, name_of, points_of, prepared
from tests.manager.movescenes import SCENES, check
from tests.manager.net import Mishap
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


MISHAPS = [
    (scene, message, what)
    for scene in SCENES
    for message in messages_of_scene(scene.name)
    for what in ("lose", "mute", "twice", "late")
]


@pytest.mark.parametrize(("scene", "message", "what"), MISHAPS, ids=name_of)
def test_messages_lost_doubled_and_late(tmp_path, scene, message, what):
    cell = prepared(scene, tmp_path)
    cell.net.mishaps[message] = Mishap(what, times=2)
    scene.send(cell)
    check(cell, scene)
    # What was held up comes when everything is long decided.
    cell.net.deliver_late()
    cell.quiet()
    check(cell, scene)
    cell.close()


SCHEDULES = int(os.environ.get("MOVE_SCHEDULES", "200"))
STEP = st.tuples(st.integers(0, 10_000), st.sampled_from(["kill", "kill both", "lose", "mute", "twice", "late", "cut"]))


def ended(cell: Cell) -> bool:
    """Whether every worker lives and has nothing open."""
    try:
        return all(
            not m.dead.is_set() and not m.worker.operations.list(None, None, True) for m in cell.machines.values()
        )
    except Closed:
        return False


@settings(
    max_examples=SCHEDULES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # A failing schedule is short as it is; to shrink it would take minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(scene=st.sampled_from(SCENES), steps=st.lists(STEP, min_size=2, max_size=2))
def test_any_schedule_of_two_faults(tmp_path_factory, scene, steps):
    cell = prepared(scene, tmp_path_factory.mktemp("schedule"))
    points, messages = points_of(scene.name), messages_of_scene(scene.name)
    for number, what in steps:
        host, point = points[number % len(points)]
        if what in ("lose", "mute", "twice", "late"):
            cell.net.mishaps[messages[number % len(messages)]] = Mishap(what, times=1 + number % 3)
        elif what == "cut":
            cell[host].at[point] = lambda h=host: cell.net.cut.add(h)
        else:
            machine = cell[host]
            machine.die_at = point
            if what == "kill both":
                other = next(m for n, m in cell.machines.items() if n != host)
                machine.at[point] = other.kill
    scene.send(cell)
    stop = threading.Event()
    mender = threading.Thread(target=_mend, args=(cell, stop), daemon=True)
    mender.start()
    try:
        wait_for(lambda: ended(cell), deadline=30, what="both hosts to have nothing open")
    finally:
        stop.set()
        mender.join()
    for machine in cell.machines.values():
        machine.die_at = None
        machine.at.clear()
    cell.net.mishaps.clear()
    cell.net.cut.clear()
    check(cell, scene)
    cell.net.deliver_late()
    check(cell, scene)
    cell.close()


def _mend(cell: Cell, stop: threading.Event) -> None:
    """Fate is kind after a while: dead workers come back, cables too. Nobody repairs anything."""
    while not stop.wait(0.05):
        cell.net.cut.clear()
        for machine in cell.machines.values():
            if machine.dead.is_set():
                machine.restart()


def test_there_are_as_many_mishaps_as_there_should_be():
    assert len(MISHAPS) >= 120
