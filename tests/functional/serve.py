"""A worker's server as a process of its own, for tests that kill it.

Arguments: transport URL, state directory, host name. Every accepted command is a line of ``accepted`` in the state
directory, synced before the inbox row goes; "listening" on standard output says when it takes messages.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from compute_worker import errors
from compute_worker.config import Rpc
from compute_worker.messages import Context, command, query
from compute_worker.objects import Accepted, Uuid
from compute_worker.operations.database import Database
from compute_worker.operations.inbox import DatabaseInbox
from compute_worker.operations.schema import SCHEMA
from compute_worker.rpc.server import WorkerServer
from compute_worker.rpc.transport import get_transport
from tests.waiting import wait_for


class Ledger:
    """Accepts by writing a line."""

    def __init__(self, path: Path, host: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._host = host

    @command
    def start_instance(
        self, context: Context, instance: Uuid, operation: Uuid | None = None, expires_at: float | None = None,
        check_only: bool = False,
    ) -> Accepted:  # fmt: skip
        """Write the operation down."""
        os.write(self._file, f"{operation} {context.message_id}\n".encode())
        os.fdatasync(self._file)
        return Accepted(operation=operation, host=self._host)

    @query
    def echo(self, context: Context, text: str = "") -> str:
        """Give it back."""
        return text


def refused(context: Context, method: str, args: Any, error: errors.ComputeError) -> None:
    """Say it, so that the test fails with the reason."""
    print(f"refused {method} {args}: {error}", flush=True)


def main(url: str, directory: str, host: str) -> None:
    """Serve until killed."""
    database = Database(Path(directory) / "journal.db", [SCHEMA])
    ledger = Ledger(Path(directory) / "accepted", host)
    server = WorkerServer(get_transport(url), host, [ledger], DatabaseInbox(database), refused, Rpc())
    server.start()
    wait_for(lambda: server.connected, 60, "the broker")
    print("listening", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
