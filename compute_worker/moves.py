"""What this host knows of moves between it and its peers: one row for each migration and side, in the journal's file.

A row is written in the transaction of whatever it records (an accept, a COMMIT, a decision), so that a side of a move
is never between two of its states. Rules: ``protocol.md`` 1, 2, 5-10.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

import msgspec

from compute_worker import errors
from compute_worker.objects import Count, DiskInfo, HostName, Instance, MigrateData, Migration, Object, Uuid
from compute_worker.operations.database import Database, Tx, next_seq
from compute_worker.states import MigrationStatus

SCHEMA = """
CREATE TABLE IF NOT EXISTS moves (
    migration TEXT NOT NULL,
    side TEXT NOT NULL,
    instance TEXT NOT NULL,
    closed INTEGER NOT NULL,
    record BLOB NOT NULL,
    changed_at REAL NOT NULL,
    PRIMARY KEY (migration, side)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS moves_instance ON moves (instance);
"""

_S = MigrationStatus
_CLOSED = frozenset({_S.CONFIRMED, _S.REVERTED, _S.ERROR, _S.COMPLETED, _S.CANCELLED, _S.FAILED})


LANDED = "it has landed"
"""How a flight that went well ended (:attr:`Move.landed`)."""


class Side(StrEnum):
    """Which end of a move a host is. A resize in place has both on one host."""

    SOURCE = "source"
    DESTINATION = "destination"


class Move(Object, frozen=True, kw_only=True):
    """One side of a move.

    ``instance`` is the record as it was when the move began here: at the source what a revert brings back.
    """

    migration: Migration
    side: Side
    instance: Instance
    operation: Uuid
    """The chain's, on every host."""
    disk_info: DiskInfo | None = None
    handed_over: bool = False
    """The source may not start the guest any more, the destination may: until it says no."""
    refused: str | None = None
    """Why the other side said no for good."""
    forced: bool = False
    """An operator said that the other side is off and stays off."""
    deleted: bool = False
    """The instance was deleted while this was open: the other side is to hear of it."""
    journal_id: str = ""
    """The other side's journal: after it changed, a no is worth less (``protocol.md`` 9)."""
    attempt_of_revert: Count = 0
    finished_at: float | None = None
    clean_shutdown: bool = True
    migrate_data: MigrateData | None = None
    """Live: what the two hosts agreed on."""
    disk_over_commit: bool = False
    landed: str = ""
    """Live, at the source: how the flight ended, in words."""
    held: bool = False
    """Live, at the source: the copy here is paused because the destination is silent and may run the guest."""
    force: str = ""
    """Live, at the source: how an operator wants it finished: ``postcopy`` or ``pause``."""

    @property
    def status(self) -> MigrationStatus:
        """How far this side is."""
        return self.migration.status

    @property
    def same_host(self) -> bool:
        """Whether it is a resize in place."""
        return self.migration.source_host == self.migration.dest_host

    @property
    def one_directory(self) -> bool:
        """Whether both sides work on the same files: in place, or on shared storage."""
        return self.same_host or (self.disk_info is not None and self.disk_info.shared)

    @property
    def other(self) -> HostName:
        """The host at the other end."""
        return self.migration.dest_host if self.side is Side.SOURCE else self.migration.source_host

    @property
    def landed_well(self) -> bool:
        """Live, at the source: whether the hypervisor says that the guest is at the destination."""
        return self.landed == LANDED

    @property
    def closed(self) -> bool:
        """Whether nothing of it is left to decide or to drop."""
        return self.status in _CLOSED


_DECODER = msgspec.json.Decoder(Move)
_ENCODER = msgspec.json.Encoder()


class Moves:
    """Moves of one host. Methods with a ``tx`` belong to the caller's transaction; the others read what is durable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, tx: Tx, move: Move) -> Move:
        """Write a side as it is now."""
        fresh = msgspec.structs.replace(move, migration=msgspec.structs.replace(move.migration, seq=next_seq(tx)))
        tx.execute(
            "INSERT OR REPLACE INTO moves VALUES (?, ?, ?, ?, ?, ?)",
            (
                fresh.migration.uuid,
                fresh.side.value,
                fresh.instance.uuid,
                fresh.closed,
                _ENCODER.encode(fresh),
                time.time(),
            ),
        )
        return fresh

    def find(self, tx: Tx, migration: str, side: Side) -> Move | None:
        """One side of a migration, if this host is or was it."""
        sql = "SELECT record FROM moves WHERE migration = ? AND side = ?"
        row = tx.execute(sql, (migration, side.value)).fetchone()
        return _DECODER.decode(row[0]) if row else None

    def require(self, tx: Tx, migration: str, side: Side) -> Move:
        """One side of a migration.

        :raises MigrationNotFound: this host is not that side of it.
        """
        move = self.find(tx, migration, side)
        if move is None:
            raise errors.MigrationNotFound(migration=migration)
        return move

    def get(self, migration: str, side: Side) -> Move:
        """One side as it is on disk; raises what :meth:`require` raises."""
        return self._database.read(lambda tx: self.require(tx, migration, side))

    def change(
        self, tx: Tx, migration: str, side: Side, status: MigrationStatus | None = None, **changes: Any
    ) -> Move | None:
        """Change fields of a side; ``None`` when this host has it not (any more)."""
        move = self.find(tx, migration, side)
        if move is None:
            return None
        if status is not None:
            changes["migration"] = msgspec.structs.replace(move.migration, status=status)
        return self.put(tx, msgspec.structs.replace(move, **changes))

    def of(self, tx: Tx, instance: str, *, open_only: bool = True) -> list[Move]:
        """The sides of an instance's moves that this host has."""
        where = " AND NOT closed" if open_only else ""
        rows = tx.execute(f"SELECT record FROM moves WHERE instance = ?{where}", (instance,))
        return [_DECODER.decode(row[0]) for row in rows]

    def list_in(self, tx: Tx, open_only: bool = True) -> list[Move]:
        """Every side this host has, in order of change."""
        where = " WHERE NOT closed" if open_only else ""
        rows = tx.execute(f"SELECT record FROM moves{where}")
        return sorted((_DECODER.decode(row[0]) for row in rows), key=lambda move: move.migration.seq)

    def list(self, open_only: bool = True) -> list[Move]:
        """The same as it is on disk."""
        return self._database.read(lambda tx: self.list_in(tx, open_only))

    def close_all(self, tx: Tx, instance: str) -> None:
        """The instance was deleted: nothing of its moves is left to do."""
        for move in self.of(tx, instance):
            self.change(tx, move.migration.uuid, move.side, MigrationStatus.ERROR, refused="the instance was deleted")

    def prune(self, older_than: float) -> None:
        """Forget sides that were closed before ``older_than`` (seconds since the epoch)."""
        sql = "DELETE FROM moves WHERE closed AND changed_at < ?"
        self._database.write(lambda tx: tx.execute(sql, (older_than,)))
