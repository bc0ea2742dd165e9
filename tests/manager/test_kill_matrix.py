"""Every lifecycle operation, killed at every step: nobody has to repair anything, and nothing happens twice."""

from __future__ import annotations

import functools
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker.manager import withdrawals
from compute_worker.manager.service import kinds_of
from compute_worker.operations.database import Closed
from compute_worker.operations.executor import Point
from compute_worker.states import OperationState
from tests.manager.machine import IMAGE, Machine, quiet_deaths
from tests.manager.movescenes import MOVE_KINDS
from tests.manager.scenes import BROKEN, OPERATION, SCENES, UUID, Scene, backed_up
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


def prepared(scene: Scene, directory: Path) -> tuple[Machine, Counter]:
    machine = Machine(directory)
    scene.prepare(machine)
    if scene.fault:
        machine.host.faults.fail(scene.fault, BROKEN, times=1)
    machine.reached.clear()
    return machine, Counter(machine.host.effects)


@functools.cache
def points_of(name: str) -> list[tuple]:
    """Every point that the scene's operation passes when nothing dies."""
    scene = next(s for s in SCENES if s.name == name)
    with tempfile.TemporaryDirectory() as directory:
        machine, before = prepared(scene, Path(directory))
        assert scene.send(machine) == OPERATION
        check(machine, scene, before)
        machine.close()
        return [p for p in machine.reached if p[0] == scene.kind]


def check(machine: Machine, scene: Scene, before: Counter) -> None:
    """The oracle: outside, record, effects, leftovers, notifications."""
    outcome = machine.outcome(OPERATION)
    assert outcome.state is scene.state, outcome.error
    machine.settle(UUID)
    record = machine.instance(UUID)
    assert (record.vm_state if record else None) is scene.vm_state
    assert machine.host.power_of(UUID) is scene.power
    assert machine.host.cell.violations == []
    seen = {what: machine.host.effects[UUID, what] - before[UUID, what] for what in scene.effects}
    assert seen == scene.effects
    if scene.vm_state is None:
        assert machine.host.leftovers() == []
        assert machine.worker.core.claims.usage()["memory_mb"].used == 0
    else:
        assert {left.kind for left in machine.host.leftovers()} <= {"directory", "domain"}
        assert machine.worker.core.claims.usage()["memory_mb"].used == 128
    check_images(machine, scene)
    mine = [n for n in machine.notifications() if n.operation == OPERATION and not n.event_type.endswith("progress")]
    ends = [n.event_type.rpartition(".")[2] for n in mine]
    assert ends == ["start", "end" if scene.state is OperationState.DONE else "error"]


def check_images(machine: Machine, scene: Scene) -> None:
    """What the store has when a snapshot has ended: its image whole, or nothing of it."""
    if scene.image is None:
        return
    wait_for(lambda: withdrawals.waiting(machine.worker.core) == [], what="images to be withdrawn")
    done = scene.state is OperationState.DONE
    before = {IMAGE} | ({"backup-1"} if scene.prepare is backed_up else set())
    assert machine.host.images.names() == before | ({scene.image} if done else set())
    note = machine.host.images.note(scene.image)
    assert (note is not None and note.image.checksum is not None) is done


CELLS = [(scene, point) for scene in SCENES for point in points_of(scene.name)]


def test_every_kind_is_in_the_matrix(tmp_path):
    machine = Machine(tmp_path)
    kinds = {name for name, kind in kinds_of(machine.worker.core).items() if kind.limit != "immediate"}
    assert kinds - MOVE_KINDS == {scene.kind for scene in SCENES}
    machine.close()


@pytest.mark.parametrize(("scene", "point"), CELLS, ids=lambda v: v.name if isinstance(v, Scene) else "-".join(v[1:]))
def test_killed_here_it_still_ends_well(tmp_path, scene, point):
    machine, before = prepared(scene, tmp_path)
    machine.die_at = point
    scene.send(machine)
    wait_for(machine.dead.is_set, what=f"death at {point}")
    machine.restart()
    check(machine, scene, before)
    machine.close()


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.name)
def test_hypervisor_dies_at_every_step(tmp_path, scene):
    """The hypervisor's daemon is killed before each step and comes back: the operation waits and goes on."""
    machine, before = prepared(scene, tmp_path)
    for point in points_of(scene.name):
        if point[3] is Point.BEFORE_DO:
            machine.at[point] = machine.host.hypervisor_down
    stop = []

    def revive():
        if not machine.host.hypervisor_up:
            machine.host.hypervisor_restart()
        return bool(stop)

    reviver = threading.Thread(target=lambda: wait_for(revive, deadline=30, what="the scene to end"), daemon=True)
    reviver.start()
    scene.send(machine)
    check(machine, scene, before)
    stop.append(True)
    reviver.join()
    machine.close()


@pytest.mark.parametrize("scene", [s for s in SCENES if s.kind != "terminate_instance"], ids=lambda s: s.name)
def test_deleted_at_every_step(tmp_path_factory, scene):
    """A delete that comes at any point wins, and leaves nothing."""
    for point in points_of(scene.name):
        machine, _ = prepared(scene, tmp_path_factory.mktemp("delete"))
        deletes = []
        machine.at[point] = lambda m=machine, d=deletes: d.append(m.send("terminate_instance", UUID))
        scene.send(machine)
        machine.outcome(OPERATION)
        wait_for(lambda d=deletes: d, what="the delete")
        assert machine.outcome(deletes[0]).state is OperationState.DONE
        assert machine.host.leftovers() == [], point
        assert machine.instance(UUID) is None
        assert machine.worker.core.claims.usage()["memory_mb"].used == 0
        if scene.image is not None:
            wait_for(lambda m=machine: withdrawals.waiting(m.worker.core) == [], what="images to be withdrawn")
            assert not [name for name in machine.host.images.names() if name.endswith(".part")]
        machine.close()


def dead_or_final(machine: Machine) -> bool:
    try:
        return machine.dead.is_set() or machine.worker.operations.get(OPERATION).state.final
    except Closed:
        return True


SCHEDULES = st.lists(st.integers(0, 10_000), min_size=2, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scene=st.sampled_from(SCENES), seeds=SCHEDULES)
def test_any_schedule_of_two_or_more_deaths(tmp_path_factory, scene, seeds):
    machine, before = prepared(scene, tmp_path_factory.mktemp("schedule"))
    points = points_of(scene.name)
    for number, seed in enumerate(seeds):
        machine.die_at = points[seed % len(points)]
        if number == 0:
            scene.send(machine)
        wait_for(lambda m=machine: dead_or_final(m), what="death or end")
        if not machine.dead.is_set():
            break
        machine.restart()
    machine.die_at = None
    check(machine, scene, before)
    machine.close()
