"""What a host answers about its moves, and what an operator decides when a host is off for good (``protocol.md`` 8)."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from compute_worker import errors
from compute_worker.manager.core import Core
from compute_worker.moves import Move, Side
from compute_worker.objects import MigrationState, OperationAnswer
from compute_worker.operations.database import Tx
from compute_worker.states import MigrationStatus

_WAITS = frozenset({MigrationStatus.POST_MIGRATING})
_TAKES = frozenset({"prep_resize", "finish_revert_resize", "pre_live_migration"})
"""Commands by whose COMMIT a host comes to own the instance."""


def state_of(core: Core, move: Move, copies: Collection[str] | None = None) -> MigrationState:
    """One side of a move as others see it.

    :param copies: what :func:`copies_of` found, where it was looked for already.
    """
    uuid = move.instance.uuid
    now = core.database.read(lambda tx: core.store.find(tx, uuid))
    if copies is None:
        copies = copies_of(core, [move])
    return MigrationState(
        migration=move.migration,
        side=move.side.value,
        operation=move.operation,
        handed_over=move.handed_over,
        generation=now.generation if now is not None else move.instance.generation,
        has_copy=uuid in copies,
        refused=move.refused,
        finished_at=move.finished_at,
        journal_id=core.database.journal_id,
    )


def copies_of(core: Core, moves: list[Move]) -> set[str]:
    """Instances of which a copy is set aside here. Only a source keeps one: for others the hypervisor is not asked."""
    if all(move.side is not Side.SOURCE for move in moves):
        return set()
    return {left.uuid for left in core.driver.list_leftovers() if left.kind == "resize"}


def completed(core: Core, answer: OperationAnswer, message: str, uuid: str) -> OperationAnswer:
    """An answer about a command, with what this host has of the instance: what a "never came" is worth.

    A host that lost its journal and found the instance beside its disks owns it: that is a yes to what would have
    brought it there, also when the move was confirmed since.
    """
    now = core.database.read(lambda tx: core.store.find(tx, uuid))
    if answer.known:
        return _with_flight(core, answer, uuid) if message == "live_migration" else answer
    owns = message in _TAKES and now is not None and now.host == core.host
    kinds = {left.kind for left in core.driver.list_leftovers() if left.uuid == uuid}
    return msgspec.structs.replace(
        answer,
        known=owns,
        committed=owns,
        clean=not kinds & {"domain", "directory"},
        generation=now.generation if now is not None else 0,
    )


def _with_flight(core: Core, answer: OperationAnswer, uuid: str) -> OperationAnswer:
    """How the flight ended, where it has and nothing is decided yet."""
    moves = core.database.read(lambda tx: core.moves.of(tx, uuid))
    move = next((move for move in moves if move.side is Side.SOURCE), None)
    if move is None or not move.landed:
        return answer
    error = answer.error
    if error is None and not move.landed_well and not answer.committed:
        error = errors.MigrationFailed(migration=move.migration.uuid, reason=move.landed).to_dict()
    return msgspec.structs.replace(answer, landed=move.landed_well, error=error)


def require_silent(core: Core, migration: str, destination_is_off: bool) -> None:
    """:raises InvalidState: nobody said that the destination is off, or it answers."""
    move = core.moves.get(migration, Side.SOURCE)
    host = move.migration.dest_host
    if not destination_is_off:
        raise errors.InvalidState(
            f"migration {migration}: only when host {host} is off for good: say destination_is_off"
        )
    require_host_silent(core, host)


def require_host_silent(core: Core, host: str) -> None:
    """:raises InvalidState: it answers."""
    if host == core.host:
        raise errors.InvalidState(f"host {host} is this host")
    try:
        core.quick_peers.get_migration("00000000-0000-4000-8000-000000000000", host=host)
    except (errors.PeerUnavailable, errors.MessageUndeliverable):
        return
    except errors.ComputeError as exc:
        raise errors.InvalidState(f"host {host} answers: it decides by itself, nothing is to be forced") from exc
    raise errors.InvalidState(f"host {host} answers: it decides by itself, nothing is to be forced")


def admit(core: Core, tx: Tx, uuid: str, migration: str, finished: bool) -> bool:
    """Mark the source's side as forced: the operation that waits takes the guest back, or one that begins now.

    :param finished: whether one is to begin, as the move was when the command was looked at.

    Returns whether there is nothing to begin.

    :raises InvalidState: it does not wait for the destination, and has nothing set aside.
    """
    move = core.moves.require(tx, migration, Side.SOURCE)
    if move.instance.uuid != uuid:
        raise errors.MigrationNotFound(migration=migration)
    if finished != (move.status is MigrationStatus.FINISHED):
        raise errors.InvalidState(f"instance {uuid}: migration {migration} has just become {move.status}: look again")
    if move.status is MigrationStatus.FINISHED:
        core.store.forbid_deleted(tx, uuid)
        core.moves.change(tx, migration, Side.SOURCE, MigrationStatus.REVERTING, forced=True)
        return False
    if move.status not in _WAITS:
        raise errors.InvalidState(
            f"instance {uuid}: migration {migration} is {move.status}: nothing waits for host {move.other} here"
        )
    core.moves.change(tx, migration, Side.SOURCE, forced=True)
    return True


def forget(core: Core, tx: Tx, host: str) -> list[str]:
    """Close every open move with ``host``. Returns the instances that something waits for."""
    touched = []
    tx.execute("INSERT OR REPLACE INTO meta VALUES (?, '1')", (f"forgotten/{host}",))
    tx.execute("DELETE FROM departed WHERE host = ?", (host,))
    moves = [move for move in core.moves.list_in(tx) if move.other == host and not move.same_host]
    for move in moves:
        touched.append(move.instance.uuid)
        if move.status is MigrationStatus.FINISHED:
            # The copy of before stays until a person decides: take_back_instance, or a delete.
            continue
        core.moves.change(tx, move.migration.uuid, move.side, forced=True)
    return touched


def is_forgotten(tx: Tx, host: str) -> bool:
    """Whether an operator said that a host never returns."""
    return tx.execute("SELECT 1 FROM meta WHERE name = ?", (f"forgotten/{host}",)).fetchone() is not None
