from __future__ import annotations

from typing import Any

import pytest

from compute_worker.ctl.explain import COLUMNS, head, rows, verdict
from compute_worker.objects import Operation, Progress, StepRecord
from compute_worker.states import OperationState

UUID = "00000000-0000-4000-8000-000000000001"


def operation(state: str = "running", **facts: Any) -> Operation:
    return Operation(
        uuid=UUID, kind="build_and_run_instance", instance=UUID, host="node1", state=OperationState(state),
        phase="create_disks", created_at=100.0, updated_at=102.5, request_id="req-1", **facts,
    )


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (operation("queued"), "waits for its turn"),
        (operation("queued", cancel_requested=True), "a cancel was asked for"),
        (operation(), "it can be cancelled"),
        (operation(progress=Progress(phase="x", detail={"status": "running"})), "it can be cancelled"),
        (operation(progress=Progress(phase="x", detail={"status": "running (post-copy)"})), "needs both hosts"),
        (operation(committed=True), "cannot be cancelled"),
        (operation("undoing"), "is being undone"),
        (operation("undone"), "undone: the world is as it was"),
        (operation("undone", committed=True), "follows what the hypervisor says"),
        (operation("refused"), "nothing was changed"),
        (operation("done", committed=True), "nothing more will happen"),
    ],
)
def test_verdict(told: Operation, words: str) -> None:
    assert words in verdict(told)


def test_every_state_has_a_verdict() -> None:
    assert all(verdict(operation(state, committed=c)) for state in OperationState for c in (False, True))


def test_head_says_what_is_known() -> None:
    lines = head(operation(
        waiting_for="host node2 does not answer", progress=Progress(phase="send", done_bytes=1, total_bytes=2),
        error={"class": "DiskFull", "message": "no space left on \x1b[2J"},
    ))
    text = "\n".join(lines)
    assert "build_and_run_instance of instance" in text and "on host node1" in text and "req-1" in text
    assert "waits for: host node2 does not answer" in text
    assert "progress: send 1 B of 2 B" in text
    assert r"error: DiskFull: no space left on \x1b[2J" in text
    assert "last change after 2.5 s" in text


def test_rows_have_timings_attempts_and_reasons() -> None:
    steps = [
        StepRecord(name="fetch", direction="do", state="done", started_at=100.5, ended_at=102.0, attempts=3,
                   reason="it was here already"),
        StepRecord(name="define", direction="do", state="failed", started_at=102.0, error="no memory"),
    ]
    first, second = rows(operation(steps=steps))
    assert len(first) == len(COLUMNS)
    assert first == ("fetch", "do", "done", 3, "+500 ms", "1.5 s", "it was here already")
    assert second == ("define", "do", "failed", 1, "+2.0 s", "", "no memory")
