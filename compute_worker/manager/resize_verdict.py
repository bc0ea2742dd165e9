"""``confirm_resize`` and ``revert_resize``: one decision, the destination's, and what each host does about it.

Confirm: the destination's row is the decision; then the source drops what it set aside. Revert: the destination gives
the instance back the way the source gave it: set aside, handed over, and the source's COMMIT decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from compute_worker import errors
from compute_worker.claims import holder_of
from compute_worker.errors import ComputeError
from compute_worker.manager import peers
from compute_worker.manager.core import Core, as_step, begin, require_state, settle_record
from compute_worker.manager.peers import Question
from compute_worker.manager.resize_destination import METHOD, arriving, runs_again, surrender
from compute_worker.moves import Move, Side
from compute_worker.objects import Instance
from compute_worker.operations import journal
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Decided, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.states import MigrationStatus, PowerState, TaskState, VmState

CONFIRM, REVERT, BACK = "confirm_resize", "revert_resize", "finish_revert_resize"
_DECIDED = {
    CONFIRM: (MigrationStatus.CONFIRMING, MigrationStatus.CONFIRMED),
    REVERT: (MigrationStatus.REVERTING, MigrationStatus.REVERTED),
}


def decide(core: Core, tx: Tx, uuid: str, migration: str, method: str) -> bool:
    """The decision, in the row of the host that owns the instance. True when it was made before.

    :raises MigrationNotFinished: the other decision was first, or the move is not finished.
    :raises MigrationNotFound: this host is not the destination of it.
    """
    move = core.moves.find(tx, migration, Side.DESTINATION)
    if move is None:
        raise _not_found(core, tx, uuid, migration)
    if move.instance.uuid != uuid:
        raise errors.MigrationNotFound(migration=migration)
    if move.status in _DECIDED[method]:
        return True
    if move.status is not MigrationStatus.FINISHED:
        raise errors.MigrationNotFinished(migration=migration, status=move.status.value)
    instance = require_state(core.store, tx, uuid, method)
    core.moves.change(tx, migration, Side.DESTINATION, _DECIDED[method][0])
    begin(core.store, tx, instance, method)
    return False


def _not_found(core: Core, tx: Tx, uuid: str, migration: str) -> errors.MigrationNotFound:
    """In more words where the instance came by this move, which was lost with the journal."""
    here = core.store.find(tx, uuid)
    if here is None or here.host != core.host or here.migration != migration:
        return errors.MigrationNotFound(migration=migration)
    return errors.MigrationNotFound(
        f"host {core.host} has lost its journal: of migration {migration} of instance {uuid} it knows nothing until the"
        " source tells it, which it does within a minute: ask again then, or send it to the source now",
        migration=migration,
    )


# --- confirm --------------------------------------------------------------------------------------------------------


def confirm_kind(core: Core) -> Kind:
    """At the destination: the instance is an ordinary one again, and the source is told. Accepting is the decision."""

    def steps(run: Run) -> Sequence[Step]:
        move = core.moves.get(run.chain, Side.DESTINATION)
        if move.same_host:
            tell = Do("drop_copy", lambda r: core.driver.confirm_migration(move.instance, move.migration, r))
        else:
            tell = Do("tell_source", partial(_tell_source, core, move))
        return [
            Do("check_source", partial(_check_source, core, move)),
            Do("save_record", partial(_save_confirmed, core, move)),
            tell,
        ]

    return Kind(
        name=CONFIRM,
        steps=steps,
        finish=partial(_finish_confirm, core),
        abandon=lambda tx, run, error: None,
        limit="power",
        event="resize_confirm",
        committed_at_accept=True,
    )


def _check_source(core: Core, move: Move, run: Run) -> Result:
    """A source that took the instance back by force meanwhile has the newer copy: this one is set aside. Confirmed, it
    would be an ordinary instance, and nobody would ask before its next start."""
    reason = peers.superseded_by(core, core.store.get(move.instance.uuid), move)
    if reason is None:
        return None
    for part in core.driver.set_aside(arriving(move), move.migration):
        part.do(run)
    run.explain(f"{reason}: this copy is set aside")
    return {"superseded": reason}


def _superseded(run: Run) -> str | None:
    reason: str | None = run.results.get("check_source", {}).get("superseded")
    return reason


def _save_confirmed(core: Core, move: Move, run: Run) -> None:
    if _superseded(run) is None:
        core.driver.save_record(_confirmed(core, move))


def _confirmed(core: Core, move: Move) -> Instance:
    now = core.store.get(move.instance.uuid)
    return msgspec.structs.replace(now, vm_state=_after(now), migration=None, task_state=None)


def _after(instance: Instance) -> VmState:
    return VmState.ACTIVE if instance.power_state is PowerState.RUNNING else VmState.STOPPED


def _tell_source(core: Core, move: Move, run: Run) -> None:
    """Once: a source that is away asks when it is back, and drops its copy then."""
    if _superseded(run) is not None:
        return
    try:
        core.peers.confirm_resize(
            move.instance.uuid, move.migration.uuid, host=move.migration.source_host, operation=run.uuid
        )
    except errors.ComputeError as exc:
        run.explain(f"{exc}: the source will ask, and drop its copy then")


def _finish_confirm(core: Core, tx: Tx, run: Run) -> None:
    uuid, reason = run.instance or "", _superseded(run)
    if reason is not None:
        surrender(core, tx, core.moves.require(tx, run.chain, Side.DESTINATION), reason)
        return
    now = core.store.find(tx, uuid)
    if now is not None:
        settle_record(core.store, tx, uuid, vm_state=_after(now), migration=None)
    move = core.moves.change(tx, run.chain, Side.DESTINATION, MigrationStatus.CONFIRMED)
    if move is not None and move.same_host:
        core.claims.release(tx, holder_of(uuid, run.chain, Side.SOURCE))
        core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.CONFIRMED)


def admit_drop(core: Core, tx: Tx, uuid: str, migration: str) -> bool:
    """At the source: whether there is something to drop. True when it was dropped, or is being dropped.

    :raises MigrationNotFinished: it is not finished, or is being reverted.
    """
    move = core.moves.find(tx, migration, Side.SOURCE)
    if move is None:
        raise _not_found(core, tx, uuid, migration)
    if move.instance.uuid != uuid:
        raise errors.MigrationNotFound(migration=migration)
    if move.status in _DECIDED[CONFIRM]:
        return True
    if move.status is not MigrationStatus.FINISHED:
        raise errors.MigrationNotFinished(migration=migration, status=move.status.value)
    return False


def drop_kind(core: Core) -> Kind:
    """At the source: ask the destination to decide, and drop the copy only after its yes."""

    def ask_destination(run: Run) -> Result:
        move = core.moves.get(run.chain, Side.SOURCE)
        host = move.migration.dest_host
        _require_droppable(move)

        def ask() -> None:
            uuid = move.instance.uuid
            peers.asked(run, host, lambda: core.peers.confirm_resize(uuid, run.chain, host=host, operation=run.uuid))

        try:
            ask()
        except errors.MigrationNotFound:
            if peers.has_forgotten(core, move):
                run.explain(f"host {host} confirmed it long ago and has forgotten the move")
            else:
                # One that had lost its journal has just been told of it.
                ask()
        return {"decided": "confirm"}

    def drop(run: Run) -> None:
        move = core.moves.get(run.chain, Side.SOURCE)
        core.driver.confirm_migration(move.instance, move.migration, run)

    def record(tx: Tx, run: Run) -> None:
        _require_droppable(core.moves.require(tx, run.chain, Side.SOURCE))
        core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.CONFIRMING)

    def finish(tx: Tx, run: Run) -> None:
        core.claims.release(tx, holder_of(run.instance or "", run.chain, Side.SOURCE))
        core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.CONFIRMED)

    return Kind(
        name="drop_resize",
        steps=lambda run: [Do("ask_destination", ask_destination), Commit(record), Do("drop_copy", drop)],
        finish=finish,
        abandon=lambda tx, run, error: None,
        limit="power",
        event="resize_confirm",
    )


def _require_droppable(move: Move) -> None:
    """:raises MigrationNotFinished: it is being taken back, by force or by a revert: the copy is what comes back."""
    if move.status is not MigrationStatus.FINISHED and move.status not in _DECIDED[CONFIRM]:
        raise errors.MigrationNotFinished(migration=move.migration.uuid, status=move.status.value)


# --- revert ---------------------------------------------------------------------------------------------------------


def revert_kind(core: Core) -> Kind:
    """At the destination: give the instance back. Its COMMIT records the source's."""

    def steps(run: Run) -> Sequence[Step]:
        move = _there(core, run)
        aside = [as_step(part) for part in core.driver.set_aside(arriving(move), move.migration)]
        first = aside[0]
        aside[0] = Do(first.name, first.do, partial(_start_again, core, first))
        return [
            Do("ask_source", partial(_ask_source, core)),
            *aside,
            Do("hand_back", partial(_hand_back, core), partial(_await_no, core), cancellable=False),
            Do("await_outcome", partial(_await_outcome, core), cancellable=False),
            Commit(partial(_commit_revert, core), cancellable=False),
            Do("drop_copy", partial(_drop_copy, core)),
        ]

    return Kind(
        name=REVERT,
        steps=steps,
        finish=lambda tx, run: None,
        abandon=partial(_abandon_revert, core),
        limit="power",
        event="resize_revert",
    )


