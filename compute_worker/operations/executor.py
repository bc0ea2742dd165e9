"""How one operation runs: step by step, undone in reverse when it fails before its COMMIT, forward only after it.

A step costs one commit: its end and the next one's start are written together.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import tenacity

from compute_worker.errors import Broken, Cancelled, ComputeError, Retryable, StoreBusy, from_dict
from compute_worker.operations import journal
from compute_worker.operations.database import Database, Tx
from compute_worker.operations.kinds import Commit, Decided, Kind, Step
from compute_worker.operations.outbox import Outbox
from compute_worker.operations.run import Run, Stopping
from compute_worker.operations.stuck import Stuck, as_compute_error
from compute_worker.states import OperationState

LOG = logging.getLogger(__name__)


class Point(StrEnum):
    """Where the process may die: what the kill harness counts."""

    BEFORE_DO = "before_do"
    AFTER_DO = "after_do"
    BEFORE_RECORD = "before_record"
    AFTER_RECORD = "after_record"


R = TypeVar("R")

Observer = Callable[[Point, Run, str, str], None]
"""Called as ``observer(point, run, step, direction)`` at every point; the real worker has none."""


def _unobserved(point: Point, run: Run, step: str, direction: str) -> None:
    """Nobody looks."""


class Executor:
    """Runs operations of the given kinds against one journal.

    :param step_attempts: tries of a step before COMMIT while its error is retryable and not a mere wait.
    """

    def __init__(
        self,
        database: Database,
        outbox: Outbox,
        kinds: Mapping[str, Kind],
        step_attempts: int = 5,
        observer: Observer = _unobserved,
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._kinds = kinds
        self._attempts = step_attempts
        self._observe = observer
        self._stuck = Stuck(database, outbox)

    def execute(self, run: Run) -> bool:
        """Take the operation to its end, from wherever the journal says it is. False: it had ended before.

        :raises Stopping: the worker ends; the journal has what is needed to go on.
        :raises Closed: the same, at once.
        :raises Exception: after COMMIT its end cannot be recorded (a defect), or nobody knows its kind (another
            release's): it stays open until the restart.
        """
        if run.kind not in self._kinds:
            raise Broken(f"this release knows no operation {run.kind}")
        kind = self._kinds[run.kind]
        entry = self._database.read(lambda tx: journal.by_id(tx, run.id))
        if entry.state.final:
            return False
        if entry.cancel_requested:
            # Written after the caller of submit() had read its entry, and before there was a run to tell.
            run.cancel(entry.preempted)
        failed = from_dict(entry.error or {}) if entry.state is OperationState.UNDOING else None
        steps = self._plan(run, kind, failed)
        if steps is None:
            return True
        if failed is None:
            failed = self._go(run, kind, steps)
        while failed is not None:
            try:
                self._undo(run, kind, steps, failed)
                return True
            except Decided as decided:
                self._turn(run, decided)
                failed = self._go(run, kind, steps)
        return True

    def _go(self, run: Run, kind: Kind, steps: Sequence[Step]) -> ComputeError | None:
        """Forward to the end. Returns why it is to be undone, once that is on record."""
        try:
            self._forward(run, kind, steps)
        except Exception as exc:
            self._leave_if_stopping(run, exc)
            if run.committed and not (kind.gives_up or run.preempted):
                raise
            return self._failed(run, kind, self._as_compute_error(run, exc))
        return None

    def tell_parked(self, run: Run, exc: Exception) -> None:
        """Notify that :meth:`execute` raised ``exc``, and that the operation stays open."""
        if run.kind in self._kinds:
            self._stuck.tell(run, self._kinds[run.kind], run.phase, exc)

    def _plan(self, run: Run, kind: Kind, failed: ComputeError | None) -> Sequence[Step] | None:
        """Its steps. ``None``: they cannot be told (arguments of another release), and that was its end.

        What it had begun is then put back by nobody; deleting the instance removes it. After COMMIT this goes on.
        """
        run.undoing = failed is not None
        try:
            return self._try(run, kind, "plan", kind.steps)[1]
        except Exception as exc:
            self._leave_if_stopping(run, exc)
            run.phase = "plan"
            error = self._as_compute_error(run, exc)
            LOG.error("operation %s ends: its steps cannot be told, nothing is put back: %s", run.uuid, error)
            self._end(run, kind, OperationState.UNDONE, failed or error)
            return None

    @staticmethod
    def _leave_if_stopping(run: Run, exc: Exception) -> None:
        """:raises Stopping: the worker's end interrupts what steps wait for: that is no failure of theirs."""
        if run.stopping:
            raise Stopping from exc

    def _failed(self, run: Run, kind: Kind, error: ComputeError) -> ComputeError | None:
        if run.committed:
            self._end(run, kind, OperationState.UNDONE, error)
            return None
        run.undoing = True

        def record(tx: Tx) -> None:
            journal.update(tx, run.id, state=OperationState.UNDOING, error=_json(error.to_dict()))

        self._write(run, record)
        return error

    def _turn(self, run: Run, decided: Decided) -> None:
        """Forward again, from the step that had failed."""
        LOG.warning("operation %s: %s: it goes on, whatever had failed: %s", run.uuid, decided, run.error)
        self._write(run, lambda tx: journal.turn(tx, run.id))
        run.undoing, run.error, run.waiting_for = False, None, None

    @staticmethod
    def _as_compute_error(run: Run, exc: Exception) -> ComputeError:
        if not isinstance(exc, ComputeError):
            LOG.exception("operation %s: step %s failed unexpectedly", run.uuid, run.phase)
        return as_compute_error(exc, run.kind, run.phase)

    def _write(self, run: Run, func: Callable[[Tx], None]) -> None:
        """Record, however long the journal cannot be written (a full disk): the step's work stands meanwhile."""
        try:
            self._database.write(func)
        except StoreBusy:
            self._write_when_possible(run, func)

    def _write_when_possible(self, run: Run, func: Callable[[Tx], None]) -> None:
        def again(state: tenacity.RetryCallState) -> bool:
            busy = isinstance(state.outcome.exception() if state.outcome else None, StoreBusy)
            run.waiting_for = "room in the journal" if busy else None
            return busy

        tenacity.Retrying(retry=again, wait=tenacity.wait_fixed(1), sleep=run.sleep, reraise=True)(
            self._database.write, func
        )

    # --- forward ------------------------------------------------------------------------------------------------

    def _forward(self, run: Run, kind: Kind, steps: Sequence[Step]) -> None:
        position = self._position(run, steps)
        if position == len(steps):
            self._end(run, kind, OperationState.DONE, None)
            return
        self._write(run, lambda tx: self._begin(tx, run, steps, position))
        for index in range(position, len(steps)):
            if steps[index].cancellable:
                run.check()
            self._one(run, kind, steps, index)

    def _position(self, run: Run, steps: Sequence[Step]) -> int:
        """The first step that is not recorded as done; results of the others are loaded."""
        done = {
            s.name: s
            for s in self._database.read(lambda tx: journal.steps_of(tx, run.id))
            if s.direction == "do" and s.state == "done"
        }
        for index, step in enumerate(steps):
            if step.name not in done:
                return index
            run.results[step.name] = done[step.name].result or {}
        return len(steps)

    def _begin(self, tx: Tx, run: Run, steps: Sequence[Step], index: int) -> None:
        journal.step_started(tx, run.id, index, "do", steps[index].name)
        journal.update(tx, run.id, state=OperationState.RUNNING, phase=steps[index].name)

    def _one(self, run: Run, kind: Kind, steps: Sequence[Step], index: int) -> None:
        step = steps[index]
        run.begin_step(step.name)
        run.report(step.name)
        self._observe(Point.BEFORE_DO, run, step.name, "do")
        attempts, result = 1, None
        if not isinstance(step, Commit):
            attempts, result = self._try(run, kind, step.name, step.do, step.cancellable)
        self._observe(Point.AFTER_DO, run, step.name, "do")
        run.results[step.name] = dict(result or {})

        def record(tx: Tx) -> None:
            if isinstance(step, Commit):
                if step.cancellable and journal.by_id(tx, run.id).cancel_requested:
                    raise Cancelled(f"operation {run.uuid} was cancelled")
                step.record(tx, run)
                journal.update(tx, run.id, committed=1)
            journal.step_ended(tx, run.id, index, "do", attempts=attempts, result=result, reason=run.reason)
            if index + 1 < len(steps):
                self._begin(tx, run, steps, index + 1)

        self._observe(Point.BEFORE_RECORD, run, step.name, "do")
        if index + 1 < len(steps):
            self._write(run, record)
            run.committed = run.committed or isinstance(step, Commit)
            self._observe(Point.AFTER_RECORD, run, step.name, "do")
        else:
            self._end(run, kind, OperationState.DONE, None, also=record)
            self._observe(Point.AFTER_RECORD, run, step.name, "do")

    def _try(
        self, run: Run, kind: Kind, name: str, do: Callable[[Run], R], cancellable: bool = True
    ) -> tuple[int, R]:
        """Run one step until it ends well or its error stands. Returns the attempts it took and its result."""
        counted = 0

        def again(state: tenacity.RetryCallState) -> bool:
            nonlocal counted
            error = state.outcome.exception() if state.outcome else None
            if not isinstance(error, Exception):
                return False
            counted += not _is_mere_waiting(error)
            verdict, why = decide_again(error, run, kind, counted, self._attempts)
            run.waiting_for = str(error) if verdict else None
            level = logging.WARNING if verdict else logging.DEBUG
            LOG.log(level, "operation %s: step %s: %s: %s", run.uuid, name, error, why)
            if verdict:
                self._stuck.failed(run, kind, name, error, counted)
            return verdict

        retrying = _backoff(run, again, cancellable)
        result = retrying(do, run)
        run.waiting_for = None
        return int(retrying.statistics.get("attempt_number", 1)), result

    # --- backward -----------------------------------------------------------------------------------------------

    def _undo(self, run: Run, kind: Kind, steps: Sequence[Step], error: ComputeError) -> None:
        run.undoing = True
        run.error = error
        rows = self._database.read(lambda tx: journal.steps_of(tx, run.id))
        begun = {s.name for s in rows if s.direction == "do"}
        undone = {s.name for s in rows if s.direction == "undo" and s.state == "done"}
        for index in reversed(range(len(steps))):
            step = steps[index]
            if step.name in begun and step.name not in undone and not isinstance(step, Commit):
                self._undo_one(run, kind, index, step)
        self._end(run, kind, OperationState.UNDONE, error)

    def _undo_one(self, run: Run, kind: Kind, index: int, step: Step) -> None:
        run.begin_step(step.name)

        def begin(tx: Tx) -> None:
            journal.step_started(tx, run.id, index, "undo", step.name)
            journal.update(tx, run.id, phase=f"undo {step.name}")

        self._write(run, begin)
        self._observe(Point.BEFORE_DO, run, step.name, "undo")
        counted = 0

        def again(state: tenacity.RetryCallState) -> bool:
            nonlocal counted
            failed = state.outcome.exception() if state.outcome else None
            if not isinstance(failed, Exception) or isinstance(failed, Decided):
                return False
            counted += not _is_mere_waiting(failed)
            run.waiting_for = str(failed)
            LOG.warning("operation %s: undo of step %s: %s; again", run.uuid, step.name, failed)
            self._stuck.failed(run, kind, step.name, failed, counted)
            return True

        retrying = _backoff(run, again)
        retrying(step.undo, run)
        run.waiting_for = None
        attempts = int(retrying.statistics.get("attempt_number", 1))
        self._observe(Point.AFTER_DO, run, step.name, "undo")
        self._observe(Point.BEFORE_RECORD, run, step.name, "undo")
        self._write(
            run, lambda tx: journal.step_ended(tx, run.id, index, "undo", attempts=attempts, reason=run.reason)
        )
        self._observe(Point.AFTER_RECORD, run, step.name, "undo")

    # --- the end ------------------------------------------------------------------------------------------------

    def _end(
        self,
        run: Run,
        kind: Kind,
        state: OperationState,
        error: ComputeError | None,
        also: Callable[[Tx], None] | None = None,
    ) -> None:
        def record(tx: Tx) -> None:
            if also is not None:
                also(tx)
            if error is None:
                kind.finish(tx, run)
            else:
                kind.abandon(tx, run, error)
            self.write_end(tx, run, kind, state, error)

        self._write(run, record)
        self._outbox.ring()
        LOG.log(
            logging.INFO if error is None else logging.WARNING,
            "operation %s: %s of instance %s is %s%s",
            run.uuid,
            run.kind,
            run.instance,
            state,
            f": {error}" if error else "",
        )

    def write_end(self, tx: Tx, run: Run, kind: Kind, state: OperationState, error: ComputeError | None) -> None:
        """The final row of an operation and its last notification. Its secrets leave the journal.

        Done, its result is what its last step returned.
        """
        said = error.to_dict() if error else None
        if kind.secret_args:
            journal.forget_args(tx, run.id, kind.secret_args)
        result = {} if error else next(reversed(run.results.values()), {})
        ended = {"state": state, "phase": state.value, "error": _json(said) if said else None, "result": _json(result)}
        journal.update(tx, run.id, **ended)
        self._outbox.add(
            tx,
            f"instance.{kind.event}.{'error' if error else 'end'}",
            {
                "instance": run.instance,
                "kind": kind.name,
                "state": state.value,
                "error": said,
                **({"result": result} if result else {}),
            },
            operation_row=run.id,
            priority="ERROR" if error else "INFO",
        )


def _is_mere_waiting(error: Exception) -> bool:
    return isinstance(error, Retryable) and error.patient


def decide_again(error: Exception, run: Run, kind: Kind, counted: int, attempts: int) -> tuple[bool, str]:
    """Whether a failed step is run again, and why. ``counted``: failures so far that were not mere waiting."""
    if isinstance(error, Cancelled) and (not run.committed or run.preempted):
        return False, "cancelled"
    if _is_mere_waiting(error):
        return True, "waits until it answers"
    if run.committed and not kind.gives_up:
        return True, "committed: only forward"
    if run.undoing and isinstance(error, Retryable):
        return True, "what it did is put back, however long that takes"
    if not isinstance(error, Retryable):
        return False, "trying again cannot help"
    if counted < attempts:
        return True, f"attempt {counted} of {attempts}"
    return False, f"failed {attempts} times"


def _backoff(
    run: Run, again: Callable[[tenacity.RetryCallState], bool], cancellable: bool = True
) -> tenacity.Retrying:
    return tenacity.Retrying(
        retry=again,
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=10) + tenacity.wait_fixed(0.1),
        sleep=run.pause if cancellable else run.sleep,
        reraise=True,
    )


def _json(value: Any) -> str:
    return json.dumps(value)
