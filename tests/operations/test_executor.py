from __future__ import annotations

import itertools
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.operations.database import Closed
from compute_worker.operations.executor import Point, decide_again
from compute_worker.operations.kinds import Commit, Decided
from compute_worker.states import OperationState
from tests.operations.world import STEPS, Death, Worker, World
from tests.waiting import wait_for

UUID = "11111111-1111-4111-8111-111111111111"


@pytest.fixture(autouse=True)
def _quiet_deaths(monkeypatch):
    import threading

    before = threading.excepthook
    monkeypatch.setattr(
        threading, "excepthook", lambda args: None if issubclass(args.exc_type, Death) else before(args)
    )


def test_steps_run_in_order_and_results_reach_later_ones(tmp_path):
    world = World()
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    done = worker.outcome(worker.send(operation=UUID).operation)
    assert done.state is OperationState.DONE
    assert [s.name for s in done.steps] == list(STEPS)
    assert all(s.state == "done" and s.ended_at >= s.started_at for s in done.steps)
    assert world.things == {"one", "two", "three"}
    assert worker.events() == ["instance.make.start", "instance.make.end"]
    assert done.result == {"made": "three"}, "what its last step returned"
    worker.close()


def test_failure_before_commit_undoes_in_reverse_and_tells(tmp_path):
    world = World()
    world.failing["two"] = [errors.Broken("no")]
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    ended = worker.outcome(worker.send().operation)
    assert ended.state is OperationState.UNDONE
    assert ended.error["class"] == "Broken" and ended.result == {}
    assert world.things == set()
    assert [s.name for s in ended.steps if s.direction == "undo"] == ["two", "one"]
    assert worker.events()[-1] == "instance.make.error"
    worker.close()


def test_retryable_error_is_tried_again_and_counted(tmp_path):
    world = World()
    world.failing["two"] = [errors.HypervisorBusy(reason="x"), errors.HypervisorBusy(reason="x")]
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    done = worker.outcome(worker.send().operation)
    assert done.state is OperationState.DONE
    assert next(s for s in done.steps if s.name == "two").attempts == 3
    worker.close()


def test_an_undo_that_hears_of_a_decision_turns_the_operation_forward(tmp_path):
    world = World()
    world.failing["two"] = [errors.Broken("no answer")]
    world.failing["undo-two"] = [Decided("another host has it")]
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    done = worker.outcome(worker.send().operation)
    assert (done.state, done.error) == (OperationState.DONE, None)
    assert world.made == {"one": 1, "two": 1, "three": 1}
    assert [s.name for s in done.steps] == list(STEPS)
    assert worker.events()[-1] == "instance.make.end"
    worker.close()


@pytest.mark.parametrize(
    "where",
    [("two", "undo", Point.BEFORE_DO), ("two", "do", Point.AFTER_DO), ("commit", "do", Point.BEFORE_RECORD)],
)
def test_a_death_about_the_turn_changes_nothing(tmp_path, where):
    world = World()
    world.failing["two"] = [errors.Broken("no answer")]
    world.failing["undo-two"] = [Decided("another host has it")]
    worker = Worker(tmp_path / "j", world, die_at=where)
    worker.operations.start()
    operation = worker.send(operation=UUID).operation
    wait_for(worker.dead.is_set, what="the worker to die")
    again = Worker(tmp_path / "j", world)
    again.operations.start()
    assert again.outcome(operation).state is OperationState.DONE
    assert world.made == {"one": 1, "two": 1, "three": 1}
    again.close()


def test_retryable_error_before_commit_ends_after_its_attempts(tmp_path):
    world = World()
    world.failing["two"] = [errors.HypervisorBusy(reason=str(i)) for i in range(9)]
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    ended = worker.outcome(worker.send().operation, 20)
    assert ended.state is OperationState.UNDONE
    assert len(world.failing["two"]) == 6
    worker.close()


def test_after_commit_only_forward_whatever_the_error(tmp_path):
    world = World()
    world.failing["three"] = [errors.Broken("a"), ValueError("b"), errors.Broken("c"), errors.Broken("d")]
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    done = worker.outcome(worker.send().operation, 30)
    assert done.state is OperationState.DONE
    assert world.things == {"one", "two", "three"}
    worker.close()


def test_undo_is_repeated_until_it_ends_well(tmp_path):
    world = World()
    world.failing["two"] = [errors.Broken("no")]
    world.failing["undo-one"] = [errors.Broken("x"), ValueError("y")]
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    assert worker.outcome(worker.send().operation, 20).state is OperationState.UNDONE
    assert world.things == set()
    worker.close()


