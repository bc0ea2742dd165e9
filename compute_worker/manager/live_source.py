"""``live_migration`` at the source: check, prepare, fly, and live with what the destination's hypervisor decides.

The guest is the destination's as soon as its hypervisor runs it; that host's worker records it. Whatever the flight's
own end says here, the source asks before it lets its copy run on or destroys it (``protocol.md`` 3).
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from compute_worker import errors, liveprogress, logcontext, objects
from compute_worker.errors import ComputeError
from compute_worker.manager import peers
from compute_worker.manager.core import Core, begin, require_state, settle_record
from compute_worker.manager.peers import Question, Verdict
from compute_worker.moves import LANDED, Move, Side
from compute_worker.objects import Instance, MigrateData
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Decided, Do, Kind, Result, Step
from compute_worker.operations.run import Run, Stopping
from compute_worker.states import MigrationStatus, PowerState, VmState
from compute_worker.virt.driver import GuestInfo

LOG = logging.getLogger(__name__)
T = TypeVar("T")
METHOD = "live_migration"
_SUSPICIOUS = 1.0
"""Seconds that a guest may stand still for a migration before the destination is asked whether it runs it."""
_LOOK = 0.25


def admit(core: Core, tx: Tx, move: Move) -> bool:
    """Check and write what accepting makes true.

    :raises InvalidState: the guest does not run.
    :raises InstanceBusy: another move of it is not over.
    """
    wanted = move.migration.instance
    core.store.forbid_deleted(tx, wanted)
    for known in core.moves.of(tx, wanted):
        raise errors.InstanceBusy(instance=wanted, operation=known.operation, kind=METHOD, phase=known.status.value)
    instance = require_state(core.store, tx, wanted, METHOD)
    core.moves.put(tx, msgspec.structs.replace(move, instance=instance))
    begin(core.store, tx, instance, METHOD)
    core.store.change(tx, wanted, migration=move.migration.uuid)
    return False


def kind(core: Core) -> Kind:
    """How the source's side runs. Its COMMIT records that the destination runs the guest, so no cancel ends it."""

    def steps(run: Run) -> Sequence[Step]:
        return [
            Do("check_destination", partial(_check_destination, core)),
            Do("pre_live_migration", partial(_prepare, core), partial(_unprepare, core)),
            Do("live_migration", partial(_fly, core), partial(_roll_back, core), cancellable=False),
            Do("await_outcome", partial(_await_outcome, core), cancellable=False),
            Commit(partial(_commit, core), cancellable=False),
            Do("post_live_migration", partial(_clean_up, core), cancellable=False),
            Do("tell_destination", partial(_tell_destination, core)),
        ]

    return Kind(
        name=METHOD,
        steps=steps,
        finish=lambda tx, run: None,
        abandon=partial(_abandon, core),
        limit="outbound",
        event="live_migration",
    )


def _move(core: Core, run: Run) -> Move:
    return core.moves.get(run.chain, Side.SOURCE)


def leaving(move: Move) -> Instance:
    """The record as it was, with the move it is under."""
    return msgspec.structs.replace(move.instance, migration=move.migration.uuid)


def _change(core: Core, run: Run, status: MigrationStatus | None = None, **changes: object) -> None:
    core.database.write(lambda tx: core.moves.change(tx, run.chain, Side.SOURCE, status, **changes))


def _question(move: Move, run: Run) -> Question:
    return Question(
        move.migration.dest_host, "pre_live_migration", move.instance.uuid, run.uuid, move.migration.attempt
    )


# --- before the flight ----------------------------------------------------------------------------------------------


def _asked(run: Run, call: Callable[[], T]) -> T:
    """``call()``. While the destination is silent nothing leaves this host: other migrations get the slot."""
    try:
        return call()
    except errors.PeerUnavailable:
        run.yield_slot()
        raise


