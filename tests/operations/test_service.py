from __future__ import annotations

import threading
import time
import uuid

import pytest

from compute_worker import errors
from compute_worker.messages import Context
from compute_worker.operations import journal, service
from compute_worker.operations.executor import Point
from compute_worker.operations.service import Command
from compute_worker.states import OperationState
from tests.operations.world import Job, Worker, World
from tests.waiting import wait_for

UUID = "22222222-2222-4222-8222-222222222222"


@pytest.fixture
def world():
    return World()


@pytest.fixture
def worker(tmp_path, world):
    worker = Worker(tmp_path / "j", world)
    worker.operations.start()
    yield worker
    worker.close()


def hold(world, step):
    world.block[step] = threading.Event()
    return world.block[step]


def test_same_command_is_the_same_operation(worker, world):
    first = worker.send(operation=UUID, args={"a": 1})
    again = worker.send(operation=UUID, args={"a": 1})
    assert not first.repeated and again.repeated and again.operation == first.operation
    worker.outcome(UUID)
    assert worker.send(operation=UUID, args={"a": 1}).state is OperationState.DONE
    assert world.made["one"] == 1


def test_same_key_with_other_arguments_is_a_conflict(worker):
    worker.send(operation=UUID, args={"a": 1})
    with pytest.raises(errors.OperationConflict, match=UUID):
        worker.send(operation=UUID, args={"a": 2})


def test_derived_key_is_free_again_after_it_ended_undone(worker, world):
    world.failing["one"] = [errors.Broken("no")]
    first = worker.send(message_id="m1").operation
    assert worker.outcome(first).state is OperationState.UNDONE
    second = worker.send(message_id="m1")
    assert second.operation != first and not second.repeated
    assert worker.outcome(second.operation).state is OperationState.DONE


def test_explicit_key_is_not_free_again(worker, world):
    world.failing["one"] = [errors.Broken("no")]
    worker.outcome(worker.send(operation=UUID).operation)
    assert worker.send(operation=UUID).state is OperationState.UNDONE


def test_busy_instance_is_refused_with_who_holds_it(worker, world):
    gate = hold(world, "one")
    first = worker.send().operation
    wait_for(lambda: worker.operations.get(first).phase == "one", what="the first to begin")
    with pytest.raises(errors.InstanceBusy) as caught:
        worker.send()
    assert first in str(caught.value) and "one" in str(caught.value) and caught.value.retry_after
    gate.set()
    worker.outcome(first)


def test_preempting_command_cancels_and_runs_next(worker, world):
    hold(world, "two")
    first = worker.send().operation
    wait_for(lambda: "one" in world.things, what="the first step")
    wiping = worker.send("wipe").operation
    assert worker.outcome(wiping).state is OperationState.DONE
    assert worker.outcome(first).error["class"] == "Cancelled"
    assert world.finished == ["Cancelled", "wiped"]


def test_preempting_what_is_committed_leaves_it_to_the_preemptor(worker, world):
    hold(world, "three")
    first = worker.send().operation
    wait_for(lambda: worker.operations.get(first).committed, what="the commit")
    wiping = worker.send("wipe").operation
    assert worker.outcome(wiping).state is OperationState.DONE
    assert worker.outcome(first).state is OperationState.UNDONE
    assert not any(s.direction == "undo" for s in worker.operations.get(first).steps)


def cancel(worker, operation):
    rows = worker.database.write(lambda tx: worker.operations.cancel(tx, operation))
    worker.operations.interrupt(rows)


def test_cancel_before_commit_undoes(worker, world):
    hold(world, "two")
    first = worker.send().operation
    wait_for(lambda: "one" in world.things, what="the first step")
    cancel(worker, first)
    assert worker.outcome(first).error["class"] == "Cancelled"
    assert world.things == set()


def test_cancel_after_commit_is_refused(worker, world):
    gate = hold(world, "three")
    first = worker.send().operation
    wait_for(lambda: worker.operations.get(first).committed, what="the commit")
    with pytest.raises(errors.InvalidState, match="point of no return"):
        cancel(worker, first)
    gate.set()
    assert worker.outcome(first).state is OperationState.DONE


