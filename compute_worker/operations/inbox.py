"""Casts that were committed before they were acknowledged and are not yet accepted or refused."""

from __future__ import annotations

import time

from compute_worker.operations.database import Database, Tx


class DatabaseInbox:
    """:class:`compute_worker.messages.Inbox` in the journal's file, so that accepting deletes the row in one commit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, message_id: str, body: bytes) -> bool:
        """Store durably; false when it was there already."""
        sql = "INSERT INTO inbox (message_id, body, received_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        row = (message_id, body, time.time())
        return self._database.write(lambda tx: tx.execute(sql, row).rowcount) == 1

    def open(self) -> list[tuple[str, bytes]]:
        """What is still to be accepted, oldest first."""

        def look(tx: Tx) -> list[tuple[str, bytes]]:
            return [(row[0], row[1]) for row in tx.execute("SELECT message_id, body FROM inbox ORDER BY id")]

        return self._database.read(look)

    def discard(self, message_id: str) -> None:
        """Forget one that was accepted or refused."""
        self._database.write(lambda tx: discard(tx, message_id))


def discard(tx: Tx, message_id: str) -> None:
    """Forget one within the transaction that accepts or refuses it."""
    tx.execute("DELETE FROM inbox WHERE message_id = ?", (message_id,))
