from __future__ import annotations

import pytest
import tenacity

from compute_worker import errors
from compute_worker.operations import executor
from compute_worker.operations.stuck import Stuck
from compute_worker.states import OperationState
from tests.operations.world import Worker, World
from tests.waiting import wait_for

UUID = "33333333-3333-4333-8333-333333333333"


@pytest.fixture
def world():
    return World()


@pytest.fixture
def worker(tmp_path, world):
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    yield worker
    worker.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Attempts follow each other without the pauses that spare the hypervisor."""
    backoff = executor._backoff
    monkeypatch.setattr(executor, "_backoff", lambda *about: backoff(*about).copy(wait=tenacity.wait_fixed(0.01)))


def told(worker):
    return [row for row in worker.operations.outbox.peek(100) if row.event_type.endswith(".waiting")]


def often(worker, after, every=600.0):
    """The same with other numbers: no test waits ten minutes."""
    worker.operations._executor._stuck = Stuck(worker.database, worker.operations.outbox, after, every)


def test_what_fails_after_its_commit_is_told_once(worker, world):
    often(worker, 2)
    world.failing["three"] = [errors.GuestFailed(instance="i", reason="no room")] * 4
    operation = worker.outcome(worker.send(operation=UUID).operation, 30)
    assert operation.state is OperationState.DONE
    (row,) = told(worker)
    assert row.event_type == "instance.make.waiting" and row.priority == "ERROR" and row.operation == UUID
    assert row.payload["phase"] == "three" and row.payload["state"] == "running" and row.payload["kind"] == "make"
    assert row.payload["error"]["class"] == "GuestFailed" and "no room" in row.payload["error"]["message"]
    assert row.sequence == 2


def test_it_is_told_again_when_its_time_is_over(worker, world):
    often(worker, 1, every=0.0)
    world.failing["three"] = [errors.Broken("no")] * 3
    worker.outcome(worker.send().operation, 30)
    assert len(told(worker)) == 3


def test_few_failures_are_not_told(worker, world):
    often(worker, 4)
    world.failing["three"] = [errors.Broken("no")] * 3
    worker.outcome(worker.send().operation, 30)
    assert told(worker) == []


def test_before_commit_its_end_tells_enough(worker, world):
    often(worker, 1)
    world.failing["two"] = [errors.HypervisorBusy(reason=str(n)) for n in range(9)]
    assert worker.outcome(worker.send().operation, 30).state is OperationState.UNDONE
    assert told(worker) == []


def test_an_undo_that_keeps_failing_is_told(worker, world):
    often(worker, 2)
    world.failing["two"] = [errors.Broken("no")]
    world.failing["undo-one"] = [errors.Broken("x"), OSError(28, "No space left", "/var/secret/path")]
    assert worker.outcome(worker.send().operation, 30).state is OperationState.UNDONE
    (row,) = told(worker)
    assert row.payload["state"] == "undoing" and row.payload["phase"] == "one"
    assert "OSError" in row.payload["error"]["message"] and "/var/secret" not in str(row.payload)


def test_a_journal_that_is_full_fails_no_step(worker, world, monkeypatch):
    often(worker, 1)
    add, refused = worker.operations.outbox.add, []

    def full(tx, event_type, payload, **about):
        if event_type.endswith(".waiting"):
            refused.append(event_type)
            raise errors.StoreBusy
        add(tx, event_type, payload, **about)

    monkeypatch.setattr(worker.operations.outbox, "add", full)
    world.failing["three"] = [errors.Broken("no")] * 2
    assert worker.outcome(worker.send().operation, 30).state is OperationState.DONE
    assert len(refused) == 2


# --- steps that cannot be told: arguments of another release ---------------------------------------------------------

UNREADABLE = errors.InvalidCommand(method="journal", problem="no field 'flavor'")


def test_before_commit_it_ends_undone_with_the_reason(worker, world):
    world.failing["plan"] = [UNREADABLE]
    ended = worker.outcome(worker.send().operation)
    assert ended.state is OperationState.UNDONE and "no field 'flavor'" in ended.error["message"]
    assert world.finished == ["InvalidCommand"]
    assert worker.events() == ["instance.make.start", "instance.make.error"]


def test_a_plan_that_may_come_later_is_tried_again(worker, world):
    world.failing["plan"] = [errors.HypervisorUnavailable(reason="down"), errors.HypervisorBusy(reason="busy")]
    assert worker.outcome(worker.send().operation).state is OperationState.DONE


def test_committed_and_giving_up_it_ends_undone(worker, world):
    world.failing["plan"] = [UNREADABLE]
    assert worker.outcome(worker.send("poke").operation).state is OperationState.UNDONE


def committed_and_unreadable(worker, world, tmp_path):
    """A restart after its COMMIT, of a worker that cannot read it."""
    world.failing["three"] = [errors.Broken("no")] * 1000
    worker.send(operation=UUID)
    wait_for(lambda: worker.operations.get(UUID).waiting_for, what="the last step to fail")
    worker.close()
    world.failing = {"plan": [UNREADABLE] * 1000}
    again = Worker(tmp_path / "j", world)
    often(again, 2)
    again.operations.start()
    wait_for(lambda: told(again), what="it to be told")
    return again


def test_committed_it_stays_open_says_why_and_goes_on(worker, world, tmp_path):
    again = committed_and_unreadable(worker, world, tmp_path)
    operation = again.operations.get(UUID)
    assert operation.state is OperationState.RUNNING and "no field 'flavor'" in operation.waiting_for
    assert told(again)[0].payload["error"]["class"] == "InvalidCommand"
    world.failing.clear()
    assert again.outcome(UUID, 20).state is OperationState.DONE
    again.close()


def test_a_delete_gets_through_to_it(worker, world, tmp_path):
    again = committed_and_unreadable(worker, world, tmp_path)
    wiping = again.send("wipe").operation
    assert again.outcome(wiping).state is OperationState.DONE
    assert again.outcome(UUID).error["class"] == "Cancelled"
    again.close()


def test_what_was_being_undone_ends_with_its_own_error(worker, world, tmp_path):
    world.failing["two"] = [errors.DiskFull(path="x", needed=1)]
    world.failing["undo-one"] = [errors.Broken("no")] * 1000
    worker.send(operation=UUID)
    wait_for(lambda: worker.operations.get(UUID).state is OperationState.UNDOING, what="the undo")
    worker.close()
    world.failing = {"plan": [errors.HypervisorBusy(reason="x")] * 4 + [UNREADABLE]}
    again = Worker(tmp_path / "j", world)
    again.operations.start()
    ended = again.outcome(UUID, 30)
    assert ended.state is OperationState.UNDONE and ended.error["class"] == "DiskFull"
    again.close()