def test_cancel_of_an_unknown_operation_refuses_it_when_it_comes(worker):
    cancel(worker, UUID)
    with pytest.raises(errors.OperationRefusedBefore, match="cancelled"):
        worker.send(operation=UUID)


def test_expired_command_is_refused(worker):
    with pytest.raises(errors.CommandExpired):
        worker.send(expires_at=time.time() - 5)
    with pytest.raises(errors.InvalidCommand, match="24 h"):
        worker.send(expires_at=time.time() + 200_000)


def test_check_only_writes_nothing(worker):
    assert worker.send(operation=UUID, check_only=True).operation is None
    with pytest.raises(errors.OperationNotFound):
        worker.operations.get(UUID)
    assert worker.events() == []


def test_admission_limit_holds_and_order_is_kept(worker, world):
    gate = hold(world, "one")
    instances = [str(uuid.uuid4()) for _ in range(5)]
    sent = [worker.send(instance=i).operation for i in instances]
    wait_for(lambda: worker.operations.counts() == (3, {"build": 2}), what="two to run and three to wait")
    gate.set()
    for operation in sent:
        worker.outcome(operation)


def test_delete_of_what_waits_for_a_slot_does_not_wait_for_it(worker, world):
    gate = hold(world, "one")
    for _ in range(2):
        worker.send(instance=str(uuid.uuid4()))
    wait_for(lambda: worker.operations.counts() == (0, {"build": 2}), what="both slots to be taken")
    waiting = worker.send().operation
    wiping = worker.send("wipe").operation
    assert worker.outcome(wiping).state is OperationState.DONE
    assert worker.outcome(waiting).error["class"] == "Cancelled"
    gate.set()


def test_stop_leaves_the_rest_to_the_journal(tmp_path, world):
    hold(world, "two")
    worker = Worker(tmp_path / "j2", world)
    worker.operations.start()
    first = worker.send().operation
    wait_for(lambda: "one" in world.things, what="the first step")
    assert worker.operations.stop(5)
    worker.database.close()
    world.block.clear()
    again = Worker(tmp_path / "j2", world)
    assert again.operations.start() == 1
    assert again.outcome(first).state is OperationState.DONE
    assert world.made == {"one": 1, "two": 1, "three": 1}
    again.close()


def test_refused_cast_is_notified_and_leaves_the_inbox(worker):
    assert worker.operations.inbox.put("m1", b"{}")
    assert not worker.operations.inbox.put("m1", b"{}")
    context = Context(request_id="r", message_id="m1", inbox="m1")
    worker.operations.refuse(context, "make", UUID, errors.HostDisabled(host="node1", reason="x"))
    assert worker.operations.inbox.open() == []
    row = worker.operations.outbox.peek(5)[0]
    assert row.event_type == "instance.make.error" and row.payload["error"]["reschedulable"]


def test_accepting_a_cast_takes_it_out_of_the_inbox(worker):
    worker.operations.inbox.put("m1", b"{}")
    command = Command(
        kind="make", context=Context(request_id="r", message_id="m1", inbox="m1"), instance=UUID
    )
    worker.outcome(worker.operations.accept(command, lambda tx: False).operation)
    assert worker.operations.inbox.open() == []


def test_notifications_of_an_operation_are_numbered(worker):
    operation = worker.send().operation
    worker.outcome(operation)
    rows = [r for r in worker.operations.outbox.peek(10) if r.operation == operation]
    assert [r.sequence for r in rows] == [1, 2]
    worker.operations.outbox.delete([r.seq for r in rows])
    assert worker.operations.outbox.depth() == 0


def test_list_since(worker):
    first = worker.outcome(worker.send().operation)
    listed = worker.operations.list(None, None, False)
    assert [o.uuid for o in listed] == [first.uuid]
    assert worker.operations.list(listed[-1].seq, None, False) == []
    assert worker.operations.list(None, None, True) == []


