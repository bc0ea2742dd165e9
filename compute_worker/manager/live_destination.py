"""``pre_live_migration`` at the destination: claim, prepare, and own the guest as soon as the hypervisor runs it here.

One operation from the claim to the guest's persistent definition. It is not undone while the guest may still arrive:
what was prepared goes only when the source's flight is over and this hypervisor does not run the guest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from compute_worker import errors, objects
from compute_worker.claims import holder_of
from compute_worker.errors import ComputeError
from compute_worker.manager import peers
from compute_worker.manager.core import Core, as_step, settle_record
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.manager.peers import Question
from compute_worker.moves import Move, Side
from compute_worker.objects import DiskInfo, Instance, MigrateData, OperationAnswer
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.states import MigrationStatus, PowerState, TaskState
from compute_worker.virt.driver import GuestInfo

METHOD = "pre_live_migration"
_OFF = (PowerState.NOSTATE, PowerState.SHUTDOWN, PowerState.CRASHED)
_LANDED = "await_outcome"
"""The source's step in which no flight is in the air any more, and none begins."""


def admit(core: Core, switch: HostSwitch, tx: Tx, move: Move) -> bool:
    """Check and write what accepting makes true: the claim and this side of the move.

    :raises Refused: a delete came first, it is here already, it does not fit.
    """
    uuid, migration = move.instance.uuid, move.migration.uuid
    core.store.forbid_deleted(tx, uuid)
    for known in core.moves.of(tx, uuid):
        raise errors.InstanceBusy(instance=uuid, operation=known.operation, kind=METHOD, phase=known.status.value)
    if core.store.find(tx, uuid) is not None:
        raise errors.InstanceExists(instance=uuid)
    switch.require_enabled(tx)
    core.claims.claim(tx, arriving(move), holder_of(uuid, migration, Side.DESTINATION))
    core.moves.put(tx, move)
    return False


def arriving(move: Move) -> Instance:
    """The record as the destination will own it."""
    return msgspec.structs.replace(
        move.instance,
        host=move.migration.dest_host,
        migration=move.migration.uuid,
        task_state=TaskState.MIGRATING,
        fault=None,
    )


def kind(core: Core) -> Kind:
    """How the destination's side runs. COMMIT records that the hypervisor runs the guest here."""

    def steps(run: Run) -> Sequence[Step]:
        move = _move(core, run)
        data = move.migrate_data or MigrateData(migration=run.chain)
        parts = core.driver.pre_live_migration(arriving(move), move.migration, data, move.disk_info or DiskInfo())
        return [
            *(as_step(part) for part in parts),
            Do("publish", partial(_publish, core)),
            Do("await_guest", partial(_await_guest, core), cancellable=False),
            Commit(partial(_commit, core), cancellable=False),
            Do("post_live_migration_at_destination", partial(_persist, core)),
            Do("tell_source", lambda r: peers.nudge(core, _move(core, r).migration.source_host, r.instance or "")),
        ]

    return Kind(
        name=METHOD,
        steps=steps,
        finish=partial(_finish, core),
        abandon=partial(_abandon, core),
        limit="inbound",
        event="live_migration_dest",
        takes_over=True,
    )


def _move(core: Core, run: Run) -> Move:
    return core.moves.get(run.chain, Side.DESTINATION)


def _publish(core: Core, run: Run) -> None:
    """What the source needs to know is on record: whoever asks again gets it again."""
    told: Mapping[str, Any] = next((t for t in reversed(list(run.results.values())) if "migrate_data" in t), {})
    data: MigrateData = objects.decode(told["migrate_data"], MigrateData, "journal")

    def record(tx: Tx) -> None:
        core.moves.change(
            tx, run.chain, Side.DESTINATION, MigrationStatus.RUNNING, migrate_data=data, handed_over=True
        )

    core.database.write(record)


def has_arrived(info: GuestInfo | None) -> bool:
    """Whether the hypervisor runs the guest here, or has it whole and paused as it was."""
    if info is None or info.silent:
        return False
    return info.power_state is PowerState.RUNNING or (info.power_state is PowerState.PAUSED and not info.migrating)


