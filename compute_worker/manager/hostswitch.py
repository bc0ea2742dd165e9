"""Whether this host takes new instances: persistent, decided by an operator or a conductor."""

from __future__ import annotations

import json

from compute_worker import errors
from compute_worker.operations.database import Database, Tx


class HostSwitch:
    """On or off, in the journal's file. Off refuses builds and inbound moves; what is here goes on."""

    def __init__(self, database: Database, host: str) -> None:
        self._database = database
        self._host = host

    def disable(self, tx: Tx, reason: str) -> None:
        """Take nothing new."""
        tx.execute("INSERT OR REPLACE INTO meta VALUES ('disabled', ?)", (json.dumps(reason),))

    def enable(self, tx: Tx) -> None:
        """Take new instances again."""
        tx.execute("DELETE FROM meta WHERE name = 'disabled'")

    def reason(self) -> str | None:
        """Why it is off; ``None``: it is on."""
        return self._database.read(self._reason)

    def require_enabled(self, tx: Tx) -> None:
        """:raises HostDisabled: it is off; another host may take the instance."""
        reason = self._reason(tx)
        if reason is not None:
            raise errors.HostDisabled(host=self._host, reason=reason or "no reason given")

    @staticmethod
    def _reason(tx: Tx) -> str | None:
        row = tx.execute("SELECT value FROM meta WHERE name = 'disabled'").fetchone()
        return str(json.loads(row[0])) if row else None