def _there(core: Core, run: Run) -> Move:
    return core.moves.get(run.chain, Side.DESTINATION)


def _ask_source(core: Core, run: Run) -> None:
    """:raises MigrationFailed: the source has nothing to bring back."""
    _await_start(core, run)
    move = _there(core, run)
    host = move.migration.source_host
    there = peers.asked(run, host, lambda: core.peers.get_migration(run.chain, Side.SOURCE.value, host=host))
    if not there.has_copy:
        reason = f"host {host} has no copy of instance {run.instance} set aside"
        raise errors.MigrationFailed(migration=run.chain, reason=reason)
    if there.migration.status is MigrationStatus.POST_MIGRATING:
        raise errors.PeerUnavailable(f"host {host} has not recorded yet that the move is finished", host=host)
    core.database.write(
        lambda tx: core.moves.change(tx, run.chain, Side.DESTINATION, journal_id=there.journal_id, refused=None)
    )


def _await_start(core: Core, run: Run) -> None:
    """The move is FINISHED before its guest runs, and its operation has left the instance's line."""

    def starting() -> bool:
        entries = core.database.read(lambda tx: journal.open_entries(tx, run.instance))
        return any(entry.kind == METHOD for entry in entries)

    while starting():
        run.waiting_for = "the guest to be started here"
        run.wait(lambda: not starting(), core.settings.compute.peer_ask_interval)
    run.waiting_for = None


