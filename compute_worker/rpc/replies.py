"""Answers to calls: those that are there at the same time are published, and confirmed, together.

oslo.messaging publishes each by itself and waits for its confirmation: twice the processor time, and a thread of the
server held meanwhile. What does not arrive from here it sends in its own way: it waits for the caller's queue and for
the broker. A caller that gets an answer twice by that drops the second.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections import deque
from functools import partial
from typing import Any

import amqp
import msgspec
from oslo_messaging._drivers import common

from compute_worker.rpc import transport as transports
from compute_worker.rpc.lanes import Lanes
from compute_worker.rpc.pipeline import Pipeline

LOG = logging.getLogger(__name__)

BATCH = 64
CONFIRM_SECONDS = 5.0
_EXCHANGE = ""
"""The broker's default one, by which answers travel."""


class Replies:
    """Sends answers on a connection and a thread of its own, started with the first.

    If the process dies with an answer that was not sent, its caller asks again and is answered from the journal.

    :param threads: how many answers wait at once for a queue or a broker that is not there.
    """

    def __init__(self, transport: Any, threads: int) -> None:
        self._transport = transport
        self._together = not transports.is_memory(transport)
        self._alone = Lanes(threads, "rpc-answer")
        self._lock = threading.Condition()
        self._waiting: deque[tuple[Any, Any]] = deque()
        self._busy = False
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._pipeline = Pipeline(CONFIRM_SECONDS)
        self._connection: Any = None

    def send(self, incoming: Any, result: Any) -> None:
        """Take the answer to ``incoming`` on its way, and return at once."""
        if not incoming.orig_msg_id:
            return
        if not self._together:
            self.send_alone(incoming, reply=result)
            return
        with self._lock:
            self._waiting.append((incoming, result))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rpc-replies", daemon=True)
                self._thread.start()
            self._lock.notify()

    def send_alone(self, incoming: Any, **answer: Any) -> None:
        """Send ``reply=`` or ``failure=`` as oslo.messaging does, however long that takes."""
        try:
            incoming.reply(**answer)
        except Exception as exc:
            LOG.warning("the answer to message %s could not be sent: %s", incoming.msg_id, exc)

    def stop(self, timeout: float) -> bool:
        """Send what waits and end. Whether all of it was sent within ``timeout`` seconds."""
        with self._lock:
            sent = self._lock.wait_for(lambda: not self._waiting and not self._busy, timeout)
            self._stopped = True
            self._lock.notify()
        return self._alone.stop(timeout) and sent

    def _work(self) -> None:
        while True:
            with self._lock:
                self._busy = False
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    break
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                self._busy = True
            for incoming, result in self._send_together(batch):
                self._alone.submit(None, partial(self.send_alone, incoming, reply=result))
        self._close()

    def _send_together(self, batch: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        """What did not arrive, or of which that is not known."""
        arrived: set[int] = set()
        try:
            connection = self._open()
            sealed = [(incoming.reply_q, _sealed(incoming, result)) for incoming, result in batch]
            # The lock keeps the thread that sends heartbeats from reading what is meant for us.
            with connection._connection_lock, connection._transport_socket_timeout(None):
                channel = connection.channel.connection
                self._pipeline.publish(channel, _EXCHANGE, sealed, arrived.add, connection.direct_mandatory_flag)
        except Exception as exc:
            LOG.info("%d answers go one by one: %s", len(batch) - len(arrived), exc or type(exc).__name__)
            if not isinstance(exc, amqp.exceptions.MessageNacked):
                self._close()
        return [answer for number, answer in enumerate(batch) if number not in arrived]

    def _open(self) -> Any:
        if self._connection is None:
            self._connection = self._transport._driver._connection_pool.create(common.PURPOSE_SEND, retry=0)
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None


def _sealed(incoming: Any, result: Any) -> bytes:
    """An answer as it travels: what oslo.messaging makes of the same."""
    answer = {"result": result, "failure": None, "ending": True, "_msg_id": incoming.msg_id}
    text = msgspec.json.encode({**answer, "_unique_id": uuid.uuid4().hex}).decode()
    return msgspec.json.encode({"oslo.version": "2.0", "oslo.message": text})