def _check_destination(core: Core, run: Run) -> Result:
    move = _move(core, run)
    if move.migrate_data is not None:
        return {"checked": "by the caller"}
    run.report("check_destination", status=MigrationStatus.PREPARING.value)
    host = move.migration.dest_host
    data = _asked(
        run,
        lambda: core.peers.check_can_live_migrate_destination(
            leaving(move), move.migration, move.disk_over_commit, host=host
        ),
    )
    _change(core, run, MigrationStatus.PREPARING, migrate_data=data)
    return {"block_migration": data.block_migration}


def _prepare(core: Core, run: Run) -> Result:
    """The destination prepares; asked again it goes on with what it had begun (``protocol.md`` 11)."""
    run.claim_slot()
    move = _move(core, run)
    assert move.migrate_data is not None
    run.report("pre_live_migration", status=MigrationStatus.PREPARING.value)
    disk_info = core.driver.get_instance_disk_info(leaving(move))
    host = move.migration.dest_host
    try:
        data = _asked(
            run,
            lambda: core.peers.pre_live_migration(
                leaving(move),
                move.migration,
                move.migrate_data or _no_data(move),
                disk_info,
                core.database.journal_id,
                operation=run.uuid,
                host=host,
            ),
        )
    except errors.InstanceDeleted:
        _delete_here(core, run)
        raise
    _change(core, run, MigrationStatus.RUNNING, migrate_data=data)
    return {"migrate_data": objects.encode(data)}


def _delete_here(core: Core, run: Run) -> None:
    """A delete that the destination was sent before it had heard of the instance wins here too."""
    run.explain(f"host {_move(core, run).other} was told to delete it: it is deleted here")
    operation = str(uuid.uuid5(uuid.UUID(run.chain), "delete"))
    core.peers.terminate_instance(run.instance or "", host=core.host, operation=operation)


def _unprepare(core: Core, run: Run) -> None:
    """Best effort: the destination asks what became of this operation, and cleans up then."""
    try:
        peers.ask(core, _question(_move(core, run), run), revoke=True)
    except errors.ComputeError as exc:
        run.explain(f"{exc}: it will ask")


# --- the flight -----------------------------------------------------------------------------------------------------


def _fly(core: Core, run: Run) -> Result:
    """Until the hypervisor says that the flight is over, whichever way. Done again after a death it joins a flight that
    is in the air."""
    move = _move(core, run)
    if move.landed:
        return {"landed": move.landed}
    run.claim_slot()
    if not move.handed_over:
        run.check()
        _change(core, run, handed_over=True)
    ended: list[Exception | None] = []
    thread = threading.Thread(target=_flight, args=(core, run, move, ended), name="flight", daemon=True)
    thread.start()
    _watch(core, run, lambda: bool(ended) or not thread.is_alive())
    if not ended:
        raise Stopping
    said = ended[0]
    if isinstance(said, errors.Retryable) and not run.cancel_requested:
        raise said
    if said is not None and _postcopy_failed(core, move):
        raise errors.HypervisorUnavailable(
            reason=f"the post-copy of instance {run.instance} was interrupted ({said}): both copies are paused, and no"
            f" memory is lost while both hosts are up; it goes on when they reach each other"
        )
    landed = LANDED if said is None else f"{type(said).__name__}: {said}"
    _change(core, run, landed=landed)
    measured = _measured(run)
    if said is None and "downtime" in measured:
        core.downtimes.add(float(measured["downtime"]))
    return {"landed": landed, **measured}


def _measured(run: Run) -> dict[str, float | int | str]:
    now = run.progress
    return liveprogress.figures(now.detail) if now is not None and now.phase == liveprogress.PHASE else {}


def _postcopy_failed(core: Core, move: Move) -> bool:
    info = _info(core, move.instance.uuid)
    return info is not None and info.power_state is PowerState.PAUSED and "post" in info.reason


def _flight(core: Core, run: Run, move: Move, ended: list[Exception | None]) -> None:
    try:
        with logcontext.bound(request_id=run.request_id, operation=run.uuid, instance=run.instance):
            core.driver.live_migration(leaving(move), move.migration, move.migrate_data or _no_data(move), run)
    except Exception as exc:
        ended.append(exc)
    except BaseException as exc:
        LOG.debug("operation %s: the flight is left alone: %r", run.uuid, exc)
    else:
        ended.append(None)
    run.wake()