def _start_again(core: Core, step: Step, run: Run) -> None:
    """The guest runs on here as it did."""
    step.undo(run)
    now = core.database.read(lambda tx: core.store.find(tx, run.instance or ""))
    if now is None or run.preempted or core.database.read(lambda tx: core.store.is_deleted(tx, now.uuid)):
        run.explain("it is being deleted: it is not started again")
    elif now.power_state is PowerState.RUNNING:
        core.driver.power_on(now, run)


def _hand_back(core: Core, run: Run) -> None:
    """From here on this host may not start the guest, until the source says no."""
    move = _there(core, run)
    if not _handed_back(move):
        run.check()

        def record(tx: Tx) -> None:
            core.moves.change(
                tx, run.chain, Side.DESTINATION, attempt_of_revert=move.attempt_of_revert + 1, handed_over=False
            )

        core.database.write(record)
        move = _there(core, run)
    run.step_aside()
    host = move.migration.source_host
    try:
        peers.reached(
            host,
            lambda: core.peers.finish_revert_resize(
                move.instance.uuid, run.chain, move.attempt_of_revert, host=host, operation=run.uuid
            ),
        )
    except errors.Refused as exc:
        run.explain(f"host {host} refused: {exc}")


def _handed_back(move: Move) -> bool:
    # ``handed_over`` was set when the source handed over to this host; this host's own hand-over clears it.
    return not move.handed_over


def _question(move: Move, run: Run) -> Question:
    return Question(move.migration.source_host, BACK, move.instance.uuid, run.uuid, max(1, move.attempt_of_revert))


def _await_outcome(core: Core, run: Run) -> Result:
    """:raises ComputeError: the source said no, with its reason."""
    move = _there(core, run)
    if move.refused is not None:
        raise errors.MigrationFailed(migration=run.chain, reason=move.refused)
    committed, answer, why = peers.await_verdict(
        core, run, _question(move, run), lambda: _there(core, run), journal_id=move.journal_id
    )
    if committed:
        return {"outcome": "committed"}
    _record_no(core, run, why)
    if answer.error:
        raise errors.from_dict(answer.error)
    raise errors.MigrationFailed(migration=run.chain, reason=why)


def _record_no(core: Core, run: Run, why: str) -> None:
    core.database.write(lambda tx: core.moves.change(tx, run.chain, Side.DESTINATION, refused=why))


