"""What a notification looks like, and how one is sent so that its sender knows it arrived.

A notification is oslo.messaging's (envelope 2.0) on topic ``<notification_topic>.<priority>``, priority ``info`` or
``error``. ``event_type`` is ``instance.<operation>.start|progress|waiting|end|error``, ``instance.power_state`` or
``host.state``. ``waiting`` (priority ``error``) says that an operation which may not end by itself (it is past its
COMMIT, or being undone) keeps failing in a step, and why: after five failures, then every ten minutes at most. The
payload is :class:`Payload`, or :class:`HostStatePayload` for ``host.state``.

Sent at least once and in order for one host: a consumer drops what it has seen by ``message_id``, or by
(``host``, ``operation``, ``sequence``): an operation of two hosts is counted on each.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import amqp
import msgspec

from compute_worker.objects import HostState, Object, Progress
from compute_worker.rpc.pipeline import Pipeline

VERSION = "1.0"
"""Version of the payload. The minor part grows with every compatible change."""
HOST_STATE = "host.state"
PRIORITIES = ("INFO", "ERROR")
_SEVERAL = 3
"""Fewer notifications than this are not worth the two round trips that publishing them together may take."""

_NAMESPACE = uuid.UUID("5f0c1d52-6c55-4d3f-9a34-1c8f7d2c5b60")


class Payload(Object, frozen=True, kw_only=True):
    """What happened to an instance."""

    version: str
    host: str
    operation: str | None = None
    """The operation's uuid: the one the command's answer gave. ``None`` outside any operation."""
    sequence: int = 0
    """Counts from 1 within the operation on this host; without one, grows within the host."""
    instance: str | None = None
    kind: str | None = None
    """Name of the command."""
    state: str | None = None
    """The operation's state: ``queued``, ``running``, ``undoing``, ``done``, ``undone`` or ``refused``."""
    phase: str | None = None
    progress: Progress | None = None
    result: dict[str, Any] | None = None
    """Of an operation that is done, what it found or measured, as ``get_operation`` tells it."""
    error: dict[str, Any] | None = None
    """``class``, ``message``, ``details``, ``reschedulable``, ``retry_after``."""
    request_id: str | None = None
    time: float
    """Seconds since the epoch at which it happened, by the host's clock."""


class HostStatePayload(HostState, frozen=True, kw_only=True):
    """The host as :class:`~compute_worker.objects.HostState`, with the payload's version."""

    version: str = VERSION


class Message(NamedTuple):
    """One notification on its way. ``timestamp``: seconds since the epoch."""

    message_id: str
    event_type: str
    priority: str
    payload: dict[str, Any]
    timestamp: float


class Notifier(Protocol):
    """Sends notifications and returns when they arrived, or raises."""

    def send(self, messages: Sequence[Message], arrived: Callable[[int], None]) -> None:
        """Send them in order.

        :param arrived: called with the index of each that arrived, also when others do not.
        :raises Exception: the others may or may not have arrived; send them again with the same ``message_id``.
        """

    def close(self) -> None:
        """Give up the connection."""


class MessagingNotifier:
    """Notifications through oslo.messaging, on a connection of their own.

    ``oslo_messaging.Notifier`` logs what it could not send and returns as if it had been sent (with the payload in the
    log line), so that nothing could be sent again. This one makes the same message and lets the error through; RabbitMQ
    confirms each message. A queue named as the topic is declared, durable where queues are, so that nothing is lost
    while nobody listens.

    :param transport: of ``oslo_messaging.get_notification_transport``; closed by :meth:`close`.
    """

    def __init__(self, transport: Any, host: str, topic: str) -> None:
        self._transport = transport
        self._publisher = f"compute.{host}"
        self._topic = topic
        self._pipeline = Pipeline()

    def send(self, messages: Sequence[Message], arrived: Callable[[int], None]) -> None:
        """Blocks as long as the connection takes to come up, once; a broker that is down raises within seconds.

        One goes through oslo.messaging, which connects and declares its queue; what follows it goes together.
        """
        at = 0
        while at < len(messages):
            self._send_one(messages[at])
            arrived(at)
            at += 1
            if len(messages) - at >= _SEVERAL:
                at += self._send_together(messages[at:], at, arrived)

    def _target(self, message: Message) -> Any:
        import oslo_messaging

        return oslo_messaging.Target(topic=f"{self._topic}.{message.priority.lower()}")

    def _send_one(self, message: Message) -> None:
        self._transport._send_notification(self._target(message), {}, self._body(message), version=2.0, retry=0)

    def _send_together(self, messages: Sequence[Message], at: int, arrived: Callable[[int], None]) -> int:
        """How many of ``messages`` were sent: none unless the connection is RabbitMQ's and has declared their queues.

        :param at: what is added to their indices for ``arrived``.
        """
        driver = self._transport._driver
        with driver._get_connection(retry=0) as context:
            connection = context.connection
            if not isinstance(connection.channel, amqp.Channel):
                return 0
            exchange = driver._get_exchange(self._target(messages[0]))
            ready = []
            for message in messages:
                topic = self._target(message).topic
                if (exchange, topic) not in connection._declared_queues:
                    break
                ready.append((topic, sealed(self._body(message))))
            # The lock keeps the thread that sends heartbeats from reading what is meant for us.
            with connection._connection_lock, connection._transport_socket_timeout(None):
                self._pipeline.publish(connection.channel.connection, exchange, ready, lambda i: arrived(at + i))
            return len(ready)

    def _body(self, message: Message) -> dict[str, Any]:
        # The timestamp as oslo.messaging writes it: UTC, without saying so.
        return {
            "message_id": message.message_id,
            "publisher_id": self._publisher,
            "timestamp": str(datetime.fromtimestamp(message.timestamp, UTC).replace(tzinfo=None)),
            "priority": message.priority,
            "event_type": message.event_type,
            "payload": message.payload,
        }

    def close(self) -> None:
        """Close the connection."""
        self._transport.cleanup()


def sealed(body: dict[str, Any]) -> bytes:
    """A notification as it travels: what oslo.messaging makes of the same."""
    text = msgspec.json.encode({**body, "_unique_id": uuid.uuid4().hex}).decode()
    return msgspec.json.encode({"oslo.version": "2.0", "oslo.message": text})


def message_id_of(journal_id: str, seq: int) -> str:
    """The ``message_id`` of an outbox row: the same each time it is sent, and no other row's."""
    return str(uuid.uuid5(_NAMESPACE, f"{journal_id}/{seq}"))
