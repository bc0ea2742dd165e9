"""``resize_instance`` at the source: power off, set aside, send, hand over, and live with what the destination decides.

From HANDED_OVER until the destination's answer the source still owns the instance and may not start it. A no brings
the guest back as it was; the set-aside copy stays until the move is confirmed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from compute_worker import errors, objects
from compute_worker.claims import holder_of
from compute_worker.errors import ComputeError
from compute_worker.manager import peers
from compute_worker.manager.core import Core, as_step, begin, require_state
from compute_worker.manager.peers import Question
from compute_worker.manager.resize_destination import runs_again
from compute_worker.moves import Move, Side
from compute_worker.objects import DiskInfo, Instance
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Decided, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.states import MigrationStatus

METHOD = "resize_instance"


def admit(core: Core, tx: Tx, move: Move, machine_arch: str) -> bool:
    """Check and write what accepting makes true: the task and this side of the move, with the record as it is.

    :raises InvalidState: not in this state.
    :raises InstanceBusy: an earlier attempt is not over.
    :raises OperationRefusedBefore: a later attempt has begun, or an earlier one has moved it.
    """
    uuid, migration = move.migration.instance, move.migration
    core.store.forbid_deleted(tx, uuid)
    known = core.moves.find(tx, migration.uuid, Side.SOURCE)
    if known is not None and known.migration.attempt >= migration.attempt:
        raise errors.OperationRefusedBefore(operation=move.operation, outcome="overtaken by a later attempt")
    if known is not None and not known.closed:
        raise errors.InstanceBusy(instance=uuid, operation=known.operation, kind=METHOD, phase=known.status.value)
    if known is not None and known.status is not MigrationStatus.ERROR:
        # A host that was passed over asks late: nobody wants the instance moved once more.
        outcome = f"attempt {known.migration.attempt} came to its end: {known.status}"
        raise errors.OperationRefusedBefore(operation=move.operation, outcome=outcome)
    instance = require_state(core.store, tx, uuid, METHOD)
    found = core.claims.found
    if machine_arch and found is not None and found.machine_arch and machine_arch != found.machine_arch:
        problem = f"host {migration.dest_host} is {machine_arch}, instance {uuid} runs on {found.machine_arch}"
        raise errors.InvalidCommand(method=METHOD, problem=problem)
    core.moves.put(tx, msgspec.structs.replace(move, instance=instance))
    begin(core.store, tx, instance, METHOD)
    core.store.change(tx, uuid, migration=migration.uuid)
    return False


def kind(core: Core) -> Kind:
    """How the source's side runs. Its COMMIT records the destination's, so no cancel ends it."""

    def steps(run: Run) -> Sequence[Step]:
        move = _move(core, run)
        options = core.settings.compute
        timeout = options.shutdown_timeout if move.clean_shutdown else 0.0
        patience = peers.Patience(move.migration.dest_host, options.peer_patience)
        parts = core.driver.migrate_disk_and_power_off(
            leaving(move), move.migration, timeout, options.shutdown_retry_interval, peers.peer_of(core, move, patience)
        )
        sending = [as_step(part) for part in parts]
        for index, step in enumerate(sending):
            if step.name == "power_off":
                sending[index] = Do("power_off", step.do, partial(_start_again, core, step.undo))
        return [
            *map(patience.step, sending),
            Do("hand_over", partial(_hand_over, core), partial(_take_back, core), cancellable=False),
            Do("await_outcome", partial(_await_outcome, core), cancellable=False),
            Commit(partial(_commit, core), cancellable=False),
        ]

    return Kind(
        name=METHOD,
        steps=steps,
        finish=lambda tx, run: None,
        abandon=partial(_abandon, core),
        limit="outbound",
        event="resize",
    )


def _move(core: Core, run: Run) -> Move:
    return core.moves.get(run.chain, Side.SOURCE)


def leaving(move: Move) -> Instance:
    """The record as it was, with the move it is under."""
    return msgspec.structs.replace(move.instance, migration=move.migration.uuid)


def _start_again(core: Core, undo: Callable[[Run], None], run: Run) -> None:
    """The guest runs as it did, unless somebody wants it deleted."""
    undo(run)
    move = _move(core, run)
    deleted = core.database.read(lambda tx: core.store.is_deleted(tx, move.instance.uuid))
    if deleted or run.preempted:
        run.explain("it is being deleted: it is not started again")
    elif runs_again(move):
        core.driver.power_on(move.instance, run)


def _hand_over(core: Core, run: Run) -> None:
    """HANDED_OVER is on disk here before the destination hears of it."""
    move = _move(core, run)
    if not move.handed_over:
        run.check()
        info: DiskInfo = objects.decode(_told(run)["disk_info"], DiskInfo, "journal")

        def record(tx: Tx) -> None:
            core.moves.change(
                tx, run.chain, Side.SOURCE, MigrationStatus.POST_MIGRATING, handed_over=True, disk_info=info
            )

        core.database.write(record)
        move = _move(core, run)
    run.step_aside()
    if move.forced:
        return
    host = move.migration.dest_host
    try:
        peers.reached(
            host,
            lambda: core.peers.finish_resize(
                leaving(move), move.migration, move.disk_info or DiskInfo(), host=host, operation=run.uuid
            ),
        )
    except errors.Refused as exc:
        # It would wait for this hand-over as this host waits for its answer: neither ever ends by itself.
        peers.ask(core, _question(move, run), revoke=True)
        run.explain(f"host {host} refused: {exc}")


def _told(run: Run) -> Mapping[str, Any]:
    """What the driver's last part told."""
    return next((told for told in reversed(list(run.results.values())) if "disk_info" in told), {})