def _await_no(core: Core, run: Run) -> None:
    move = _there(core, run)
    if not _handed_back(move) or move.refused is not None:
        return
    committed, _, why = peers.await_verdict(
        core, run, _question(move, run), lambda: _there(core, run), journal_id=move.journal_id
    )
    if committed:
        raise Decided(f"host {move.migration.source_host} has it: {why}")
    _record_no(core, run, why)


def _commit_revert(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.DESTINATION)
    uuid = move.instance.uuid
    if not move.same_host and not core.store.is_deleted(tx, uuid):
        core.claims.release(tx, uuid)
        core.store.depart(tx, uuid, move.migration.source_host)
    core.moves.change(tx, run.chain, Side.DESTINATION, MigrationStatus.REVERTED)


def _drop_copy(core: Core, run: Run) -> None:
    move = _there(core, run)
    core.driver.confirm_migration(arriving(move), move.migration, run)


def _abandon_revert(core: Core, tx: Tx, run: Run, error: ComputeError) -> None:
    if run.committed or run.preempted:
        return
    core.moves.change(tx, run.chain, Side.DESTINATION, MigrationStatus.FINISHED, handed_over=True, refused=None)
    settle_record(core.store, tx, run.instance or "", vm_state=VmState.RESIZED, fault=error.message)


def admit_back(core: Core, tx: Tx, uuid: str, migration: str) -> bool:
    """At the source: take the instance back.

    :raises MigrationNotFinished: it is confirmed already, or never got to the end.
    :raises InstanceDeleted: a delete came first.
    """
    move = core.moves.require(tx, migration, Side.SOURCE)
    core.store.forbid_deleted(tx, uuid)
    if move.instance.uuid != uuid:
        raise errors.MigrationNotFound(migration=migration)
    if move.status is not MigrationStatus.FINISHED:
        raise errors.MigrationNotFinished(migration=migration, status=move.status.value)
    core.moves.change(tx, migration, Side.SOURCE, MigrationStatus.REVERTING)
    return False


def back_kind(core: Core) -> Kind:
    """At the source: bring the copy back. COMMIT is after the guest was started paused and before it runs."""

    def steps(run: Run) -> Sequence[Step]:
        move = core.moves.get(run.chain, Side.SOURCE)
        instance = _returning(move)
        return [
            *(as_step(part) for part in core.driver.finish_revert_migration(instance, move.migration)),
            Commit(partial(_commit_back, core)),
            Do("resume_guest", partial(_resume_guest, core)),
            Do("save_record", lambda r: core.driver.save_record(msgspec.structs.replace(instance, migration=None))),
            Do("tell_destination", lambda r: peers.nudge(core, move.migration.dest_host, instance.uuid)),
        ]

    return Kind(
        name=BACK,
        steps=steps,
        finish=partial(_finish_back, core),
        abandon=partial(_abandon_back, core),
        limit="inbound",
        event="resize_revert_finish",
        takes_over=True,
    )


def _returning(move: Move) -> Instance:
    """The record as it was before the move, with the move it is under."""
    return msgspec.structs.replace(
        move.instance, migration=move.migration.uuid, task_state=TaskState.RESIZE_REVERTING, fault=None
    )


def _commit_back(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.SOURCE)
    uuid = move.instance.uuid
    core.store.forbid_deleted(tx, uuid)
    core.claims.hand_on(tx, holder_of(uuid, run.chain, Side.SOURCE), uuid)
    generation = move.instance.generation + (1 if move.forced else 0)
    core.store.arrive(tx, msgspec.structs.replace(_returning(move), generation=generation))
    core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.REVERTED)


def _resume_guest(core: Core, run: Run) -> None:
    move = core.moves.get(run.chain, Side.SOURCE)
    if runs_again(move):
        core.driver.power_on(_returning(move), run)
    else:
        run.explain("it was off before: it stays off")


def _finish_back(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.SOURCE)
    runs = runs_again(move)
    settle_record(
        core.store,
        tx,
        run.instance or "",
        vm_state=VmState.ACTIVE if runs else move.instance.vm_state,
        power_state=PowerState.RUNNING if runs else PowerState.SHUTDOWN,
        migration=None,
    )


def _abandon_back(core: Core, tx: Tx, run: Run, error: ComputeError) -> None:
    if not run.committed:
        core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.FINISHED, forced=False)
