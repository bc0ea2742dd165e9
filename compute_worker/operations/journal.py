"""The journal: every operation and step, written before and after it happens. SQL and nothing else.

Functions that take a :data:`~compute_worker.operations.database.Tx` write within the caller's transaction, so that a
step's end, the next one's start and a change of state are one commit.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from compute_worker import objects
from compute_worker.operations.database import Tx, next_seq
from compute_worker.operations.schema import OPEN_SQL
from compute_worker.states import OperationState


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation as its row says."""

    id: int
    key: str
    derived_key: bool
    digest: str
    uuid: str
    chain: str
    kind: str
    instance: str | None
    args: dict[str, Any]
    state: OperationState
    committed: bool
    cancel_requested: bool
    preempted: bool
    phase: str
    error: dict[str, Any] | None
    result: dict[str, Any]
    request_id: str | None
    created_at: float
    updated_at: float
    seq: int


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One step as its row says. ``result`` is what ``do`` returned."""

    position: int
    direction: str
    name: str
    state: str
    started_at: float
    ended_at: float | None
    attempts: int
    result: dict[str, Any] | None
    error: str | None
    reason: str | None


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        id=row["id"],
        key=row["key"],
        derived_key=bool(row["derived_key"]),
        digest=row["digest"],
        uuid=row["uuid"],
        chain=row["chain"],
        kind=row["kind"],
        instance=row["instance"],
        args=msgspec.json.decode(row["args"]),
        state=OperationState(row["state"]),
        committed=bool(row["committed"]),
        cancel_requested=bool(row["cancel_requested"]),
        preempted=bool(row["preempted"]),
        phase=row["phase"],
        error=json.loads(row["error"]) if row["error"] else None,
        result=msgspec.json.decode(row["result"]),
        request_id=row["request_id"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        seq=row["seq"],
    )


def _step(row: sqlite3.Row) -> StepEntry:
    return StepEntry(
        position=row["position"],
        direction=row["direction"],
        name=row["name"],
        state=row["state"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        attempts=row["attempts"],
        result=json.loads(row["result"]) if row["result"] else None,
        error=row["error"],
        reason=row["reason"],
    )


def insert(tx: Tx, entry: Mapping[str, Any]) -> int:
    """A new operation; returns its row id. ``args`` is a JSON text already."""
    now = time.time()
    values = {**entry, "created_at": now, "updated_at": now, "seq": next_seq(tx)}
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    return int(tx.execute(f"INSERT INTO operations ({names}) VALUES ({marks})", values).lastrowid or 0)


def insert_refused(
    tx: Tx,
    message_id: str,
    uuid: str,
    kind: str,
    instance: str | None,
    request_id: str | None,
    error: Mapping[str, Any],
) -> int | None:
    """A cast that was refused; returns its row id, ``None`` when this message was recorded before."""
    key = f"refused/{message_id}"
    if by_key(tx, key) is not None:
        return None
    state = OperationState.REFUSED
    return insert(
        tx,
        {
            "key": key,
            "derived_key": True,
            "digest": "",
            "uuid": uuid,
            "chain": uuid,
            "kind": kind,
            "instance": instance,
            "args": "{}",
            "state": state,
            "committed": False,
            "phase": state.value,
            "request_id": request_id,
            "error": json.dumps(error),
        },
    )


def update(tx: Tx, operation: int, **changes: Any) -> None:
    """Change columns of one operation; its ``seq`` and ``updated_at`` move on."""
    values = {**changes, "updated_at": time.time(), "seq": next_seq(tx), "id": operation}
    sets = ", ".join(f"{name} = :{name}" for name in values if name != "id")
    tx.execute(f"UPDATE operations SET {sets} WHERE id = :id", values)


def forget_args(tx: Tx, operation: int, names: Collection[str]) -> None:
    """Drop arguments that no step needs any more. The key's digest stays: a repetition is still recognised."""
    paths = [f"$.{name}" for name in names]
    marks = ", ".join("?" for _ in paths)
    tx.execute(f"UPDATE operations SET args = json_remove(args, {marks}) WHERE id = ?", (*paths, operation))


def step_started(tx: Tx, operation: int, position: int, direction: str, name: str) -> None:
    """Before it runs. A step that was started before keeps its first start and counts one more attempt."""
    tx.execute(
        "INSERT INTO steps (operation, position, direction, name, state, started_at) VALUES (?, ?, ?, ?, 'started', ?)"
        " ON CONFLICT DO UPDATE SET attempts = attempts + 1, state = 'started'",
        (operation, position, direction, name, time.time()),
    )


def step_ended(
    tx: Tx,
    operation: int,
    position: int,
    direction: str,
    *,
    attempts: int,
    result: Mapping[str, Any] | None = None,
    error: str | None = None,
    reason: str | None = None,
) -> None:
    """After it ran: ``done``, or ``failed`` when there is an ``error``."""
    tx.execute(
        "UPDATE steps SET state = ?, ended_at = ?, attempts = attempts + ?, result = ?, error = ?, reason = ?"
        " WHERE operation = ? AND position = ? AND direction = ?",
        (
            "failed" if error else "done",
            time.time(),
            attempts - 1,
            json.dumps(result) if result is not None else None,
            error,
            reason,
            operation,
            position,
            direction,
        ),
    )


