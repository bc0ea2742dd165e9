"""An operation told to a person: its steps, what was decided and why, what it waits for, what can be done."""

from __future__ import annotations

from collections.abc import Sequence

from compute_worker.ctl.text import clock, progress_line, safe, span
from compute_worker.objects import Operation, StepRecord
from compute_worker.states import MigrationStatus, OperationState

COLUMNS = ("step", "direction", "state", "attempts", "began", "took", "decision")


def head(operation: Operation) -> list[str]:
    """What stands above the steps."""
    about = f" of instance {operation.instance}" if operation.instance else ""
    lines = [
        f"operation {operation.uuid}: {operation.kind}{about} on host {operation.host}",
        f"  accepted {clock(operation.created_at)}, request {operation.request_id or 'unknown'}",
        f"  {operation.state.value}, phase {operation.phase}, {_duration(operation)}",
    ]
    if operation.progress is not None and not operation.state.final:
        lines.append(f"  progress: {progress_line(operation.progress)}")
    if operation.waiting_for:
        lines.append(f"  waits for: {operation.waiting_for}")
    if operation.error:
        lines.append(f"  error: {operation.error.get('class', '')}: {operation.error.get('message', '')}")
    lines.append(f"  {verdict(operation)}")
    return [safe(line) for line in lines]


def _duration(operation: Operation) -> str:
    seconds = span(operation.updated_at - operation.created_at)
    return f"took {seconds}" if operation.state.final else f"last change after {seconds}"


def rows(operation: Operation) -> list[Sequence[object]]:
    """One row for each step, as :data:`COLUMNS`."""
    return [_row(step, operation.created_at) for step in operation.steps]


def _row(step: StepRecord, began: float) -> Sequence[object]:
    took = span(step.ended_at - step.started_at) if step.ended_at is not None else ""
    decision = "; ".join(part for part in (step.reason, step.error) if part)
    begun = f"+{span(step.started_at - began)}"
    return (step.name, step.direction, step.state, step.attempts, begun, took, decision)


def in_postcopy(operation: Operation) -> bool:
    """Whether it is a live migration that cannot be stopped any more."""
    detail = operation.progress.detail if operation.progress is not None else {}
    return detail.get("status") == MigrationStatus.RUNNING_POSTCOPY.value


def verdict(operation: Operation) -> str:
    """What will happen now, and what an operator can do."""
    cancelling = ", a cancel was asked for" if operation.cancel_requested else ""
    if operation.state is OperationState.RUNNING and in_postcopy(operation):
        return "in post-copy: the guest runs at its destination and needs both hosts; only its end can be waited for"
    match operation.state:
        case OperationState.DONE:
            return "done: nothing more will happen"
        case OperationState.UNDONE if operation.committed:
            return "given up after it was accepted for good: the record follows what the hypervisor says"
        case OperationState.UNDONE:
            return "undone: the world is as it was before it; send the command again under a new operation uuid"
        case OperationState.REFUSED:
            return "refused: nothing was changed"
        case OperationState.UNDOING:
            return f"it failed before its COMMIT: what it did is being undone, step by step{cancelling}"
        case OperationState.QUEUED:
            return f"waits for its turn; it can be cancelled{cancelling}"
        case _ if operation.committed:
            return "past its COMMIT: it cannot be cancelled and goes on until it is through, also after a restart"
        case _:
            return f"before its COMMIT: it can be cancelled, and is undone when it fails{cancelling}"