def _await_guest(core: Core, run: Run) -> Result:
    """Until the hypervisor has the guest, or it never can come any more. A hypervisor that cannot say it now decides
    nothing: the guest may be on its way, and its disks are here.

    :raises MigrationFailed: it never came and cannot come any more.
    """
    run.step_aside()
    interval = core.settings.compute.peer_ask_interval
    while True:
        seen, cancelled = run.nudges, run.cancel_requested
        try:
            arrived, error = _look(core, run)
        except errors.ComputeError as exc:
            run.waiting_for = str(exc)
            arrived, error = False, None
        if arrived:
            return {"arrived": True}
        if error is not None:
            raise error
        peers.rest(run, interval, seen, cancelled)


def _look(core: Core, run: Run) -> tuple[bool, ComputeError | None]:
    """Whether it has arrived; else why it never will, once everything of it is removed."""
    move = _move(core, run)
    if has_arrived(_info(core, move.instance.uuid)):
        return True, None
    over, why, answer = _flight_is_over(core, run, move)
    if answer is not None and answer.landed:
        # This host went down with it before it was seen here: its disks are whole.
        run.explain("the source says that it has landed here")
        return True, None
    if not (over and _cleared(core, move)):
        return False, None
    if answer is not None and answer.error:
        return False, errors.from_dict(answer.error)
    return False, errors.MigrationFailed(migration=run.chain, reason=why)


def _info(core: Core, uuid: str) -> GuestInfo | None:
    try:
        return core.driver.get_info(uuid)
    except errors.InstanceNotFound:
        return None


def _flight_is_over(core: Core, run: Run, move: Move) -> tuple[bool, str, OperationAnswer | None]:
    """Whether nothing flies and nothing will, as the source says; and whether the guest is wanted here no more."""
    if move.forced:
        return True, f"host {move.other} never returns", None
    question = Question(
        move.migration.source_host, "live_migration", move.instance.uuid, run.uuid, move.migration.attempt
    )
    try:
        answer = peers.ask(core, question)
        if run.cancel_requested and answer.known and answer.phase != _LANDED and not answer.state.final:
            answer = peers.ask(core, question, revoke=True)
    except errors.PeerUnavailable as exc:
        run.waiting_for = str(exc)
        return False, str(exc), None
    if not answer.known:
        return True, "the source never heard of it", answer
    if answer.state.final and not answer.committed:
        return True, peers.reason_of(answer), answer
    if answer.phase == _LANDED and run.cancel_requested and not answer.landed:
        return True, "the flight has failed", answer
    run.waiting_for = f"host {question.host}: it is in {answer.phase}"
    return False, answer.phase, answer


def _cleared(core: Core, move: Move) -> bool:
    """Remove what was prepared, and what is half here. False: the guest runs here after all."""
    try:
        core.driver.rollback_live_migration_at_destination(arriving(move), move.migration, move.migrate_data)
    except errors.InvalidState:
        return False
    return True


def _commit(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.DESTINATION)
    uuid = move.instance.uuid
    core.claims.hand_on(tx, holder_of(uuid, run.chain, Side.DESTINATION), uuid)
    core.store.arrive(tx, arriving(move))
    core.moves.change(tx, run.chain, Side.DESTINATION, MigrationStatus.COMPLETED)


def _persist(core: Core, run: Run) -> None:
    """After a post-copy: once everything is here."""
    move = _move(core, run)
    peers.nudge(core, move.migration.source_host, move.instance.uuid)
    info = _info(core, move.instance.uuid)
    if info is None or info.power_state in _OFF:
        run.explain("the host went down with it: it is started from its disks")
        core.driver.power_on(arriving(move), run)
    else:
        core.driver.post_live_migration_at_destination(arriving(move), move.migration)
    core.driver.save_record(msgspec.structs.replace(arriving(move), migration=None, task_state=None))


def _finish(core: Core, tx: Tx, run: Run) -> None:
    settle_record(core.store, tx, run.instance or "", migration=None)


def _abandon(core: Core, tx: Tx, run: Run, error: ComputeError) -> None:
    if run.committed:
        return
    status = MigrationStatus.CANCELLED if isinstance(error, errors.Cancelled) else MigrationStatus.FAILED
    core.claims.release(tx, holder_of(run.instance or "", run.chain, Side.DESTINATION))
    core.moves.change(tx, run.chain, Side.DESTINATION, status, refused=error.message)
