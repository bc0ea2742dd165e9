"""Operations as the manager uses them: accept, cancel, look up. Accepting is one transaction and calls no peer."""

from __future__ import annotations

import hashlib
import logging
import time
import uuid as uuid_module
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from compute_worker import errors, objects
from compute_worker.messages import Context
from compute_worker.operations import inbox, journal
from compute_worker.operations.database import Database, Tx
from compute_worker.operations.executor import Executor, Observer
from compute_worker.operations.journal import Entry
from compute_worker.operations.kinds import Kind
from compute_worker.operations.outbox import Outbox
from compute_worker.operations.run import Run
from compute_worker.operations.runner import Runner
from compute_worker.states import OperationState

LOG = logging.getLogger(__name__)

MAX_EXPIRY = 86_400.0
"""Seconds: how far ahead ``expires_at`` may be (``protocol.md`` 4: keys outlive it)."""
_QUIET = 2.0
"""Seconds an operation runs before its progress is worth a notification."""


@dataclass(frozen=True)
class Command:
    """What asks for an operation.

    :param args: plain JSON: what the steps need after a restart.
    :param message: its message, where that has several kinds (a hard reboot): one key for all of them.
    :param operation: the caller's uuid; without it the key is derived from the message's own id.
    :param chain: whose lock it takes (a migration's uuid); its own otherwise.
    :param attempt: of a move: a later one is another command, with the same ``operation``.
    :param expires_at: seconds since the epoch after which it must not begin.
    :param check_only: everything is checked and nothing written.
    """

    kind: str
    context: Context
    instance: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    operation: str | None = None
    chain: str | None = None
    attempt: int = 1
    expires_at: float | None = None
    check_only: bool = False


class _CheckedOnly(Exception):
    """Carries nothing: rolls back a transaction that was only tried."""


Admit = Callable[[Tx], bool]
"""Checks and writes what becomes true by accepting. True: there is nothing to run, the operation is done already."""


