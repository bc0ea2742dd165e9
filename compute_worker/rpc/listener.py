"""Takes messages off the queue: a cast is acknowledged only after it is in the journal.

oslo.messaging acknowledges before anybody has seen the message; one SIGKILL then loses whatever waits. Here a cast is
committed to the :class:`~compute_worker.messages.Inbox` first. A call needs no such care: it counts from its answer on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from oslo_messaging._drivers import amqpdriver
from oslo_messaging._drivers.common import Timeout

from compute_worker.messages import Inbox
from compute_worker.rpc import wire

LOG = logging.getLogger(__name__)

KEEP_TRYING_SECONDS = 10.0
"""How long a journal that cannot be written holds up the queue before the message goes back to the broker."""

OnCast = Callable[[str, dict[str, Any], bool], None]
"""Called with message id, message, and whether the inbox has it."""


class AcceptingListener(amqpdriver.AMQPListener):  # type: ignore[misc]  # oslo.messaging has no annotations
    """Calls go to :meth:`poll`, casts to ``on_cast``, on the thread that consumes.

    If the process dies before a cast is in the inbox, the broker delivers it again; if it dies after, the inbox has it,
    and the broker's second copy is recognised by its message id.
    """

    message_cls = amqpdriver.AMQPIncomingMessage
    use_cache = True
    incoming: list[Any]

    def __init__(
        self,
        driver: Any,
        connection: Any,
        inbox: Inbox,
        on_cast: OnCast,
        too_large: Callable[[int], bool],
        is_query: Callable[[object], bool],
        stopped: threading.Event,
    ) -> None:
        super().__init__(driver, connection)
        self._inbox = inbox
        self._on_cast = on_cast
        self._too_large = too_large
        self._is_query = is_query
        self._stopped = stopped

    def __call__(self, message: Any) -> None:
        """Take one message. Whatever it holds, this does not raise: the driver would drop it."""
        try:
            if message.get("_msg_id") and message.get("_reply_q"):
                self._take_call(message)
            else:
                self._take_cast(message)
        except Exception:
            LOG.exception("a message that cannot be understood is dropped")
            self._acknowledge(message)

    def poll(self, timeout: float | None = None, batch_size: int = 1, batch_timeout: float | None = None) -> list[Any]:
        """The calls that came; waits up to ``timeout`` seconds for the first message, whatever its kind.

        oslo.messaging's own wakes up after 1, 2, 4, ... ms to acknowledge what other threads handled: about ten times
        for each message of a quiet host. Here every message is acknowledged on this thread, as it comes.
        """
        if not self.incoming and not self._shutdown.is_set():
            with contextlib.suppress(Timeout):
                self.conn.consume(timeout=timeout)
        calls, self.incoming = self.incoming, []
        return calls

    def interrupt(self) -> None:
        """Make :meth:`poll` return soon, and from then on at once. Any thread may call it."""
        self._shutdown.set()
        self.conn.stop_consuming()

    def _take_call(self, message: Any) -> None:
        size = _size(message)
        if self._too_large(size):
            for name, value in wire.shrunk(message, size).items():
                message[name] = value
        if self._acknowledge(message):
            super().__call__(message)

    def _take_cast(self, message: Any) -> None:
        message_id = wire.message_id_of(message)
        if self._is_query(message.get("method")):
            self._acknowledge(message)
            self._on_cast(message_id, dict(message), False)
            return
        size = _size(message)
        body = wire.shrunk(message, size) if self._too_large(size) else dict(message)
        new = self._keep(message_id, body)
        if new is None:
            message.requeue()
            return
        self._acknowledge(message)
        if new:
            self._on_cast(message_id, body, True)
        else:
            LOG.info("message %s was delivered again; the inbox has it", message_id)

    def _keep(self, message_id: str, body: Mapping[str, Any]) -> bool | None:
        """Commit to the inbox: whether it is new there, or ``None`` when the journal cannot be written."""
        data = json.dumps(body).encode()
        deadline, pause = time.monotonic() + KEEP_TRYING_SECONDS, 0.05
        while True:
            try:
                return self._inbox.put(message_id, data)
            except Exception as exc:
                LOG.warning("message %s cannot be journalled, it stays with the broker: %s", message_id, exc)
            if time.monotonic() > deadline or self._stopped.wait(pause):
                return None
            pause = min(pause * 2, 1.0)

    def _acknowledge(self, message: Any) -> bool:
        try:
            message.acknowledge()
        except Exception as exc:
            LOG.warning("a message could not be acknowledged, the broker will deliver it again: %s", exc)
            return False
        return True


def _size(message: Any) -> int:
    body = message._raw_message.body
    return len(body if isinstance(body, bytes) else str(body).encode("utf-8", "replace"))
