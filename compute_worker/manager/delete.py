"""``terminate_instance``: it wins over everything that runs on the instance, and is tried until it is done."""

from __future__ import annotations

from collections.abc import Sequence

from compute_worker.errors import ComputeError
from compute_worker.manager.core import Core, as_step, begin
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Kind, Step
from compute_worker.operations.run import Run


def admit(core: Core, tx: Tx, uuid: str) -> bool:
    """Tombstone the uuid. True when this host has nothing of it."""
    core.store.bury(tx, uuid)
    instance = core.store.find(tx, uuid)
    if instance is None:
        return True
    begin(core.store, tx, instance, "terminate_instance")
    return False


def kind(core: Core) -> Kind:
    """How a delete runs: only forward. What it preempted may have removed the instance already."""

    def steps(run: Run) -> Sequence[Step]:
        uuid = run.instance or ""
        instance = core.database.read(lambda tx: core.store.find(tx, uuid))
        if instance is None:
            return []
        return [as_step(part) for part in core.driver.destroy(instance)]

    def finish(tx: Tx, run: Run) -> None:
        assert run.instance is not None
        core.store.remove(tx, run.instance)
        core.claims.release(tx, run.instance)

    def abandon(tx: Tx, run: Run, error: ComputeError) -> None:
        raise AssertionError("a delete is never abandoned") from error

    return Kind(
        name="terminate_instance",
        steps=steps,
        finish=finish,
        abandon=abandon,
        limit="delete",
        event="delete",
        committed_at_accept=True,
        preempts=True,
    )