def _question(move: Move, run: Run) -> Question:
    return Question(
        move.migration.dest_host, "prep_resize", move.instance.uuid, run.uuid, move.migration.attempt
    )


def _await_outcome(core: Core, run: Run) -> Result:
    """:raises ComputeError: the destination said no, with its reason; or an operator says that it is off."""
    move = _move(core, run)
    if move.refused is None:
        committed, answer, why = peers.await_verdict(
            core, run, _question(move, run), lambda: _move(core, run), journal_id=move.journal_id
        )
        if committed:
            return {"outcome": "committed"}
        _record_no(core, run, why)
        if answer.error:
            raise errors.from_dict(answer.error)
        raise errors.MigrationFailed(migration=run.chain, reason=why)
    raise errors.MigrationFailed(migration=run.chain, reason=move.refused)


def _record_no(core: Core, run: Run, why: str) -> None:
    core.database.write(lambda tx: core.moves.change(tx, run.chain, Side.SOURCE, refused=why))


def _take_back(core: Core, run: Run) -> None:
    """Nothing is taken back before the destination has said no, whatever failed here."""
    move = _move(core, run)
    if not move.handed_over or move.refused is not None:
        return
    committed, _, why = peers.await_verdict(
        core, run, _question(move, run), lambda: _move(core, run), journal_id=move.journal_id
    )
    if committed:
        raise Decided(f"host {move.migration.dest_host} has it: {why}")
    _record_no(core, run, why)


def _commit(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.SOURCE)
    uuid = move.instance.uuid
    if core.store.is_deleted(tx, uuid):
        return
    if not move.same_host:
        core.claims.hand_on(tx, uuid, holder_of(uuid, run.chain, Side.SOURCE))
        core.store.depart(tx, uuid, move.migration.dest_host)
    if move.status is MigrationStatus.POST_MIGRATING:
        # In place it may be confirmed by now. A force that came too late forces nothing.
        core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.FINISHED, forced=False)


def _abandon(core: Core, tx: Tx, run: Run, error: ComputeError) -> None:
    if run.committed:
        return
    move = core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.ERROR, refused=error.message)
    if run.preempted or move is None or core.store.is_deleted(tx, move.instance.uuid):
        return
    before = move.instance
    generation = before.generation + 1 if move.forced else before.generation
    core.store.change(
        tx,
        before.uuid,
        vm_state=before.vm_state,
        power_state=before.power_state,
        task_state=None,
        migration=None,
        generation=generation,
        fault=error.message,
    )
