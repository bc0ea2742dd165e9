"""A small worker for tests of the wire: endpoints that note what they are asked, a real inbox, a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from compute_worker import errors
from compute_worker.config import Rpc
from compute_worker.messages import Context, command, query
from compute_worker.objects import Accepted, Flavor, Seconds, Uuid
from compute_worker.operations.database import Database
from compute_worker.operations.inbox import DatabaseInbox
from compute_worker.operations.schema import SCHEMA
from compute_worker.rpc.server import WorkerServer
from tests.waiting import wait_for

UUID = "11111111-2222-4333-8444-{:012d}"
Small = Annotated[int, Meta(ge=0, le=10)]


class Notebook:
    """Endpoint that writes down every message which reached it."""

    def __init__(self, host: str = "node1") -> None:
        self.host = host
        self.seen: list[tuple[str, dict[str, Any], Context]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.raises: list[Exception] = []
        self.on_announce: Callable[[str], None] = lambda topic: None

    def _note(self, method: str, context: Context, **args: Any) -> None:
        self.gate.wait(30)
        self.seen.append((method, args, context))
        if self.raises:
            raise self.raises.pop(0)

    def arguments(self, method: str) -> list[dict[str, Any]]:
        return [args for name, args, _ in list(self.seen) if name == method]

    @command
    def start_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: float | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Note it."""
        self._note("start_instance", context, instance=instance, operation=operation, expires_at=expires_at)
        return Accepted(operation=operation, host=self.host)

    @command
    def resize(self, context: Context, instance: Uuid, flavor: Flavor, count: Small = 1) -> Accepted:
        """Note it: a message with an object in it."""
        self._note("resize", context, instance=instance, flavor=flavor, count=count)
        return Accepted(operation=None, host=self.host)

    @query
    def echo(self, context: Context, text: str = "") -> str:
        """Give it back."""
        self._note("echo", context, text=text)
        return text

    @query
    def get_console_output(self, context: Context, instance: Uuid, tail_bytes: int = 65_536) -> str:
        """Note it."""
        self._note("get_console_output", context, instance=instance, tail_bytes=tail_bytes)
        return "console"

    @query
    def nap(self, context: Context, seconds: Seconds) -> str:
        """Take that long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            threading.Event().wait(left)
        return "awake"

    @query
    def announce(self, context: Context, reply_topic: str) -> None:
        """Answer as the test wants."""
        self.on_announce(reply_topic)

    def not_exposed(self, context: Context) -> str:
        """Answers nobody: it is no message."""
        raise AssertionError("a method that is no message was called")


class Refusals:
    """`on_refused` that writes down, and fails as often as it is told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[Context, str, Any, errors.ComputeError]] = []
        self.failures = 0

    def __call__(self, context: Context, method: str, args: Any, error: errors.ComputeError) -> None:
        if self.failures:
            self.failures -= 1
            raise errors.StoreBusy()
        self.seen.append((context, method, args, error))


DEFAULT = Rpc()


class Host:
    """A server with its notebook, inbox and refusals. Its database outlives it, so that a second one can follow."""

    def __init__(
        self, transport: Any, directory: Path, name: str = "node1", rpc: Rpc = DEFAULT,
        inbox: Callable[[DatabaseInbox], Any] = lambda inbox: inbox,
    ) -> None:  # fmt: skip
        self.name = name
        self.database = Database(directory / "journal.db", [SCHEMA])
        self.inbox = inbox(DatabaseInbox(self.database))
        self.notebook = Notebook(name)
        self.refusals = Refusals()
        self.server = WorkerServer(transport, name, [self.notebook], self.inbox, self.refusals, rpc)

    def open_rows(self) -> list[str]:
        return [row for row, _ in self.inbox.open()]

    def __enter__(self) -> Host:
        self.server.start()
        wait_for(lambda: self.server.connected, what="the server to listen")
        return self

    def __exit__(self, *exc: object) -> None:
        self.notebook.gate.set()
        self.server.stop(5)
        self.database.close()