def test_each_kind_has_one_commit(tmp_path):
    from compute_worker.operations.run import Run

    worker = Worker(tmp_path / "j", World())
    worker.send(operation=UUID)
    from compute_worker.operations import journal

    run = Run(worker.database.read(lambda tx: journal.by_uuid(tx, UUID)))
    steps = worker._kinds()["make"].steps(run)
    assert sum(isinstance(s, Commit) for s in steps) == 1
    worker.close()


def dead_or_final(worker):
    try:
        return worker.dead.is_set() or worker.operations.get(UUID).state.final
    except Closed:
        return True


def die_and_resume(path, world, deaths, cancel=False):
    """Run one operation through a list of deaths; returns its outcome."""
    for number, death in enumerate([*deaths, None]):
        worker = Worker(path, world, death)
        worker.operations.start()
        if number == 0:
            operation = worker.send(operation=UUID).operation
        if death is not None:
            wait_for(lambda w=worker: dead_or_final(w), what=f"{death} to be reached")
            if not worker.dead.is_set():
                worker.close()
            continue
        found = worker.outcome(operation, 20)
        events = worker.events()
        worker.close()
        return found, events
    raise AssertionError


FORWARD = [(s, "do", p) for s, p in itertools.product(STEPS, Point)]


@pytest.mark.parametrize("death", FORWARD, ids=lambda d: f"{d[0]}-{d[2]}")
def test_death_at_every_point_of_the_way_forward(tmp_path, death):
    world = World()
    found, events = die_and_resume(tmp_path / "j", world, [death])
    assert found.state is OperationState.DONE and found.result == {"made": "three"}
    assert world.things == {"one", "two", "three"}
    assert world.made == {"one": 1, "two": 1, "three": 1}
    assert events == ["instance.make.start", "instance.make.end"]


BACKWARD = [(s, "undo", p) for s, p in itertools.product(("two", "one"), Point)]


@pytest.mark.parametrize("death", BACKWARD, ids=lambda d: f"{d[0]}-{d[2]}")
def test_death_at_every_point_of_the_way_back(tmp_path, death):
    world = World()
    world.failing["two"] = [errors.Broken("no")]
    found, events = die_and_resume(tmp_path / "j", world, [death])
    assert found.state is OperationState.UNDONE
    assert world.things == set()
    assert events == ["instance.make.start", "instance.make.error"]


@settings(max_examples=40, deadline=None)
@given(
    deaths=st.lists(st.sampled_from(FORWARD + BACKWARD), max_size=4),
    failing=st.sampled_from([None, "one", "two", "commit-late", "three"]),
)
def test_any_schedule_of_deaths_ends_well(tmp_path_factory, deaths, failing):
    world = World()
    if failing in ("one", "two", "three"):
        world.failing[failing] = [errors.Broken("no")]
    found, events = die_and_resume(tmp_path_factory.mktemp("w") / f"{uuid.uuid4()}", world, deaths)
    assert found.state.final
    expected = {"one", "two", "three"} if found.state is OperationState.DONE else set()
    assert world.things == expected
    assert found.state is (OperationState.UNDONE if failing in ("one", "two") else OperationState.DONE)
    assert len(events) == 2


class _FakeRun:
    def __init__(self, committed=False, preempted=False, undoing=False):
        self.committed, self.preempted, self.undoing = committed, preempted, undoing


class _FakeKind:
    def __init__(self, gives_up=False):
        self.gives_up = gives_up


@pytest.mark.parametrize(
    ("error", "run", "kind", "counted", "verdict"),
    [
        (errors.Cancelled(), _FakeRun(), _FakeKind(), 1, False),
        (errors.Cancelled(), _FakeRun(committed=True, preempted=True), _FakeKind(), 1, False),
        (errors.HypervisorUnavailable(reason=""), _FakeRun(), _FakeKind(), 99, True),
        (errors.HypervisorUnavailable(reason=""), _FakeRun(committed=True), _FakeKind(gives_up=True), 99, True),
        (errors.HypervisorBusy(reason=""), _FakeRun(), _FakeKind(), 2, True),
        (errors.HypervisorBusy(reason=""), _FakeRun(), _FakeKind(), 3, False),
        (errors.HypervisorBusy(reason=""), _FakeRun(undoing=True), _FakeKind(), 99, True),
        (errors.Broken(), _FakeRun(undoing=True), _FakeKind(), 1, False),
        (errors.Broken(), _FakeRun(), _FakeKind(), 1, False),
        (errors.Broken(), _FakeRun(committed=True), _FakeKind(), 99, True),
        (errors.Broken(), _FakeRun(committed=True), _FakeKind(gives_up=True), 1, False),
        (ValueError(), _FakeRun(), _FakeKind(), 1, False),
        (ValueError(), _FakeRun(committed=True), _FakeKind(), 1, True),
    ],
)
def test_decide_again(error, run, kind, counted, verdict):
    assert decide_again(error, run, kind, counted, 3)[0] is verdict
