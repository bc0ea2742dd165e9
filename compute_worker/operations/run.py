"""One operation while it runs: what its steps work under. It is a :class:`compute_worker.virt.driver.Job`."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from compute_worker.errors import Cancelled, ComputeError
from compute_worker.objects import Progress
from compute_worker.operations.journal import Entry

LOG = logging.getLogger(__name__)
_LOOK_AGAIN = 0.5
_SMOOTH = 0.3
_LOOK_FOR_SLOT = 60.0
_MOST_REASONS = 16
"""Decisions of one step that are kept, the newest."""


class Stopping(BaseException):
    """The worker is asked to end: the step is left where it is and done again after the restart."""


class Run:
    """What is known of an operation in memory; everything that must survive is in the journal.

    ``results`` holds what earlier steps returned, by step name. ``progress`` is the last report, ``notified_at`` when
    one was last notified, ``told_waiting_at`` when (monotonic clock) it was last notified that it cannot get on.
    """

    def __init__(self, entry: Entry, results: dict[str, dict[str, Any]] | None = None) -> None:
        self.id = entry.id
        self.uuid = entry.uuid
        self.chain = entry.chain
        self.kind = entry.kind
        self.instance = entry.instance
        self.args = entry.args
        self.request_id = entry.request_id
        self.created_at = entry.created_at
        self.committed = entry.committed
        self.preempted = entry.preempted
        self.results: dict[str, dict[str, Any]] = results or {}
        self.progress: Progress | None = None
        self.waiting_for: str | None = None
        self.phase = entry.phase
        self._reasons: list[str] = []
        self.undoing = False
        self.notified_at = 0.0
        self.told_waiting_at: float | None = None
        self._cancelled = entry.cancel_requested
        self._stopping = False
        self._nudges = 0
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []
        self._sample: tuple[float, int] | None = None
        self.on_report: Callable[[Run, bool], None] | None = None
        self.on_step_aside: Callable[[Run], None] | None = None
        self.on_yield_slot: Callable[[Run], None] | None = None
        self.on_claim_slot: Callable[[Run], None] | None = None
        self._slotless = False
        self.wants_slot = False
        """Whether it waits in :meth:`claim_slot`."""
        self.error: ComputeError | None = None
        """Why it is being undone."""

    def report(
        self, phase: str, done_bytes: int | None = None, total_bytes: int | None = None, **detail: float | int | str
    ) -> None:
        """How far it is. The rate is smoothed over reports; the rest follows from it."""
        before = self.progress
        rate = before.rate if before is not None and before.phase == phase else None
        now = time.monotonic()
        if done_bytes is not None:
            if self._sample is not None and before is not None and before.phase == phase:
                seconds, amount = now - self._sample[0], done_bytes - self._sample[1]
                if seconds >= _LOOK_AGAIN and amount >= 0:
                    fresh = amount / seconds
                    rate = fresh if rate is None else _SMOOTH * fresh + (1 - _SMOOTH) * rate
                    self._sample = (now, done_bytes)
            else:
                self._sample = (now, done_bytes)
        eta = None
        if rate and done_bytes is not None and total_bytes is not None:
            eta = max(0.0, (total_bytes - done_bytes) / rate)
        self.progress = Progress(
            phase=phase, done_bytes=done_bytes, total_bytes=total_bytes, rate=rate, eta=eta, detail=detail
        )
        if self.on_report is not None:
            self.on_report(self, before is None or before.phase != phase)

    def explain(self, reason: str) -> None:
        """Why the step does what it does: logged now, journalled with its end. Said again it is not repeated."""
        if reason in self._reasons:
            return
        LOG.info("operation %s: %s of instance %s: %s: %s", self.uuid, self.kind, self.instance, self.phase, reason)
        self._reasons = [*self._reasons, reason][-_MOST_REASONS:]

    @property
    def reason(self) -> str | None:
        """What the step has decided so far, and why."""
        return "; ".join(self._reasons) or None

    def begin_step(self, name: str) -> None:
        """Another step, which has decided nothing yet."""
        self.phase, self._reasons = name, []

    def step_aside(self) -> None:
        """From now on it only waits for somebody else: others get its slot and its instance's line."""
        if self.on_step_aside is not None:
            self.on_step_aside(self)

    def yield_slot(self) -> None:
        """It waits for somebody else until :meth:`claim_slot`: others get its slot. It keeps its instance's line."""
        if self.on_yield_slot is not None and not self._slotless:
            self._slotless = True
            self.on_yield_slot(self)

    def claim_slot(self) -> None:
        """Go on: returns once it has a slot, at once where it never gave it up.

        :raises Cancelled: as :meth:`check`.
        """
        if not self._slotless or self.on_claim_slot is None:
            return
        if not self.wants_slot:
            self.wants_slot = True
            self.on_claim_slot(self)
        self.waiting_for = "its turn among the operations of its class"
        while not self.wait(lambda: not self._slotless, _LOOK_FOR_SLOT):
            continue
        self.waiting_for = None

    def slot_granted(self) -> None:
        """It may go on."""
        self._slotless = self.wants_slot = False
        self.wake()

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for its end."""
        return self._cancelled

    @property
    def stopping(self) -> bool:
        """Whether the worker ends."""
        return self._stopping

    def check(self) -> None:
        """Leave when asked to.

        :raises Cancelled: somebody cancelled it, and it may still be undone or is preempted by a delete.
        :raises Stopping: the worker ends.
        """
        if self._stopping:
            raise Stopping
        if self._cancelled and not self.undoing and (not self.committed or self.preempted):
            raise Cancelled(f"operation {self.uuid} was cancelled")

    @contextlib.contextmanager
    def on_cancel(self, callback: Callable[[], None]) -> Iterator[None]:
        """While open, ``callback`` is called when the operation has to leave. What it raises is only logged."""
        with self._changed:
            self._callbacks.append(callback)
        try:
            try:
                self.check()
            except BaseException:
                self._call(callback)
                raise
            yield
        finally:
            with self._changed, contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Until ``condition()`` or ``timeout`` seconds; false when they ran out."""
        deadline = time.monotonic() + timeout
        while True:
            self.check()
            if condition():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._changed:
                self._changed.wait(min(left, _LOOK_AGAIN))

    def pause(self, seconds: float) -> None:
        """Sleep between two attempts; leaves early when asked to."""
        self.wait(lambda: False, seconds)

    def sleep(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """The same, and not even a cancel ends it: only the worker's end does, or ``until()``, looked at when woken."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopping:
                raise Stopping
            if until():
                return
            with self._changed:
                self._changed.wait(min(left, _LOOK_AGAIN))

    @property
    def nudges(self) -> int:
        """How often it was woken: grows when something may have changed."""
        return self._nudges

    def wake(self) -> None:
        """Make :meth:`wait` look at once."""
        with self._changed:
            self._nudges += 1
            self._changed.notify_all()

    def cancel(self, preempted: bool = False) -> None:
        """Ask it to leave. What is committed goes on, unless a delete preempts it."""
        self._cancelled = True
        self.preempted = self.preempted or preempted
        if not self.undoing and (not self.committed or self.preempted):
            self._interrupt()

    def stop(self) -> None:
        """Ask it to leave without an end: it goes on after the restart."""
        self._stopping = True
        self._interrupt()

    def _interrupt(self) -> None:
        with self._changed:
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[], None]) -> None:
        # In the thread of whoever cancels or stops, which has more to do than this one operation.
        try:
            callback()
        except Exception as exc:
            LOG.warning("operation %s: step %s could not be interrupted: %s", self.uuid, self.phase, exc)
