"""Commands that are done by accepting them: their operation is final at once."""

from __future__ import annotations

from collections.abc import Sequence

from compute_worker.errors import ComputeError
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Kind, Step
from compute_worker.operations.run import Run

EVENTS = {
    "external_instance_event": "external_event",
    "cancel_operation": "cancel",
    "disable_host": "host_disable",
    "enable_host": "host_enable",
    "finish_resize": "resize_finish",
    "take_back_instance": "resize_take_back",
    "forget_host": "host_forget",
    "live_migration_abort": "live_migration_abort",
    "live_migration_force_complete": "live_migration_force_complete",
}


def kind(name: str) -> Kind:
    """A kind that never runs."""

    def steps(run: Run) -> Sequence[Step]:
        return []

    def finish(tx: Tx, run: Run) -> None:
        """Nothing is left to write."""

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        """Nothing was written."""

    return Kind(
        name=name,
        steps=steps,
        finish=finish,
        abandon=abandon,
        limit="immediate",
        event=EVENTS[name],
        committed_at_accept=True,
        locks=False,
    )