def turn(tx: Tx, operation: int) -> None:
    """It is not undone after all: it goes on from its first step that is not done."""
    tx.execute("DELETE FROM steps WHERE operation = ? AND direction = 'undo'", (operation,))
    update(tx, operation, state=OperationState.RUNNING, error=None)


def by_key(tx: Tx, key: str) -> Entry | None:
    """The operation that has this key."""
    row = tx.execute("SELECT * FROM operations WHERE key = ?", (key,)).fetchone()
    return _entry(row) if row else None


def by_id(tx: Tx, operation: int) -> Entry:
    """The operation of this row."""
    return _entry(tx.execute("SELECT * FROM operations WHERE id = ?", (operation,)).fetchone())


def by_uuid(tx: Tx, uuid: str) -> Entry | None:
    """The operation of this uuid. A chain has one on each host for each message: one that is open, else one that ran
    (not merely wrote a row), else the newest; one that was refused comes last."""
    sql = (
        f"SELECT * FROM operations WHERE uuid = ? ORDER BY {OPEN_SQL} DESC, state = 'refused',"
        " EXISTS (SELECT 1 FROM steps WHERE operation = operations.id) DESC, id DESC LIMIT 1"
    )
    row = tx.execute(sql, (uuid,)).fetchone()
    return _entry(row) if row else None


def open_entries(tx: Tx, instance: str | None = None) -> list[Entry]:
    """Operations that are not final, oldest first."""
    where, values = (" AND instance = ?", (instance,)) if instance else ("", ())
    rows = tx.execute(f"SELECT * FROM operations WHERE {OPEN_SQL}{where} ORDER BY id", values)
    return [_entry(row) for row in rows]


def changed_since(
    tx: Tx, seq: int, instance: str | None = None, limit: int = 1000, open_only: bool = False
) -> list[Entry]:
    """Operations that changed after ``seq``, in order of change: the first ``limit`` of them."""
    where, values = (" AND instance = ?", (instance,)) if instance else ("", ())
    where += f" AND {OPEN_SQL}" if open_only else ""
    rows = tx.execute(
        f"SELECT * FROM operations WHERE seq > ?{where} ORDER BY seq LIMIT {limit:d}", (seq, *values)
    )
    return [_entry(row) for row in rows]


def steps_of(tx: Tx, operation: int) -> list[StepEntry]:
    """The steps of one operation in the order they ran."""
    rows = tx.execute(
        "SELECT * FROM steps WHERE operation = ? ORDER BY direction, CASE direction WHEN 'do' THEN position"
        " ELSE -position END",
        (operation,),
    )
    return [_step(row) for row in rows]


def release_key(tx: Tx, entry: Entry) -> None:
    """Let another operation have this one's key; its row stays for the history."""
    tx.execute("UPDATE operations SET key = ? WHERE id = ?", (f"{entry.key}#{entry.id}", entry.id))


def tombstone(tx: Tx, name: str, outcome: str, expires_at: float | None) -> None:
    """Write that ``name`` (``operation/<uuid>`` or ``instance/<uuid>``) is settled; ``None``: for ever."""
    tx.execute(
        "INSERT INTO tombstones VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", (name, outcome, time.time(), expires_at)
    )


def tombstone_of(tx: Tx, name: str) -> str | None:
    """The outcome that a tombstone tells, if there is one."""
    row = tx.execute("SELECT outcome FROM tombstones WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else None


COMMITTED = "committed"
"""The outcome of a tombstone of a key whose operation was past its COMMIT, and is pruned."""


def prune(tx: Tx, before: float, remembered: Collection[str] = ()) -> int:
    """Drop final operations that ended before ``before`` and tombstones that expired. Returns how many operations.

    :param remembered: kinds of which a tombstone for ever keeps that one was committed.
    """
    tx.execute("DELETE FROM tombstones WHERE expires_at < ?", (time.time(),))
    doomed = f"SELECT id FROM operations WHERE NOT ({OPEN_SQL}) AND updated_at < ?"
    marks = ", ".join("?" for _ in remembered)
    tx.execute(
        "INSERT INTO tombstones SELECT 'key/' || key, ?, ?, NULL FROM operations"
        f" WHERE id IN ({doomed}) AND committed AND kind IN ({marks}) ON CONFLICT DO NOTHING",
        (COMMITTED, time.time(), before, *remembered),
    )
    tx.execute(f"DELETE FROM steps WHERE operation IN ({doomed})", (before,))
    return tx.execute(f"DELETE FROM operations WHERE id IN ({doomed})", (before,)).rowcount


def view(entry: Entry, steps: list[StepEntry], host: str, journal_id: str) -> objects.Operation:
    """The operation as callers see it."""
    return objects.Operation(
        uuid=entry.uuid,
        kind=entry.kind,
        instance=entry.instance,
        host=host,
        state=entry.state,
        phase=entry.phase,
        committed=entry.committed,
        cancel_requested=entry.cancel_requested,
        request_id=entry.request_id,
        created_at=entry.created_at,
        updated_at=entry.updated_at,
        error=entry.error,
        result=entry.result,
        steps=[
            objects.StepRecord(
                name=s.name,
                direction=s.direction,
                state=s.state,
                started_at=s.started_at,
                ended_at=s.ended_at,
                attempts=s.attempts,
                error=s.error,
                reason=s.reason,
            )
            for s in steps
        ],
        journal_id=journal_id,
        seq=entry.seq,
    )