def _no_data(move: Move) -> MigrateData:
    return MigrateData(migration=move.migration.uuid)


def _watch(core: Core, run: Run, over: Callable[[], bool]) -> None:
    """While it flies: do what an operator forces, and see that a guest that stands still is not running over there."""
    still_since: float | None = None
    forced, suspicious = "", min(_SUSPICIOUS, core.settings.compute.peer_ask_interval * 5)
    while not over():
        seen = run.nudges
        run.sleep(_LOOK, until=lambda s=seen: run.nudges != s or over())  # type: ignore[misc]
        move = _move(core, run)
        _record_postcopy(core, run, move)
        if move.force and move.force != forced and _force(core, run, move):
            forced = move.force
        try:
            still = _stands_still(core, move)
            if not still and still_since is not None:
                # Its hypervisor has let it run on. The flight's end is told later, and two copies may run meanwhile.
                _hold(core, run, move)
        except errors.Retryable:
            continue
        still_since = (still_since or time.monotonic()) if still else None
        if still_since is not None and time.monotonic() - still_since > suspicious:
            _end_if_it_runs_there(core, run, move)


def _record_postcopy(core: Core, run: Run, move: Move) -> None:
    status = MigrationStatus.RUNNING_POSTCOPY
    told = run.progress.detail.get("status") if run.progress is not None else None
    if told == status.value and move.status is not status:
        _change(core, run, status)


def _force(core: Core, run: Run, move: Move) -> bool:
    """Whether nothing more is to be tried: it is done, or cannot be done. A flight that has not taken off yet, or a
    hypervisor that is busy, is tried again."""
    try:
        core.driver.live_migration_force_complete(move.instance, move.force == "postcopy")
    except (errors.InvalidState, errors.Retryable) as exc:
        LOG.debug("operation %s: the migration is not forced yet: %s", run.uuid, exc)
        return False
    except errors.ComputeError as exc:
        run.explain(f"it cannot be forced by {move.force}: {exc}")
        _change(core, run, force="")
        return True
    run.explain(f"forced by {move.force}, as somebody asked for")
    return True


def _info(core: Core, instance: str) -> GuestInfo | None:
    """The guest here, or ``None``."""
    try:
        return core.driver.get_info(instance)
    except errors.InstanceNotFound:
        return None


def _stands_still(core: Core, move: Move) -> bool:
    """:raises Retryable: that cannot be said now."""
    if move.instance.vm_state is VmState.PAUSED or move.held:
        return False
    info = _info(core, move.instance.uuid)
    # In a post-copy it has to: its memory is still being fetched from here.
    in_postcopy = info is not None and "post" in info.reason
    return info is not None and info.power_state is PowerState.PAUSED and info.migrating and not in_postcopy


def _end_if_it_runs_there(core: Core, run: Run, move: Move) -> None:
    """The finish reply may be lost: then this hypervisor would let its copy run on."""
    try:
        answer = peers.ask(core, _question(move, run), quick=True)
    except errors.PeerUnavailable:
        return
    if peers.decide(answer, move.journal_id, one_directory=True)[0] is Verdict.YES:
        LOG.warning("instance %s: it runs on host %s: the copy here is ended", run.instance, move.other)
        try:
            core.driver.post_live_migration(leaving(move), move.migration, move.migrate_data or _no_data(move))
        except errors.ComputeError as exc:
            LOG.warning("instance %s: the copy here cannot be ended yet: %s", run.instance, exc)


# --- the verdict ----------------------------------------------------------------------------------------------------


def _await_outcome(core: Core, run: Run) -> Result:
    """:raises ComputeError: the destination does not have it and never will."""
    move = _move(core, run)
    if move.refused is None:
        committed, why = _ask(core, run)
        if committed:
            return {"outcome": "committed"}
        _change(core, run, refused=why)
    failed = _move(core, run).landed
    run.check()
    raise errors.MigrationFailed(migration=run.chain, reason=failed or move.refused or "the destination refused")


