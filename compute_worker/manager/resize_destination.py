"""``prep_resize`` at the destination: claim, base image, the source's disks, and the COMMIT of the move.

One operation from the claim to the running guest. While the source works it holds nothing but the claim; when the
source hands over (``finish_resize``) it goes on, and from then on it needs nothing more from the source.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import msgspec

from compute_worker import errors
from compute_worker.claims import holder_of
from compute_worker.errors import ComputeError
from compute_worker.manager import peers
from compute_worker.manager.build import wait_for_plugs
from compute_worker.manager.core import Core, settle_record
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.manager.peers import Question
from compute_worker.moves import Move, Side
from compute_worker.objects import DiskInfo, Flavor, Instance, Migration
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Commit, Do, Kind, Result, Step
from compute_worker.operations.run import Run
from compute_worker.states import MigrationStatus, PowerState, TaskState, VmState, ran_before
from compute_worker.virt.driver import SpawnRequest

METHOD = "prep_resize"


def check(core: Core, instance: Instance, migration: Migration) -> None:
    """Refuse what can be known before anything is written.

    :raises Refused: with the reason; ``reschedulable`` where another host may take it.
    """
    if migration.instance != instance.uuid:
        raise errors.InvalidCommand(method=METHOD, problem=f"migration {migration.uuid} is of another instance")
    if migration.dest_host != core.host:
        raise errors.InvalidCommand(method=METHOD, problem=f"dest_host is {migration.dest_host}, this is {core.host}")
    if migration.migration_type == "live-migration":
        raise errors.InvalidCommand(method=METHOD, problem="a live migration begins with live_migration")
    if migration.source_host == core.host and not core.settings.compute.allow_resize_to_same_host:
        raise errors.Unschedulable(f"host {core.host}: allow_resize_to_same_host is off")
    if instance.block_device_info.block_device_mapping:
        raise errors.NotSupported(what=f"a move of instance {instance.uuid} with volumes")
    shrinks = shrinking(instance.flavor, migration.new_flavor or instance.flavor)
    if shrinks is not None:
        raise errors.InvalidCommand(method=METHOD, problem=f"instance {instance.uuid}: {shrinks}")
    wanted = instance.image.properties.get("hw_architecture")
    found = core.claims.found
    if wanted and found is not None and found.machine_arch and wanted != found.machine_arch:
        raise errors.Unschedulable(f"host {core.host} is {found.machine_arch}, image {instance.image.id} is {wanted}")


def shrinking(old: Flavor, new: Flavor) -> str | None:
    """Which disk would become smaller, in words. A tenant's file system is never shrunk."""
    for name in ("root_gb", "ephemeral_gb"):
        before, after = getattr(old, name), getattr(new, name)
        if after < before:
            return f"{name} cannot shrink from {before} to {after} GiB"
    return None


def admit(core: Core, switch: HostSwitch, tx: Tx, move: Move) -> bool:
    """Check and write what accepting makes true: the claim and this side of the move.

    :raises InstanceDeleted: a delete came first.
    :raises InstanceBusy: a move of it is not over here.
    :raises InstanceExists: it is here already.
    :raises InsufficientResources: it does not fit.
    """
    uuid, migration = move.instance.uuid, move.migration
    core.store.forbid_deleted(tx, uuid)
    known = core.moves.find(tx, migration.uuid, Side.DESTINATION)
    others = [other for other in core.moves.of(tx, uuid) if other.migration.uuid != migration.uuid]
    # Another's: what it set aside here is in the way of this one.
    for busy in [known] if known is not None and not known.closed else others:
        raise errors.InstanceBusy(instance=uuid, operation=busy.operation, kind=METHOD, phase=busy.status.value)
    if core.store.find(tx, uuid) is not None and not move.same_host:
        raise errors.InstanceExists(instance=uuid)
    switch.require_enabled(tx)
    core.claims.claim(tx, arriving(move), holder_of(uuid, migration.uuid, Side.DESTINATION))
    core.moves.put(tx, move)
    return False


