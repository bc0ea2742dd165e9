"""``terminate_instance``: it wins over everything that runs on the instance, here and on the hosts of its moves, and is
tried until it is done."""

from __future__ import annotations

from collections.abc import Sequence

from compute_worker import errors
from compute_worker.errors import ComputeError
from compute_worker.manager import peers, resize_force
from compute_worker.manager.core import Core, begin
from compute_worker.moves import Move, Side
from compute_worker.objects import Flavor, ImageMeta, Instance
from compute_worker.operations import journal
from compute_worker.operations.database import Tx
from compute_worker.operations.kinds import Do, Kind, Step
from compute_worker.operations.run import Run


def admit(core: Core, tx: Tx, uuid: str) -> bool:
    """Tombstone the uuid. True when neither this host nor one that it knows of has anything of it."""
    core.store.bury(tx, uuid)
    instance = core.store.find(tx, uuid)
    # Of one that was ended by force the other host may keep its copy, whether it has returned yet or not.
    moves = [move for move in core.moves.of(tx, uuid, open_only=False) if not move.closed or move.forced]
    if instance is not None:
        begin(core.store, tx, instance, "terminate_instance")
    for move in moves:
        core.moves.change(tx, move.migration.uuid, move.side, deleted=True)
    return instance is None and not moves and core.store.went_to(tx, uuid) is None


def kind(core: Core) -> Kind:
    """How a delete runs: only forward. What it preempted may have removed the instance already."""

    def steps(run: Run) -> Sequence[Step]:
        return [
            Do("await_operations", lambda r: _await_operations(core, r)),
            *_local_steps(core, run),
            Do("tell_other_hosts", lambda r: _tell_others(core, r)),
        ]

    def finish(tx: Tx, run: Run) -> None:
        uuid = run.instance or ""
        core.store.remove(tx, uuid)
        core.claims.release_all(tx, uuid)
        core.moves.close_all(tx, uuid)

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


def _deleted_moves(core: Core, tx: Tx, uuid: str) -> list[Move]:
    """The moves that were open when the delete came, whatever has become of them since."""
    return [move for move in core.moves.of(tx, uuid, open_only=False) if move.deleted]


def _await_operations(core: Core, run: Run) -> None:
    """What it preempted has left: a move that waits for its other host is not in the instance's line any more, and may
    wait for long. Other deletes get the slot meanwhile."""

    def others() -> bool:
        entries = core.database.read(lambda tx: journal.open_entries(tx, run.instance))
        return any(entry.kind != run.kind for entry in entries)

    while others():
        run.yield_slot()
        run.waiting_for = "operations that it has cancelled"
        run.wait(lambda: not others(), core.settings.compute.peer_ask_interval)
    run.waiting_for = None
    run.claim_slot()


def _local_steps(core: Core, run: Run) -> list[Step]:
    """The driver's parts, made when each runs: what it preempted may have changed who owns the instance.

    A host that owns the instance, or was to get it, removes everything; one that gave it away only its own copy: the
    directory may be shared with the owner.
    """
    uuid = run.instance or ""

    def part(run: Run, index: int) -> None:
        # Also of moves that were over when the delete came: it may have preempted what drops their copy.
        instance, given = core.database.read(
            lambda tx: (core.store.find(tx, uuid), core.moves.of(tx, uuid, open_only=False))
        )
        arriving = [move for move in given if move.deleted and move.side is Side.DESTINATION]
        if instance is not None or arriving:
            core.driver.destroy(instance or arriving[0].instance)[index].do(run)
        elif given:
            core.driver.confirm_migration(given[0].instance, given[0].migration, run)

    names = [p.name for p in core.driver.destroy(nameless(uuid))]
    return [Do(name, lambda r, i=index: part(r, i)) for index, name in enumerate(names)]  # type: ignore[misc]


def _tell_others(core: Core, run: Run) -> None:
    """Every host of its moves has the delete when this ends.

    :raises PeerUnavailable: one does not answer: asked again until it does, or is forgotten.
    """
    uuid = run.instance or ""

    def look(tx: Tx) -> set[str]:
        hosts = {move.other for move in _deleted_moves(core, tx, uuid)} | {core.store.went_to(tx, uuid) or core.host}
        return {host for host in hosts - {core.host} if not resize_force.is_forgotten(tx, host)}

    hosts = core.database.read(look)
    if hosts:
        run.step_aside()
    silent: errors.PeerUnavailable | None = None
    for host in sorted(hosts):
        try:
            peers.reached(host, lambda h=host: core.peers.terminate_instance(uuid, host=h, operation=run.uuid))  # type: ignore[misc]
            peers.nudge(core, host, uuid)
        except errors.PeerUnavailable as exc:
            silent = exc
    if silent is not None:
        raise silent


def nameless(uuid: str) -> Instance:
    """A record for what is left of an instance of which only the uuid is known: enough to remove it."""
    return Instance(uuid=uuid, flavor=Flavor(vcpus=1, memory_mb=16), image=ImageMeta(id="unknown"))
