"""Telling that an operation which may not end keeps failing: it is tried for ever, but not in silence."""

from __future__ import annotations

import logging
import time

from compute_worker.errors import ComputeError, StoreBusy
from compute_worker.operations.database import Database
from compute_worker.operations.kinds import Kind
from compute_worker.operations.outbox import Outbox
from compute_worker.operations.run import Run
from compute_worker.states import OperationState

LOG = logging.getLogger(__name__)

TELL_AFTER = 5
"""Failures of one step, mere waiting not counted, before they are worth a notification."""
TELL_EVERY = 600.0
"""Seconds between two of them for one operation."""


class Stuck:
    """Sends ``instance.<event>.waiting`` for what is past its COMMIT, or undone, and cannot get on.

    How often it failed is not journalled: a restart counts anew, and may tell again.
    """

    def __init__(
        self, database: Database, outbox: Outbox, after: int = TELL_AFTER, every: float = TELL_EVERY
    ) -> None:
        self._database = database
        self._outbox = outbox
        self._after = after
        self._every = every

    def failed(self, run: Run, kind: Kind, phase: str, error: Exception, counted: int) -> None:
        """A step failed and is tried again; tell it when it is time. ``counted``: failures so far."""
        if counted < self._after or not (run.committed or run.undoing):
            return
        if run.told_waiting_at is not None and time.monotonic() - run.told_waiting_at < self._every:
            return
        self.tell(run, kind, phase, error)

    def tell(self, run: Run, kind: Kind, phase: str, error: Exception) -> None:
        """Write the notification now. A journal that cannot be written is left for the next time."""
        body = {
            "instance": run.instance,
            "kind": kind.name,
            "state": (OperationState.UNDOING if run.undoing else OperationState.RUNNING).value,
            "phase": phase,
            "error": as_compute_error(error, kind.name, phase).to_dict(),
        }
        event = f"instance.{kind.event}.waiting"
        try:
            self._database.write(
                lambda tx: self._outbox.add(tx, event, body, operation_row=run.id, priority="ERROR")
            )
        except StoreBusy as exc:
            LOG.warning("operation %s: that it cannot get on is not notified: %s", run.uuid, exc)
            return
        run.told_waiting_at = time.monotonic()
        self._outbox.ring()


def as_compute_error(exc: Exception, kind: str, phase: str) -> ComputeError:
    """``exc`` as callers may see it: of an unexpected one the name alone, its text may hold paths of this host."""
    if isinstance(exc, ComputeError):
        return exc
    return ComputeError(f"internal error in step {phase} of {kind}: {type(exc).__name__}")