class Operations:
    """Durable operations of one host.

    :param limits: how many operations of each class run at once.
    :param max_queued: a command beyond is refused with ``retry_after``.
    :param progress_interval: seconds between two progress notifications of one operation.
    """

    def __init__(
        self,
        database: Database,
        host: str,
        kinds: Mapping[str, Kind],
        limits: Mapping[str, int],
        *,
        max_queued: int = 20_000,
        step_attempts: int = 5,
        progress_interval: float = 5.0,
        key_retention: float = 90_000.0,
        observer: Observer | None = None,
        on_end: Callable[[str, str | None, str, float], None] | None = None,
    ) -> None:
        self.database = database
        self.host = host
        self.outbox = Outbox(database, host)
        self.inbox = inbox.DatabaseInbox(database)
        self._kinds = kinds
        self._max_queued = max_queued
        self._progress_interval = progress_interval
        self._key_retention = key_retention
        extra = {} if observer is None else {"observer": observer}
        self._executor = Executor(database, self.outbox, kinds, step_attempts, **extra)
        self._runner = Runner(database, self._executor, kinds, limits, self._reported, on_end)

    def start(self) -> int:
        """Go on with what the journal holds. Returns how many operations that were."""
        return self._runner.start()

    def stop(self, timeout: float) -> bool:
        """Leave the rest to the journal; see :meth:`Runner.stop`."""
        return self._runner.stop(timeout)

    # --- accept -------------------------------------------------------------------------------------------------

    def accept(self, command: Command, admit: Admit) -> objects.Accepted:
        """Write the operation, what ``admit`` writes, and its first notification: one commit. Then it will happen.

        The same command again is answered with the first's operation.

        :raises Refused: and nothing is written; also whatever ``admit`` raises.
        """
        # Sorted, so that the same arguments are the same text; made here, where it holds up nobody's commit.
        args = msgspec.json.encode(command.args, order="sorted")
        try:
            entry, repeated, preempted = self.database.write(lambda tx: self._accept(tx, command, args, admit))
        except _CheckedOnly:
            return objects.Accepted(operation=None, host=self.host)
        if not repeated:
            self.outbox.ring()
            for row in preempted:
                self._runner.cancel(row, preempted=True)
        if not entry.state.final:
            self._runner.submit(entry)
        return objects.Accepted(operation=entry.uuid, host=self.host, state=entry.state, repeated=repeated)

    def _accept(self, tx: Tx, command: Command, args: bytes, admit: Admit) -> tuple[Entry, bool, list[int]]:
        kind = self._kinds[command.kind]
        key, derived = _key(command)
        digest = hashlib.sha256(args).hexdigest()
        if command.context.inbox is not None:
            inbox.discard(tx, command.context.inbox)
        known = self._known(tx, command, key, digest)
        if known is not None:
            if command.check_only:
                raise _CheckedOnly
            return known, True, []
        _check_expiry(command)
        uuid = command.operation or str(uuid_module.uuid4())
        self._check_room(kind)
        preempted = self._check_lock(tx, command, kind, uuid)
        settled = admit(tx)
        if command.check_only:
            raise _CheckedOnly
        for row in preempted:
            journal.update(tx, row, cancel_requested=1, preempted=1)
        state = OperationState.DONE if settled else OperationState.QUEUED
        values = {
            "key": key,
            "derived_key": derived,
            "digest": digest,
            "uuid": uuid,
            "chain": command.chain or uuid,
            "kind": kind.name,
            "instance": command.instance,
            "args": args.decode(),
            "state": state,
            "committed": kind.committed_at_accept or settled,
            "phase": state.value,
            "request_id": command.context.request_id,
        }
        row = journal.insert(tx, values)
        body = {"instance": command.instance, "kind": kind.name, "state": state.value}
        self.outbox.add(tx, f"instance.{kind.event}.start", body, operation_row=row)
        if settled:
            self.outbox.add(tx, f"instance.{kind.event}.end", body, operation_row=row)
        return journal.by_id(tx, row), False, preempted

    def _known(self, tx: Tx, command: Command, key: str, digest: str) -> Entry | None:
        """The operation that this command is a repetition of."""
        entry = journal.by_key(tx, key)
        if entry is None:
            names = (f"operation/{command.operation}", f"key/{key}") if command.operation else ()
            outcome = next((told for name in names if (told := journal.tombstone_of(tx, name)) is not None), None)
            if outcome is not None:
                raise errors.OperationRefusedBefore(operation=command.operation, outcome=outcome)
            return None
        if entry.derived_key and entry.state is OperationState.UNDONE:
            journal.release_key(tx, entry)
            return None
        if entry.digest != digest:
            raise errors.OperationConflict(key=key, operation=entry.uuid)
        return entry

    def _check_room(self, kind: Kind) -> None:
        waiting, running = self._runner.counts()
        # What is done by accepting it waits in no queue, and others wait for it: a hand-over, a cancel.
        if waiting >= self._max_queued and not kind.preempts and kind.limit != "immediate":
            raise errors.HostFull(
                host=self.host, running=sum(running.values()), limit=self._max_queued, queued=waiting
            )

    @staticmethod
    def _check_lock(tx: Tx, command: Command, kind: Kind, uuid: str) -> list[int]:
        """Rows of operations that this one preempts; who holds the instance otherwise is in the error."""
        if command.instance is None or not kind.locks:
            return []
        holders = [e for e in journal.open_entries(tx, command.instance) if e.chain != (command.chain or uuid)]
        if not holders:
            return []
        if not kind.preempts:
            first = holders[0]
            raise errors.InstanceBusy(
                instance=command.instance, operation=first.uuid, kind=first.kind, phase=first.phase
            )
        return [e.id for e in holders if e.kind != kind.name]

    def refuse(
        self,
        context: Context,
        method: str,
        instance: str | None,
        error: errors.ComputeError,
        operation: str | None = None,
    ) -> None:
        """Record that a cast was refused: nobody waits for the answer, so it is notified. Its inbox row goes too.

        The record does not use up the command's key: the same command may be sent again. A message that the broker
        delivers again is recorded once.

        :param instance: the uuid it was about, if that is one.
        :param operation: the caller's uuid for it, if that is one.
        """

        def record(tx: Tx) -> None:
            if context.inbox is not None:
                inbox.discard(tx, context.inbox)
            said = error.to_dict()
            about = (operation or str(uuid_module.uuid4()), method, instance, context.request_id)
            row = journal.insert_refused(tx, context.message_id, *about, said)
            if row is None:
                return
            body = {
                "instance": instance,
                "kind": method,
                "state": OperationState.REFUSED.value,
                "error": said,
                "request_id": context.request_id,
            }
            self.outbox.add(tx, f"instance.{self._event(method)}.error", body, operation_row=row, priority="ERROR")

        self.database.write(record)
        self.outbox.ring()

    def _event(self, method: str) -> str:
        return self._kinds[method].event if method in self._kinds else "command"

    # --- look and cancel ----------------------------------------------------------------------------------------

    def cancel(self, tx: Tx, uuid: str) -> list[int]:
        """Within ``tx``: write that the operation shall end. One that was never heard of is refused when it comes.

        Returns the rows to hand to :meth:`interrupt` after the commit.

        :raises InvalidState: it is past its COMMIT.
        """
        entry = journal.by_uuid(tx, uuid)
        if entry is None or entry.state is OperationState.REFUSED:
            journal.tombstone(tx, f"operation/{uuid}", "cancelled", time.time() + MAX_EXPIRY + self._key_retention)
            return []
        if entry.state.final or entry.state is OperationState.UNDOING:
            return []
        if entry.committed:
            raise errors.InvalidState(
                f"operation {uuid} ({entry.kind}) is past its point of no return ({entry.phase}): it will be finished"
            )
        journal.update(tx, entry.id, cancel_requested=1)
        return [entry.id]

    def settle(
        self, message: str, instance: str, operation: str, attempt: int, revoke: bool
    ) -> objects.OperationAnswer:
        """What became of a peer's command. One that never came is refused from now on (``protocol.md`` 7).

        :param revoke: let it end if it is not past its COMMIT; what became of it is told by asking again.
        """
        key = key_of(message, instance, operation, attempt)
        rows: list[int] = []

        def look(tx: Tx) -> objects.OperationAnswer:
            entry = journal.by_key(tx, key)
            if entry is None and journal.tombstone_of(tx, f"key/{key}") == journal.COMMITTED:
                done = OperationState.DONE
                return objects.OperationAnswer(
                    known=True, state=done, committed=True, phase=done.value, journal_id=self.database.journal_id
                )
            if entry is None:
                journal.tombstone(tx, f"key/{key}", "revoked", time.time() + MAX_EXPIRY + self._key_retention)
                return objects.OperationAnswer(known=False, journal_id=self.database.journal_id)
            ends = entry.committed or entry.state.final or entry.state is OperationState.UNDOING
            error = entry.error
            if entry.cancel_requested and not ends:
                error = errors.Cancelled(f"operation {operation} was cancelled").to_dict()
            if revoke and not ends and not entry.cancel_requested:
                journal.update(tx, entry.id, cancel_requested=1)
                rows.append(entry.id)
            return objects.OperationAnswer(
                known=True,
                state=entry.state,
                committed=entry.committed,
                phase=entry.phase,
                error=error,
                journal_id=self.database.journal_id,
            )

        answer = self.database.write(look)
        self.interrupt(rows)
        return answer

    def interrupt(self, rows: list[int]) -> None:
        """Make operations that :meth:`cancel` wrote down leave now."""
        for row in rows:
            self._runner.cancel(row)

    def get(self, uuid: str, wait: float = 0) -> objects.Operation:
        """The operation with its steps and progress; with ``wait``, its outcome if it ends within that many seconds.

        :raises OperationNotFound: this host never accepted it.
        """
        entry = self.database.read(lambda tx: journal.by_uuid(tx, uuid))
        if entry is None:
            raise errors.OperationNotFound(operation=uuid)
        if wait and not entry.state.final:
            row = entry.id
            self.wait(lambda: self.database.read(lambda tx: journal.by_id(tx, row)).state.final, wait)

        def look(tx: Tx) -> objects.Operation:
            return journal.view(
                journal.by_id(tx, entry.id), journal.steps_of(tx, entry.id), self.host, self.database.journal_id
            )

        return self._runner.live(self.database.read(look), entry.id)

    def wait(self, until: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``until()``, looked at when an operation ends or enters another phase; false when ``timeout``
        seconds are over."""
        return self._runner.wait(until, timeout)

    def list(self, since: int | None, instance: str | None, open_only: bool) -> list[objects.Operation]:
        """Operations without their steps, in order of change after ``since``; at most 1,000 at once."""

        def look(tx: Tx) -> list[Entry]:
            return journal.changed_since(tx, since or 0, instance, open_only=open_only)

        entries = self.database.read(look)
        return [self._runner.live(journal.view(e, [], self.host, self.database.journal_id), e.id) for e in entries]

    def counts(self) -> tuple[int, dict[str, int]]:
        """How many operations wait, and how many run by class."""
        return self._runner.counts()

    def progress_of(self, kind: str) -> Sequence[tuple[str | None, objects.Progress]]:
        """See :meth:`Runner.progress_of`."""
        return self._runner.progress_of(kind)

    def wake(self, instance: str) -> None:
        """Make what waits for something about ``instance`` look again; everything, where that is empty."""
        self._runner.wake(instance)

    def prune(self) -> int:
        """Forget operations that ended longer ago than any repetition of their command can come."""
        before = time.time() - MAX_EXPIRY - self._key_retention
        remembered = [kind.name for kind in self._kinds.values() if kind.takes_over]
        return self.database.write(lambda tx: journal.prune(tx, before, remembered))

    def _reported(self, run: Run, new_phase: bool) -> None:
        now = time.time()
        if run.progress is None or now - run.created_at < _QUIET:
            return
        if not new_phase and now - run.notified_at < self._progress_interval:
            return
        run.notified_at = now
        body = {
            "instance": run.instance,
            "kind": run.kind,
            "state": OperationState.RUNNING.value,
            "phase": run.progress.phase,
            "progress": objects.encode(run.progress),
        }
        event = f"instance.{self._kinds[run.kind].event}.progress"
        try:
            self.database.write(lambda tx: self.outbox.add(tx, event, body, operation_row=run.id))
        except errors.StoreBusy as exc:
            # The step that reports does its work all the same; the next report tells more.
            LOG.debug("progress of operation %s is not notified: %s", run.uuid, exc)
            return
        self.outbox.ring()


def _key(command: Command) -> tuple[str, bool]:
    """The command's key, and whether it was derived (``protocol.md`` 5)."""
    message = command.message or command.kind
    if command.operation is not None:
        return key_of(message, command.instance, command.operation, command.attempt), False
    return f"{command.instance}/{message}/{command.context.message_id}", True


def key_of(message: str, instance: str | None, operation: str, attempt: int = 1) -> str:
    """The key of a command whose caller named its operation."""
    again = f"#{attempt}" if attempt > 1 else ""
    return f"{instance}/{message}/{operation}{again}"


def _check_expiry(command: Command) -> None:
    if command.expires_at is None:
        return
    left = command.expires_at - time.time()
    if left < 0:
        raise errors.CommandExpired(seconds=-left)
    if left > MAX_EXPIRY + 60:
        raise errors.InvalidCommand(method=command.kind, problem="expires_at is more than 24 h ahead")
