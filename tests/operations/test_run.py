"""What an operation tells of itself while it runs."""

from __future__ import annotations

import logging
import threading

import pytest

from compute_worker.operations.run import Run
from tests.operations.world import Worker, World
from tests.waiting import wait_for


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path / "j", World())
    worker.operations.start()
    yield worker
    worker.close()


def run_of(worker, step):
    """The operation's run, standing still in ``step``; and what lets it go on."""
    go_on = worker.world.block[step] = threading.Event()
    operation = worker.send().operation
    found: list[Run] = []

    def there() -> bool:
        found[:] = [run for run in worker.operations._runner._runs.values() if run.phase == step]
        return bool(found)

    wait_for(there, what=f"step {step}")
    return found[0], operation, go_on


def test_decisions_of_a_step_are_told_while_it_runs_and_kept(worker, caplog):
    caplog.set_level(logging.INFO)
    run, operation, go_on = run_of(worker, "one")
    for reason in ("first", "second", "first"):
        run.explain(reason)
    now = worker.operations.get(operation).steps
    assert [(step.name, step.state, step.reason) for step in now] == [("one", "started", "first; second")]
    lines = [r.getMessage() for r in caplog.records if r.getMessage().endswith((": first", ": second"))]
    about = f"operation {operation}: make of instance {run.instance}: one: "
    assert lines == [f"{about}first", f"{about}second"]
    go_on.set()
    steps = worker.outcome(operation).steps
    assert [step.reason for step in steps] == ["first; second", None, None, None]


def test_only_the_newest_decisions_are_kept(worker):
    run, operation, go_on = run_of(worker, "two")
    for number in range(40):
        run.explain(str(number))
    assert run.reason == "; ".join(map(str, range(24, 40)))
    go_on.set()
    worker.outcome(operation)


def test_what_runs_and_has_reported_is_found_by_its_kind(worker):
    run, operation, go_on = run_of(worker, "one")
    run.report("one", 3, 9, status="running")
    ((instance, progress),) = worker.operations.progress_of("make")
    assert (instance, progress.done_bytes, progress.detail) == (run.instance, 3, {"status": "running"})
    assert worker.operations.progress_of("wipe") == []
    go_on.set()
    worker.outcome(operation)
    assert worker.operations.progress_of("make") == []


def test_the_last_notification_has_the_result(worker):
    operation = worker.send().operation
    assert worker.outcome(operation).result == {"made": "three"}
    (end,) = [row.payload for row in worker.operations.outbox.peek(10) if row.event_type == "instance.make.end"]
    assert end["result"] == {"made": "three"}