def arriving(move: Move) -> Instance:
    """The record as the destination will own it. ``vm_state`` and ``power_state`` are still those of before."""
    return msgspec.structs.replace(
        move.instance,
        host=move.migration.dest_host,
        flavor=move.migration.new_flavor or move.instance.flavor,
        migration=move.migration.uuid,
        task_state=TaskState.RESIZE_FINISH,
        fault=None,
    )


def kind(core: Core) -> Kind:
    """How the destination's side runs. COMMIT is after the guest was started paused and before it runs."""

    def steps(run: Run) -> Sequence[Step]:
        return [
            Do("reschedule", lambda r: None, partial(reschedule, core)),
            Do("prepare_images", partial(_prepare_images, core), partial(_forget_images, core)),
            Do("ask_source", partial(_ask_source, core), partial(_unask_source, core)),
            Do("await_disks", partial(_await_disks, core)),
            *_finish_steps(core, run),
            Do("wait_for_vifs", lambda r: wait_for_plugs(core, r, arriving(_move(core, r)))),
            Do("check_source", partial(_check_source, core)),
            Commit(partial(_commit, core)),
            Do("resume_guest", partial(_resume_guest, core)),
            Do("tell_source", lambda r: peers.nudge(core, _move(core, r).migration.source_host, r.instance or "")),
        ]

    return Kind(
        name=METHOD,
        steps=steps,
        finish=partial(_finish, core),
        abandon=partial(_abandon, core),
        limit="inbound",
        event="resize_prep",
        takes_over=True,
    )


def _move(core: Core, run: Run) -> Move:
    return core.moves.get(run.chain, Side.DESTINATION)


def _finish_steps(core: Core, run: Run) -> list[Step]:
    """The driver's parts, made anew when each runs: the source's record and disks come with ``finish_resize``."""

    def part(run: Run, index: int) -> Step:
        move = _move(core, run)
        made = core.driver.finish_migration(arriving(move), move.migration, move.disk_info or DiskInfo())[index]
        return Do(made.name, made.do, made.undo)

    move = _move(core, run)
    names = [p.name for p in core.driver.finish_migration(arriving(move), move.migration, DiskInfo())]
    return [
        Do(name, lambda r, i=index: part(r, i).do(r), lambda r, i=index: part(r, i).undo(r))  # type: ignore[misc]
        for index, name in enumerate(names)
    ]


def _prepare_images(core: Core, run: Run) -> None:
    """The base image, while the guest still runs. One that is gone from its store comes from the source instead."""
    fetch = core.driver.spawn(arriving(_move(core, run)), SpawnRequest())[0]
    try:
        fetch.do(run)
    except errors.ImageNotFound as exc:
        run.explain(f"{exc}: the source is to send its base")


def _forget_images(core: Core, run: Run) -> None:
    core.driver.spawn(arriving(_move(core, run)), SpawnRequest())[0].undo(run)


def _ask_source(core: Core, run: Run) -> Result:
    move = _move(core, run)
    found = core.claims.found
    try:
        core.peers.resize_instance(
            move.instance.uuid,
            move.migration,
            move.clean_shutdown,
            found.machine_arch if found is not None else "",
            core.database.journal_id,
            host=move.migration.source_host,
            operation=run.uuid,
        )
    except errors.PeerUnavailable:
        run.step_aside()
        raise
    except errors.InstanceBusy as exc:
        if move.migration.attempt == 1:
            raise
        run.step_aside()
        # It still takes the guest back from the attempt before.
        raise errors.PeerUnavailable(str(exc), host=move.migration.source_host) from exc
    return {"accepted": True}


def _unask_source(core: Core, run: Run) -> None:
    """Best effort, so that the source stops soon: it asks what became of this operation before it decides anything."""
    move = _move(core, run)
    if move.handed_over:
        # It asks already, and takes this operation's own error for the answer.
        peers.nudge(core, move.migration.source_host, move.instance.uuid)
        return
    question = Question(
        move.migration.source_host, "resize_instance", move.instance.uuid, run.uuid, move.migration.attempt
    )
    try:
        peers.ask(core, question, revoke=True)
    except errors.ComputeError as exc:
        run.explain(f"{exc}: it will ask")


