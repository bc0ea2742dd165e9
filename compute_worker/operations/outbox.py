"""Notifications as rows: written with the change they tell of, sent afterwards, at least once, in order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compute_worker.operations.database import Database, Tx

PAYLOAD_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One notification that is still to be sent. ``(host, operation, sequence)`` tells a repeated one."""

    seq: int
    operation: str | None
    sequence: int
    event_type: str
    priority: str
    payload: dict[str, Any]
    created_at: float


class Outbox:
    """The rows of one database, and the bell that says there is a new one."""

    def __init__(self, database: Database, host: str) -> None:
        self._database = database
        self._host = host
        self._bell = threading.Event()

    def add(
        self,
        tx: Tx,
        event_type: str,
        payload: dict[str, Any],
        *,
        operation_row: int | None = None,
        priority: str = "INFO",
    ) -> None:
        """Write a notification within ``tx``. Its sequence counts within the operation, else within the host."""
        uuid, sequence = None, 0
        if operation_row is not None:
            # A uuid may have several rows (a chain's messages, a refusal and its repetition): one count for all.
            row = tx.execute(
                "UPDATE operations AS this SET notified = 1 + (SELECT max(notified) FROM operations AS every"
                " WHERE every.uuid = this.uuid) WHERE id = ? RETURNING uuid, notified",
                (operation_row,),
            ).fetchone()
            uuid, sequence = str(row[0]), int(row[1])
        now = time.time()
        body = {"version": PAYLOAD_VERSION, "host": self._host, "operation": uuid, "time": now, **payload}
        row_id = tx.execute(
            "INSERT INTO outbox (operation, sequence, event_type, priority, payload, created_at) VALUES (?,?,?,?,?,?)",
            (uuid, sequence, event_type, priority, json.dumps(body), now),
        ).lastrowid
        if operation_row is None:
            tx.execute("UPDATE outbox SET sequence = id WHERE id = ?", (row_id,))

    def ring(self) -> None:
        """Say that rows were committed."""
        self._bell.set()

    def wait(self, timeout: float) -> bool:
        """Wait until somebody rings or ``timeout`` seconds are over."""
        rung = self._bell.wait(timeout)
        self._bell.clear()
        return rung

    def peek(self, limit: int) -> list[OutboxRow]:
        """The oldest rows. They stay until :meth:`delete`: if the process dies between, they are sent again."""

        def look(tx: Tx) -> list[OutboxRow]:
            rows = tx.execute("SELECT * FROM outbox ORDER BY id LIMIT ?", (limit,)).fetchall()
            return [
                OutboxRow(
                    seq=row["id"],
                    operation=row["operation"],
                    sequence=row["sequence"],
                    event_type=row["event_type"],
                    priority=row["priority"],
                    payload={**json.loads(row["payload"]), "sequence": row["sequence"]},
                    created_at=row["created_at"],
                )
                for row in rows
            ]

        return self._database.read(look)

    def delete(self, seqs: Sequence[int]) -> None:
        """Forget rows that were sent. A power failure may bring them back: they are sent again."""
        rows = [(seq,) for seq in seqs]
        self._database.write(lambda tx: tx.executemany("DELETE FROM outbox WHERE id = ?", rows), durable=False)

    def depth(self) -> int:
        """How many rows wait."""
        return int(self._database.read(lambda tx: tx.execute("SELECT count(*) FROM outbox").fetchone()[0]))
