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
from datetime import UTC, datetime
from typing import Any, Protocol

from compute_worker.objects import HostState, Object, Progress

VERSION = "1.0"
"""Version of the payload. The minor part grows with every compatible change."""
HOST_STATE = "host.state"
PRIORITIES = ("INFO", "ERROR")

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
    error: dict[str, Any] | None = None
    """``class``, ``message``, ``details``, ``reschedulable``, ``retry_after``."""
    request_id: str | None = None
    time: float
    """Seconds since the epoch at which it happened, by the host's clock."""


class HostStatePayload(HostState, frozen=True, kw_only=True):
    """The host as :class:`~compute_worker.objects.HostState`, with the payload's version."""

    version: str = VERSION


class Notifier(Protocol):
    """Sends one notification and returns when it arrived, or raises."""

    def send(self, message_id: str, event_type: str, priority: str, payload: dict[str, Any], timestamp: float) -> None:
        """:param timestamp: seconds since the epoch.

        :raises Exception: it may or may not have arrived; send it again with the same ``message_id``.
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

    def send(self, message_id: str, event_type: str, priority: str, payload: dict[str, Any], timestamp: float) -> None:
        """Blocks as long as the connection takes to come up, once; a broker that is down raises within seconds."""
        import oslo_messaging

        # The timestamp as oslo.messaging writes it: UTC, without saying so.
        message = {
            "message_id": message_id,
            "publisher_id": self._publisher,
            "timestamp": str(datetime.fromtimestamp(timestamp, UTC).replace(tzinfo=None)),
            "priority": priority,
            "event_type": event_type,
            "payload": payload,
        }
        target = oslo_messaging.Target(topic=f"{self._topic}.{priority.lower()}")
        self._transport._send_notification(target, {}, message, version=2.0, retry=0)

    def close(self) -> None:
        """Close the connection."""
        self._transport.cleanup()


def message_id_of(journal_id: str, seq: int) -> str:
    """The ``message_id`` of an outbox row: the same each time it is sent, and no other row's."""
    return str(uuid.uuid5(_NAMESPACE, f"{journal_id}/{seq}"))
