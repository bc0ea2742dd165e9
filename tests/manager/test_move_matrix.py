"""Every step of a cold move, with the worker of either host or of both killed at it, and with every message mishandled:
nobody has to repair anything, and there are never two running copies."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compute_worker.operations.database import Closed
from compute_worker.states import OperationState
from tests.manager.cell import DESTINATION, OPERATION, SOURCE, UUID, Cell
from tests.manager.machine import quiet_deaths
from tests.manager.movescenes import SCENES, MoveScene, check
from tests.manager.net import Mishap
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


def prepared(scene: MoveScene, directory: Path) -> Cell:
    cell = Cell(directory)
    scene.prepare(cell)
    cell.quiet()
    if scene.fault is not None:
        host, call, error = scene.fault
        cell[host].host.faults.fail(call, error, times=1)
    for machine in cell.machines.values():
        machine.reached.clear()
    cell.net.sent.clear()
    return cell


@functools.cache
def points_of(name: str) -> list[tuple[str, tuple]]:
    """Every (host, point) that the scene passes when nothing dies."""
    scene = next(s for s in SCENES if s.name == name)
    with tempfile.TemporaryDirectory() as directory:
        cell = prepared(scene, Path(directory))
        scene.send(cell)
        check(cell, scene)
        cell.close()
        kinds = set(scene.kinds)
        found = [(n, p) for n, m in cell.machines.items() for p in m.reached if (n, p[0]) in kinds]
        return list(dict.fromkeys(found))


@functools.cache
def messages_of_scene(name: str) -> list[str]:
    """Every message between workers that the scene sends when nothing dies."""
    scene = next(s for s in SCENES if s.name == name)
    with tempfile.TemporaryDirectory() as directory:
        cell = prepared(scene, Path(directory))
        scene.send(cell)
        check(cell, scene)
        cell.close()
        return sorted({method for _, _, method in cell.net.sent})


CELLS = [(scene, host, point) for scene in SCENES for host, point in points_of(scene.name)]


PLAIN = [cell for cell in CELLS if cell[0].fault is None and not cell[0].name.endswith(("-stopped", "-paused"))]
"""The ways on which nothing fails by itself: what two deaths and deletes are tried on."""


def name_of(value: object) -> str:
    if isinstance(value, MoveScene):
        return value.name
    return value if isinstance(value, str) else "-".join(value)  # type: ignore[arg-type]


def killed(cell: Cell, scene: MoveScene, host: str, point: tuple, both: bool) -> None:
    machine = cell[host]
    machine.die_at = point
    if both:
        other = next(m for n, m in cell.machines.items() if n != host)
        machine.at[point] = other.kill
    scene.send(cell)
    wait_for(machine.dead.is_set, what=f"death at {point}")
    for each in cell.machines.values():
        if each.dead.is_set():
            each.restart()
    check(cell, scene)
    cell.close()


@pytest.mark.parametrize(("scene", "host", "point"), CELLS, ids=name_of)
def test_one_worker_killed_here(tmp_path, scene, host, point):
    killed(prepared(scene, tmp_path), scene, host, point, both=False)


@pytest.mark.parametrize(("scene", "host", "point"), PLAIN, ids=name_of)
def test_both_workers_killed_here(tmp_path, scene, host, point):
    killed(prepared(scene, tmp_path), scene, host, point, both=True)


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


DELETES = [(s, h, p) for s, h, p in PLAIN if p[2] == "do" and p[3] == "before_do"]


@pytest.mark.parametrize("at", [SOURCE, DESTINATION])
@pytest.mark.parametrize(("scene", "host", "point"), DELETES, ids=name_of)
def test_deleted_at_every_step(tmp_path, scene, host, point, at):
    """A delete that comes at any step, to either host, wins on both."""
    cell = prepared(scene, tmp_path)
    deletes: list[str] = []
    cell[host].at[point] = lambda: deletes.append(cell[at].send("terminate_instance", UUID))
    scene.send(cell)
    wait_for(lambda: deletes, what="the delete")
    assert cell[at].outcome(deletes[0]).state is OperationState.DONE
    cell.quiet()
    assert cell.simulated.violations == []
    assert cell.owners() == []
    assert cell.simulated.running_copies(UUID) == []
    for name in cell.machines:
        assert cell.leftovers(name) == set(), name
        assert cell.used_mb(name) == 0, name
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


def test_the_matrix_is_as_large_as_it_should_be():
    assert len(MISHAPS) >= 120
    assert len({(h, p[0], p[1]) for _, h, p in CELLS}) >= 30
    assert OPERATION
