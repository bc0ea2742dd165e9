"""Moves under any two faults: deaths, cut cables, mishandled messages."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compute_worker.operations.database import Closed
from compute_worker.virt.simulated.connection import Died
from tests.manager.cell import Cell
from tests.manager.machine import Death, quiet_deaths
from tests.manager.movematrix import messages_of_scene, points_of, prepared
from tests.manager.movescenes import SCENES, check
from tests.manager.net import Mishap
from tests.waiting import wait_for

pytestmark = pytest.mark.early


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


SCHEDULES = int(os.environ.get("MOVE_SCHEDULES", "200"))
"""In all; each part takes as many, so that none of them is a test of minutes."""
PARTS = 5
STEP = st.tuples(st.integers(0, 10_000), st.sampled_from(["kill", "kill both", "lose", "mute", "twice", "late", "cut"]))


def ended(cell: Cell) -> bool:
    """Whether every worker lives and has nothing open."""
    try:
        return all(
            not m.dead.is_set() and not m.worker.operations.list(None, None, True) for m in cell.machines.values()
        )
    except Closed:
        return False


@pytest.mark.timeout(60 + SCHEDULES)
@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=-(-SCHEDULES // PARTS),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # A failing schedule is short as it is; to shrink it would take minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(data=st.data(), steps=st.lists(STEP, min_size=2, max_size=2))
def test_any_schedule_of_two_faults(tmp_path_factory, part, data, steps):
    scene = data.draw(st.sampled_from(SCENES[part::PARTS]))
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
                # It may be killed again before it is up.
                with contextlib.suppress(Closed, Death, Died):
                    machine.restart()
