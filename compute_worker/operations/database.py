"""One SQLite file per host: journal, store, inbox and outbox in one, so that one commit covers them all.

WAL with ``synchronous=FULL``: a commit is on disk when :meth:`Database.write` returns. Writers that come together share
one commit (group commit): one of them leads and runs everybody's work, each in a savepoint of its own; who comes
meanwhile waits for the next commit, which the first of them leads.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

from compute_worker import errors

R = TypeVar("R")
Tx = sqlite3.Connection
"""What work gets: execute statements on it, never commit."""

_MOST_IN_ONE_COMMIT = 128
_PASSING = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_NOMEM})


class Closed(BaseException):
    """The database was closed under a running operation. Not an :class:`Exception`: nobody may mistake it for a
    failure of a step and undo something."""


class _Work(Generic[R]):
    """``turn`` is released when the work is done, or when it is its writer's turn to lead."""

    __slots__ = ("done", "durable", "error", "func", "result", "turn")

    def __init__(self, func: Callable[[Tx], R], durable: bool) -> None:
        self.func = func
        self.durable = durable
        self.turn = threading.Lock()
        self.turn.acquire()
        self.done = False
        self.result: R | None = None
        self.error: BaseException | None = None


class Database:
    """The file and its two connections, one to write and one to read.

    :param path: made with mode 0600, its directory with 0700.
    :param schemas: ``CREATE TABLE IF NOT EXISTS ...`` scripts of everything that lives in the file.
    :param on_commit: told the seconds each commit took.
    :raises compute_worker.errors.Broken: the file cannot be opened or is not a journal.
    """

    def __init__(self, path: Path, schemas: Iterable[str], on_commit: Callable[[float], None] | None = None) -> None:
        self.path = path
        self._on_commit = on_commit
        self._writer_lock = threading.Lock()
        self._reader_lock = threading.Lock()
        self._queue_lock = threading.Lock()
        self._pending: deque[_Work[Any]] = deque()
        self._led = False
        self._closed = False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            self._writer = self._open()
            self._writer.execute("PRAGMA journal_mode=WAL")
            self._writer.executescript(_META + "".join(schemas))
            self._reader = self._open()
            self._reader.execute("PRAGMA query_only=ON")
        except sqlite3.DatabaseError as exc:
            raise errors.Broken(f"journal {path} cannot be used: {exc}") from exc
        self.journal_id = self._identify()

    def _open(self) -> Tx:
        connection = sqlite3.connect(self.path, timeout=10, check_same_thread=False, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous=FULL")
        # Secrets that leave a row leave the file: SQLite zeroes what it frees (Debian's build does anyway).
        connection.execute("PRAGMA secure_delete=ON")
        return connection

    def _identify(self) -> str:
        def find(tx: Tx) -> str:
            tx.execute("INSERT OR IGNORE INTO meta VALUES ('journal_id', ?)", (str(uuid.uuid4()),))
            row = tx.execute("SELECT value FROM meta WHERE name = 'journal_id'").fetchone()
            return str(row[0])

        return self.write(find)

    def write(self, func: Callable[[Tx], R], *, durable: bool = True) -> R:
        """Run ``func`` in a transaction and return its result once it is on disk. Its exception undoes it alone.

        :param durable: false for what may be lost with the machine's power (never with the process) and does no harm
            then: it is on disk with the next durable write, and its order among the others is kept.
        :raises Closed: the database was closed; whether an unfinished write became durable is not known.
        :raises compute_worker.errors.StoreBusy: the file cannot be written now (no space, locked).
        """
        work = _Work(func, durable)
        with self._queue_lock:
            self._pending.append(work)
            leads, self._led = not self._led, True
        if not leads:
            work.turn.acquire()
        if not work.done:
            self._lead()
        if work.error is not None:
            raise work.error
        return work.result  # type: ignore[return-value]

    def _lead(self) -> None:
        """Commit what is pending, the caller's own work first; then the first of those that came meanwhile leads."""
        with self._queue_lock:
            batch = [self._pending.popleft() for _ in range(min(len(self._pending), _MOST_IN_ONE_COMMIT))]
        try:
            with self._writer_lock:
                self._commit(batch)
        finally:
            with self._queue_lock:
                self._led = bool(self._pending)
                if self._led:
                    self._pending[0].turn.release()
            for work in batch:
                work.done = True
                work.turn.release()

    def _commit(self, batch: list[_Work[Any]]) -> None:
        started = time.perf_counter()
        durable = any(work.durable for work in batch)
        try:
            if self._closed:
                raise Closed
            if not durable:
                self._writer.execute("PRAGMA synchronous=NORMAL")
            self._writer.execute("BEGIN IMMEDIATE")
            for work in batch:
                self._run_in_savepoint(work)
            if self._closed:
                raise Closed
            self._writer.execute("COMMIT")
        except Closed as exc:
            self._fail(batch, exc)
        except sqlite3.Error as exc:
            self._fail(batch, errors.StoreBusy(f"the journal cannot be written: {exc}"))
        finally:
            if not durable and not self._closed:
                self._writer.execute("PRAGMA synchronous=FULL")
        if self._on_commit is not None:
            self._on_commit(time.perf_counter() - started)

    def _run_in_savepoint(self, work: _Work[Any]) -> None:
        self._writer.execute("SAVEPOINT work")
        try:
            work.result = work.func(self._writer)
        except BaseException as exc:  # whatever it is, it belongs to the writer whose work this is
            work.error = _translated(exc)
            self._writer.execute("ROLLBACK TO work")
        self._writer.execute("RELEASE work")

    def _fail(self, batch: list[_Work[Any]], error: BaseException) -> None:
        for work in batch:
            work.error = work.error or error
        if not self._closed and self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def read(self, func: Callable[[Tx], R]) -> R:
        """Run ``func`` on a read-only connection; it sees every commit that returned before.

        :raises Closed: the database was closed.
        """
        with self._reader_lock:
            if self._closed:
                raise Closed
            return func(self._reader)

    def close(self) -> None:
        """End. Work in flight gets :class:`Closed`; what was committed stays."""
        self._closed = True
        with self._writer_lock, self._reader_lock:
            self._writer.close()
            self._reader.close()


def _translated(exc: BaseException) -> BaseException:
    """What a full or failing disk says in the middle of a large transaction, as it would say at its commit."""
    if isinstance(exc, sqlite3.Error) and getattr(exc, "sqlite_errorcode", 0) & 0xFF in _PASSING:
        return errors.StoreBusy(f"the journal cannot be written: {exc}")
    return exc


_META = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sequence (last INTEGER NOT NULL);
INSERT INTO sequence SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM sequence);
"""


def next_seq(tx: Tx) -> int:
    """The next number of this host's change counter: what ``since=SEQ`` queries compare with."""
    row = tx.execute("UPDATE sequence SET last = last + 1 RETURNING last").fetchone()
    return int(row[0])