def _await_disks(core: Core, run: Run) -> None:
    """Until the source has handed over, or has given up.

    :raises ComputeError: what made the source give up.
    """
    move = _move(core, run)
    question = Question(
        move.migration.source_host, "resize_instance", move.instance.uuid, run.uuid, move.migration.attempt
    )
    interval = core.settings.compute.peer_ask_interval
    run.step_aside()
    while not (move := _move(core, run)).handed_over:
        if move.forced:
            raise errors.MigrationFailed(migration=run.chain, reason=f"host {question.host} never returns")
        seen = run.nudges
        _look_at_source(core, run, question)
        run.wait(lambda s=seen: run.nudges != s or _move(core, run).handed_over, interval)  # type: ignore[misc]
    run.waiting_for = None


def _look_at_source(core: Core, run: Run, question: Question) -> None:
    try:
        answer = peers.ask(core, question)
    except errors.PeerUnavailable as exc:
        run.waiting_for = str(exc)
        return
    verdict, why = peers.decide(answer, "")
    if verdict is peers.Verdict.NO and not _move(core, run).handed_over:
        raise errors.from_dict(answer.error) if answer.error else errors.MigrationFailed(
            migration=run.chain, reason=f"the source gave up: {why}"
        )
    run.waiting_for = f"host {question.host}: {why}"
    run.report(run.phase, peer=question.host, peer_phase=answer.phase)


def _check_source(core: Core, run: Run) -> None:
    """The last look before the COMMIT: a source that took its guest back by force has a higher generation.

    :raises MigrationFailed: it has.
    """
    move = _move(core, run)
    reason = peers.superseded_by(core, move.instance, move)
    if reason is not None:
        raise errors.MigrationFailed(migration=move.migration.uuid, reason=reason)


def _commit(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.DESTINATION)
    uuid, migration = move.instance.uuid, move.migration.uuid
    core.store.forbid_deleted(tx, uuid)
    if move.same_host:
        core.claims.hand_on(tx, uuid, holder_of(uuid, migration, Side.SOURCE))
    core.claims.hand_on(tx, holder_of(uuid, migration, Side.DESTINATION), uuid)
    core.store.arrive(tx, msgspec.structs.replace(arriving(move), vm_state=VmState.RESIZED))
    core.moves.change(tx, migration, Side.DESTINATION, MigrationStatus.FINISHED, finished_at=time.time())


def _resume_guest(core: Core, run: Run) -> Result:
    move = _move(core, run)
    reason = peers.superseded_by(core, move.instance, move)
    if reason is not None:
        for part in core.driver.set_aside(arriving(move), move.migration):
            part.do(run)
        run.explain(f"{reason}: this copy is set aside")
        return {"superseded": reason}
    if runs_again(move):
        core.driver.power_on(arriving(move), run)
    else:
        run.explain("it was off before: it stays off")
    return None


def remember(core: Core, tx: Tx, operation: str, instance: Instance, migration: Migration, info: DiskInfo) -> bool:
    """This side of a finished move, lost with the journal, written again: the source tells of it, and the record beside
    the disks, which names the move and this host, bears it out. The window for a decision begins anew.

    Returns whether it was so.
    """
    here = core.store.find(tx, instance.uuid)
    if here is None or here.host != core.host or here.migration != migration.uuid:
        return False
    if here.task_state is not None or migration.status is not MigrationStatus.FINISHED:
        return False
    move = Move(
        migration=migration,
        side=Side.DESTINATION,
        instance=instance,
        operation=operation,
        disk_info=info,
        handed_over=True,
        finished_at=time.time(),
    )
    core.moves.put(tx, move)
    core.store.change(tx, instance.uuid, vm_state=VmState.RESIZED)
    return True


def runs_again(move: Move) -> bool:
    """Whether the guest ran when the move began."""
    return ran_before(move.instance.vm_state, move.instance.power_state)


