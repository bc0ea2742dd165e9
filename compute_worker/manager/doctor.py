"""``list_leftovers`` and ``repair_leftovers``: what a host has that belongs to nobody, removed where that is safe.

A repair is an operation that holds the instance: no build or move of the same uuid begins meanwhile, and what it is
about to remove is judged again by its own step, not by what a list said before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from compute_worker import errors
from compute_worker.errors import ComputeError
from compute_worker.manager import delete, leftovers
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.manager.lifecycle import Expiry
from compute_worker.messages import Context, command, query
from compute_worker.objects import Accepted, Finding, Uuid
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.operations.service import Operations

METHOD = "repair_leftovers"


class DoctorEndpoint:
    """What an operator asks of a host that something went wrong with."""

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations

    @query
    def list_leftovers(self, context: Context) -> list[Finding]:
        """What is left over on this host, what waits, and what would be done about each. Asks the owners of what
        others own, 2 s each at most.

        :raises HypervisorUnavailable: it does not answer.
        """
        core, now = self._core, time.time()
        examiner = leftovers.Examiner(core)
        found = examiner.findings(examiner.leftovers())
        found += [leftovers.of_lock(name) for name in core.driver.stale_image_locks()]
        waiting = (leftovers.of_operation(o) for o in self._operations.list(None, None, True))
        found += [finding for finding in waiting if finding is not None]
        return found + [leftovers.of_move(move, now) for move in core.moves.list()]

    @command
    def repair_leftovers(
        self,
        context: Context,
        instance: Uuid | None = None,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Remove everything that is left over of one instance, or without one the host's stale image locks.

        :raises InvalidState: the instance is this host's, or has an open move here.
        :raises InstanceBusy: an operation is at it.
        """
        core = self._core

        def admit(tx: Tx) -> bool:
            if instance is not None:
                require_stranger(core, tx, instance)
            return False

        wish = Wish(operation, expires_at, check_only)
        return accept(self._operations, context, METHOD, wish, admit, instance=instance)


def require_stranger(core: Core, tx: Tx, uuid: str) -> None:
    """:raises InvalidState: nothing of it is left over: it is this host's, or moves."""
    if core.store.find(tx, uuid) is not None:
        raise errors.InvalidState(f"instance {uuid} is host {core.host}'s: nothing of it is left over", instance=uuid)
    moves = core.moves.of(tx, uuid)
    if moves:
        words = leftovers.words_of_move(moves[0], time.time())
        raise errors.InvalidState(f"instance {uuid}: {words}: nothing of it is left over", instance=uuid)


def kind(core: Core) -> Kind:
    """How a repair runs. COMMIT is after the owner was asked; then the driver's parts of a delete, only forward."""

    def steps(run: Run) -> Sequence[Step]:
        if run.instance is None:
            return [Commit(lambda tx, r: None), Do("drop_locks", partial(_drop_locks, core))]
        parts = core.driver.destroy(delete.nameless(run.instance))
        return [
            Do("ask_owner", partial(_ask_owner, core)),
            Commit(partial(_commit, core)),
            *(Do(part.name, part.do) for part in parts),
        ]

    def nothing(tx: Tx, run: Run, error: ComputeError | None = None) -> None:
        """Nothing was written: the instance is not this host's."""

    return Kind(name=METHOD, steps=steps, finish=nothing, abandon=nothing, limit="delete", event="leftovers_repair")


def _drop_locks(core: Core, run: Run) -> Result:
    return {"locks": core.driver.stale_image_locks(remove=True)}


def _ask_owner(core: Core, run: Run) -> None:
    """:raises InvalidState: it is not safe, with the reason."""
    uuid = run.instance or ""
    judged = leftovers.judge(leftovers.Examiner(core).facts(uuid, chain=run.chain))
    if not judged.safe:
        raise errors.InvalidState(f"what is left of instance {uuid} stays: {judged.reason}", instance=uuid)
    run.explain(f"{judged.reason}: {judged.remedy}")


def _commit(core: Core, tx: Tx, run: Run) -> None:
    require_stranger(core, tx, run.instance or "")
