"""The thread that carries the outbox to the broker: in order, at least once, for as long as it takes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from compute_worker.objects import HostState
from compute_worker.telemetry.notifications import HOST_STATE, VERSION, Message, Notifier, message_id_of

LOG = logging.getLogger(__name__)

BATCH = 64
LONGEST_BACKOFF = 5.0
_LOOK = 5.0
GATHER_SECONDS = 0.03
"""How long the first of several notifications waits for the others. The answer to the command that caused it goes out
meanwhile, undisturbed, and a busy host reads and clears its outbox 30 times a second instead of once for each."""


class Row(Protocol):
    """A notification that is still to be sent."""

    @property
    def seq(self) -> int:
        """Its place in the outbox."""

    @property
    def event_type(self) -> str:
        """``instance.build.start``, ..."""

    @property
    def priority(self) -> str:
        """``INFO`` or ``ERROR``."""

    @property
    def payload(self) -> dict[str, Any]:
        """All of it, with version, host, operation and sequence."""

    @property
    def created_at(self) -> float:
        """Seconds since the epoch."""


class Outbox(Protocol):
    """Where the rows are; :class:`compute_worker.operations.outbox.Outbox` is one."""

    def peek(self, limit: int) -> Sequence[Row]:
        """The oldest rows."""

    def delete(self, seqs: Sequence[int]) -> None:
        """Forget rows that were sent."""

    def wait(self, timeout: float) -> bool:
        """Wait for :meth:`ring`, at most ``timeout`` seconds."""

    def ring(self) -> None:
        """Wake who waits."""


class OutboxSender:
    """Sends each row and deletes it after the broker has confirmed it.

    If the process dies between the two, the row is sent again after the restart, with the same ``message_id``. While
    the broker is down rows stay where they are and the first is tried again after 0.5 to 5 seconds.

    :param journal_id: makes message ids unique over hosts and over lost journals.
    :param host_state: the host's state; sent every ``host_state_interval`` seconds, never stored: a stale one is
        worth nothing, so that it is left out while the broker is down.
    :param on_sent: told of every notification that arrived, by event type.
    """

    def __init__(
        self,
        outbox: Outbox,
        notifier: Notifier,
        journal_id: str,
        *,
        host_state: Callable[[], HostState] | None = None,
        host_state_interval: float = 60.0,
        on_sent: Callable[[str], None] | None = None,
        first_backoff: float = 0.5,
    ) -> None:
        self._outbox = outbox
        self._notifier = notifier
        self._journal_id = journal_id
        self._host_state = host_state
        self._interval = host_state_interval
        self._on_sent = on_sent
        self._first_backoff = first_backoff
        self._stopping = threading.Event()
        self._host_state_due = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="notifications", daemon=True)
        self._failing: str | None = None

    @property
    def failing(self) -> str | None:
        """Why nothing can be sent at the moment; ``None``: the last attempt was good, or there was none."""
        return self._failing

    def start(self) -> None:
        """Begin; what an earlier process left is sent first."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> bool:
        """End after the notifications that are being sent. Returns whether it ended in ``timeout`` seconds.

        What is left in the outbox is sent after the next start.
        """
        self._stopping.set()
        self._outbox.ring()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        ended = not self._thread.is_alive()
        if ended:
            self._notifier.close()
        return ended

    def _run(self) -> None:
        backoff = self._first_backoff
        while not self._stopping.is_set():
            try:
                self._send_host_state()
                more = self._send_rows()
            except Exception as exc:
                self._tell(str(exc) or type(exc).__name__)
                self._stopping.wait(backoff)
                backoff = min(backoff * 2, LONGEST_BACKOFF)
                continue
            except BaseException as exc:
                # The journal was closed: this worker ends, and the rows are the next one's.
                LOG.debug("no more notifications: %s", type(exc).__name__)
                return
            backoff = self._first_backoff
            if not more and not self._stopping.is_set():
                self._outbox.wait(self._idle_seconds())
                self._stopping.wait(GATHER_SECONDS)

    def _send_rows(self) -> bool:
        """Whether there may be more. Rows that arrived are deleted also when a later one fails."""
        rows = self._outbox.peek(BATCH)
        sent: list[int] = []

        def arrived(index: int) -> None:
            self._told(rows[index].event_type)
            sent.append(rows[index].seq)

        try:
            self._notifier.send([self._message(row) for row in rows], arrived)
        finally:
            if sent:
                self._outbox.delete(sent)
        return len(rows) == BATCH

    def _message(self, row: Row) -> Message:
        message_id = message_id_of(self._journal_id, row.seq)
        return Message(message_id, row.event_type, row.priority, row.payload, row.created_at)

    def _send_host_state(self) -> None:
        if self._host_state is None or time.monotonic() < self._host_state_due:
            return
        due = time.monotonic() + self._interval
        now = time.time()
        try:
            payload = {"version": VERSION, **msgspec.to_builtins(self._host_state())}
        except Exception:
            LOG.exception("the state of this host cannot be told")
            self._host_state_due = due
            return
        message = Message(message_id_of(self._journal_id, time.time_ns()), HOST_STATE, "INFO", payload, now)
        self._notifier.send([message], lambda index: self._told(HOST_STATE))
        # Only now: until one has arrived the next attempt makes a fresh one, and is what finds that the broker is back.
        self._host_state_due = due

    def _told(self, event_type: str) -> None:
        self._tell(None)
        if self._on_sent is not None:
            self._on_sent(event_type)

    def _idle_seconds(self) -> float:
        if self._host_state is None:
            return _LOOK
        return max(0.05, min(_LOOK, self._host_state_due - time.monotonic()))

    def _tell(self, failing: str | None) -> None:
        """Log a change once, not every attempt."""
        if failing is not None and self._failing is None:
            LOG.warning("notifications cannot be sent and wait in the outbox: %s", failing)
        elif failing is None and self._failing is not None:
            LOG.info("notifications are sent again")
        self._failing = failing