def _finish(core: Core, tx: Tx, run: Run) -> None:
    move = core.moves.require(tx, run.chain, Side.DESTINATION)
    uuid = move.instance.uuid
    reason = run.results.get("resume_guest", {}).get("superseded")
    if reason is not None:
        surrender(core, tx, move, reason)
        return
    power = PowerState.RUNNING if runs_again(move) else PowerState.SHUTDOWN
    settle_record(core.store, tx, uuid, power_state=power)


def surrender(core: Core, tx: Tx, move: Move, reason: str) -> None:
    """The source has taken the instance over by force: it is not this host's any more."""
    uuid = move.instance.uuid
    core.store.depart(tx, uuid, move.migration.source_host)
    core.claims.release_all(tx, uuid)
    core.moves.change(tx, move.migration.uuid, Side.DESTINATION, MigrationStatus.ERROR, refused=reason)


def _abandon(core: Core, tx: Tx, run: Run, error: ComputeError) -> None:
    if run.committed:
        return
    core.claims.release(tx, holder_of(run.instance or "", run.chain, Side.DESTINATION))
    core.moves.change(tx, run.chain, Side.DESTINATION, MigrationStatus.ERROR, refused=error.message)


# --- when this host cannot take it: the next one ------------------------------------------------------------------


def reschedule(core: Core, run: Run) -> None:
    """The last thing undone: ask the next host of ``alternates``, when the error says that another may take it."""
    move = _move(core, run)
    peers.nudge(core, move.migration.source_host, move.instance.uuid)
    again, why = decide_reschedule(run.error, move.migration, run.cancel_requested)
    if again:
        why = ask_next(core, run.uuid, move.instance, move.migration, move.clean_shutdown)[1]
    run.explain(why)


def decide_reschedule(
    error: ComputeError | None, migration: Migration, cancelled: bool
) -> tuple[bool, str]:
    """Whether the next host is asked, and why."""
    if cancelled:
        return False, "it was cancelled: no other host is asked"
    if error is None or not error.reschedulable:
        return False, "another host could not do it either: none is asked"
    if not migration.alternates:
        return False, "no other host is named in alternates"
    return True, f"{error.message}: host {migration.alternates[0]} is asked next"


def ask_next(
    core: Core, operation: str, instance: Instance, migration: Migration, clean_shutdown: bool
) -> tuple[ComputeError | None, str]:
    """Ask the alternates in order until one accepts. Asked again after a death the same hosts get the same commands.

    A host that does not answer is passed over: should it have accepted all the same, the source refuses it.

    Returns the last refusal, ``None`` when a host has accepted; and what happened, in words.
    """
    last: ComputeError | None = None
    hosts = migration.alternates
    for index, host in enumerate(hosts):
        onward = msgspec.structs.replace(
            migration,
            dest_host=host,
            attempt=migration.attempt + 1 + index,
            alternates=hosts[index + 1 :],
            status=MigrationStatus.PRE_MIGRATING,
        )
        try:
            core.peers.prep_resize(instance, onward, clean_shutdown, host=host, operation=operation)
        except errors.ComputeError as exc:
            last = exc
            continue
        return None, f"host {host} has accepted it as attempt {onward.attempt}"
    return last, f"no host of alternates takes it: {last}"


def elsewhere_kind(core: Core) -> Kind:
    """How a command runs that this host refused and that names alternates: it is passed on, or ends undone."""

    def ask_others(run: Run) -> None:
        instance = msgspec.convert(run.args["instance"], Instance)
        migration = msgspec.convert(run.args["migration"], Migration)
        refused, why = ask_next(core, run.uuid, instance, migration, run.args["clean_shutdown"])
        run.explain(why)
        if refused is not None:
            raise errors.Unschedulable(why)

    def nothing(tx: Tx, run: Run, error: ComputeError | None = None) -> None:
        """Nothing was written here."""

    return Kind(
        name="prep_resize_elsewhere",
        steps=lambda run: [Do("reschedule", ask_others)],
        finish=nothing,
        abandon=nothing,
        limit="inbound",
        event="resize_prep",
        committed_at_accept=True,
        gives_up=True,
        locks=False,
    )