def test_prune_forgets_only_what_is_old(worker):
    worker.outcome(worker.send(operation=UUID).operation)
    assert worker.operations.prune() == 0
    worker.database.write(lambda tx: tx.execute("UPDATE operations SET updated_at = 1"))
    assert worker.operations.prune() == 1
    with pytest.raises(errors.OperationNotFound):
        worker.operations.get(UUID)


def idle(worker):
    wait_for(lambda: worker.operations.counts() == (0, {}), what="nothing to run or wait")


@pytest.mark.parametrize("failing", [False, True])
def test_what_ended_since_a_repetition_found_it_open_is_not_run_again(worker, world, failing):
    world.failing["two"] = [errors.Broken("no")] * failing
    gate = hold(world, "two")
    worker.send(operation=UUID)
    wait_for(lambda: "one" in world.things, what="the first step")
    found = worker.database.read(lambda tx: journal.by_uuid(tx, UUID))
    gate.set()
    ended = worker.outcome(UUID)
    idle(worker)
    told, finished, made = worker.events(), list(world.finished), dict(world.made)
    worker.operations._runner.submit(found)
    idle(worker)
    assert worker.operations.get(UUID) == ended
    assert (worker.events(), world.finished, world.made) == (told, finished, made)


def test_cancel_between_acceptance_and_the_runner_is_not_lost(worker, world, monkeypatch):
    submit = worker.operations._runner.submit

    def late(entry):
        cancel(worker, entry.uuid)
        submit(entry)

    monkeypatch.setattr(worker.operations._runner, "submit", late)
    operation = worker.send().operation
    assert worker.outcome(operation).error["class"] == "Cancelled"
    assert world.things == set() and world.made["one"] == 0


def test_cancel_that_is_on_record_before_the_commit_wins(worker, world, monkeypatch):
    def observe(point, run, step, direction):
        if (point, step) == (Point.BEFORE_RECORD, "commit"):
            assert worker.database.write(lambda tx: worker.operations.cancel(tx, run.uuid)) == [run.id]

    monkeypatch.setattr(worker.operations._executor, "_observe", observe)
    operation = worker.outcome(worker.send().operation)
    assert operation.error["class"] == "Cancelled" and not operation.committed
    assert world.things == set()


def test_progress_that_cannot_be_notified_fails_nothing(worker, monkeypatch):
    add = worker.operations.outbox.add
    refused = []

    def full(tx, event_type, payload, **about):
        if event_type.endswith(".progress"):
            refused.append(event_type)
            raise errors.StoreBusy
        add(tx, event_type, payload, **about)

    monkeypatch.setattr(worker.operations.outbox, "add", full)
    monkeypatch.setattr(service, "_QUIET", 0)
    assert worker.outcome(worker.send().operation).state is OperationState.DONE
    assert refused


def test_what_cannot_be_interrupted_holds_up_no_delete(worker, world):
    job = world.jobs["two"] = Job(interrupt_fails=True)
    first = worker.send().operation
    assert job.begun.wait(10)
    wiping = worker.send("wipe").operation
    assert worker.outcome(wiping).state is OperationState.DONE
    assert worker.outcome(first).state is OperationState.UNDONE


def test_a_step_that_fails_as_the_worker_ends_is_done_again(tmp_path, world):
    job = world.jobs["two"] = Job()
    worker = Worker(tmp_path / "j2", world)
    worker.operations.start()
    operation = worker.send().operation
    assert job.begun.wait(10)
    assert worker.operations.stop(5)
    worker.database.close()
    world.jobs.clear()
    again = Worker(tmp_path / "j2", world)
    assert again.operations.start() == 1
    assert again.outcome(operation).state is OperationState.DONE
    again.close()


def test_what_is_accepted_while_the_journal_is_read_runs(tmp_path, world, monkeypatch):
    worker = Worker(tmp_path / "j2", world)
    read, accepting = worker.database.read, threading.Thread(target=lambda: worker.send(operation=UUID))

    def slow(func):
        found = read(func)
        if func is journal.open_entries:
            accepting.start()
            accepting.join(0.5)
        return found

    monkeypatch.setattr(worker.database, "read", slow)
    worker.operations.start()
    accepting.join()
    assert worker.outcome(UUID).state is OperationState.DONE
    worker.close()
