from __future__ import annotations

import uuid

import pytest

from compute_worker import errors
from compute_worker.operations import journal
from compute_worker.operations.run import Run
from compute_worker.states import OperationState
from tests.operations.world import Worker, World
from tests.waiting import wait_for

UUID = "44444444-4444-4444-8444-444444444444"


@pytest.fixture
def world():
    return World()


@pytest.fixture
def worker(tmp_path, world):
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    yield worker
    worker.close()


def parked(worker, operation):
    wait_for(lambda: "started again" in (worker.operations.get(operation).waiting_for or ""), what="it to be parked")


def defective(worker, world, times=1000):
    """An operation whose end cannot be written: a defect, and after its COMMIT."""
    world.failing["finish"] = [ValueError("a defect")] * times
    operation = worker.send(operation=UUID).operation
    parked(worker, operation)
    return operation


def test_a_defect_is_said_and_told(worker, world):
    defective(worker, world)
    assert "ValueError" in worker.operations.get(UUID).waiting_for

    def told():
        return [r for r in worker.operations.outbox.peek(10) if r.event_type == "instance.make.waiting"]

    (row,) = wait_for(told, what="the notification")
    assert row.payload["error"]["class"] == "ComputeError"
    assert worker.operations.get(UUID).state is OperationState.RUNNING


def test_it_holds_no_slot(worker, world):
    world.failing["finish"] = [ValueError("a defect")] * 2
    stuck = [worker.send(instance=str(uuid.uuid4())).operation for _ in range(2)]
    for operation in stuck:
        parked(worker, operation)
    assert worker.operations.counts() == (0, {})
    assert worker.outcome(worker.send(instance=str(uuid.uuid4())).operation).state is OperationState.DONE


def test_a_delete_gets_through_and_ends_it(worker, world):
    defective(worker, world)
    wiping = worker.send("wipe").operation
    assert worker.outcome(wiping).state is OperationState.DONE
    assert worker.outcome(UUID).error["class"] == "Cancelled"
    assert world.finished == ["Cancelled", "wiped"]
    wait_for(lambda: worker.operations.counts() == (0, {}), what="nothing to run")


def test_a_delete_gets_through_also_when_it_cannot_be_ended(worker, world, monkeypatch):
    defective(worker, world)
    monkeypatch.setattr(worker.operations._executor, "execute", _fails_for(worker, UUID))
    assert worker.outcome(worker.send("wipe").operation).state is OperationState.DONE
    parked(worker, UUID)


def _fails_for(worker, operation):
    execute = worker.operations._executor.execute

    def failing(run):
        if run.uuid == operation:
            raise ValueError("a defect")
        return execute(run)

    return failing


def test_another_command_is_told_who_holds_the_instance(worker, world):
    defective(worker, world)
    with pytest.raises(errors.InstanceBusy, match=UUID):
        worker.send()


def test_after_a_restart_it_goes_on(worker, world, tmp_path):
    defective(worker, world, times=1)
    worker.close()
    again = Worker(tmp_path / "j", world)
    assert again.operations.start() == 1
    assert again.outcome(UUID).state is OperationState.DONE
    again.close()


def test_a_kind_that_this_release_does_not_know_keeps_nobody_from_starting(worker, world, tmp_path):
    defective(worker, world)
    worker.database.write(lambda tx: tx.execute("UPDATE operations SET kind = 'knead'"))
    worker.close()
    world.failing.clear()
    again = Worker(tmp_path / "j", world)
    assert again.operations.start() == 1
    wait_for(lambda: "knead" in (again.operations.get(UUID).waiting_for or ""), what="it to be parked")
    assert again.outcome(again.send("wipe").operation).state is OperationState.DONE
    again.close()


def test_a_report_after_the_end_fails_nothing(worker, world):
    def broken(*about):
        raise ValueError("a defect of whoever is told")

    worker.operations._runner._on_end = broken
    assert worker.outcome(worker.send().operation).state is OperationState.DONE
    wait_for(lambda: worker.operations.counts() == (0, {}), what="its slot to be free")


def test_wake_without_an_instance_wakes_everybody(worker, monkeypatch):
    woken = []
    for number in (1, 2):
        worker.send(instance=str(uuid.uuid4()), operation=str(uuid.UUID(int=number)))
    entries = worker.database.read(lambda tx: journal.changed_since(tx, 0, None, open_only=False))
    runs = [Run(entry) for entry in entries]
    monkeypatch.setattr(Run, "wake", lambda run: woken.append(run.id))
    worker.operations._runner._runs = {run.id: run for run in runs}
    worker.operations.wake(runs[0].instance)
    assert woken == [runs[0].id]
    woken.clear()
    worker.operations.wake("")
    assert sorted(woken) == sorted(run.id for run in runs)