def _ask(core: Core, run: Run) -> tuple[bool, str]:
    """Ask until the destination has decided. A copy that the hypervisor let run on here is held until it has: an answer
    that does not come takes seconds."""
    run.step_aside()
    interval = core.settings.compute.peer_ask_interval
    again = min(_LOOK, interval)
    while True:
        move, seen = _move(core, run), run.nudges
        if move.forced:
            return False, "an operator said that the other host is off and stays off"
        failed = not move.landed_well
        _hold(core, run, move)
        try:
            revoke = failed or run.cancel_requested
            answer = peers.ask(core, _question(move, run), revoke, quick=True)
        except errors.PeerUnavailable as exc:
            run.waiting_for = str(exc)
        else:
            # What is only being undone there may still be running there.
            verdict, why = peers.decide(answer, move.journal_id, one_directory=True)
            if verdict is not Verdict.WAIT:
                run.waiting_for = None
                return verdict is Verdict.YES, why
            run.waiting_for = f"host {move.other}: {why}"
        run.sleep(again, until=lambda s=seen: run.nudges != s)  # type: ignore[misc]
        again = min(again * 1.5, interval)


def in_doubt(info: GuestInfo | None, landed: str) -> bool:
    """Whether a copy runs here that its hypervisor had stopped for the switch-over: it may run there too."""
    return (
        info is not None
        and info.power_state is PowerState.RUNNING
        and landed != LANDED
        and "migration" in info.reason
    )


def _hold(core: Core, run: Run, move: Move) -> None:
    """On record first: whoever dies meanwhile, it runs again after a no."""
    if in_doubt(_info(core, move.instance.uuid), move.landed):
        _change(core, run, held=True)
        try:
            core.driver.pause(move.instance)
        except errors.ComputeError as exc:
            run.explain(f"host {move.other} may run the guest, and the copy here cannot be paused: {exc}")
            return
        run.explain(f"host {move.other} may run the guest: the copy here is paused until that host answers")


def _roll_back(core: Core, run: Run) -> None:
    """The guest runs on here as it did. Only after the destination's no."""
    move = _move(core, run)
    if not move.handed_over:
        return
    if move.refused is None:
        committed, why = _ask(core, run)
        if committed:
            raise Decided(f"host {move.other} has it: {why}")
        _change(core, run, refused=why)
    core.driver.rollback_live_migration_at_source(leaving(move), move.migration)
    if _move(core, run).held and not run.preempted:
        core.driver.unpause(move.instance)


def _commit(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.SOURCE)
    left = move.instance.uuid
    if not core.store.is_deleted(tx, left):
        core.claims.release(tx, left)
        core.store.depart(tx, left, move.migration.dest_host)
    core.moves.change(tx, run.chain, Side.SOURCE, MigrationStatus.COMPLETED)


def _tell_destination(core: Core, run: Run) -> Result:
    """The operation's result is what was measured of the flight."""
    peers.nudge(core, _move(core, run).migration.dest_host, run.instance or "")
    return {name: value for name, value in run.results["live_migration"].items() if name != "landed"}


def _clean_up(core: Core, run: Run) -> None:
    move = _move(core, run)
    info = _info(core, move.instance.uuid)
    if info is not None and info.power_state is PowerState.RUNNING:
        # Its hypervisor let it run on between two looks; the destination's copy is the guest.
        core.driver.pause(move.instance)
    core.driver.post_live_migration(leaving(move), move.migration, move.migrate_data or _no_data(move))


def _abandon(core: Core, tx: Tx, run: Run, error: ComputeError) -> None:
    if run.committed:
        return
    status = MigrationStatus.CANCELLED if isinstance(error, errors.Cancelled) else MigrationStatus.FAILED
    move = core.moves.change(tx, run.chain, Side.SOURCE, status, refused=error.message)
    if run.preempted or move is None or core.store.is_deleted(tx, move.instance.uuid):
        return
    before = move.instance
    settle_record(
        core.store,
        tx,
        before.uuid,
        migration=None,
        generation=before.generation + (1 if move.forced else 0),
        fault=error.message,
    )
