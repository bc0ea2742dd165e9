"""Many messages to RabbitMQ with one wait for all their confirmations.

One at a time each message waits for a disk of the broker, and this process wakes up for each confirmation. Published
together they are confirmed together, and no less surely: what is not confirmed is not reported as arrived.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import amqp

CONFIRM_SECONDS = 30.0
_PERSISTENT = 2


class Pipeline:
    """Publishes on a channel of its own of a connection that somebody else keeps alive.

    Not for several threads at once, and the connection must not be read by another thread meanwhile.

    :param timeout: seconds that the broker may take to confirm all.
    """

    def __init__(self, timeout: float = CONFIRM_SECONDS) -> None:
        self._timeout = timeout
        self._connection: Any = None
        self._channel: Any = None
        self._published = 0
        self._waiting: dict[int, int] = {}
        self._refused = False
        self._mandatory = False
        self._arrived: Callable[[int], None] = lambda number: None

    def publish(
        self,
        connection: Any,
        exchange: str,
        messages: Sequence[tuple[str, bytes]],
        arrived: Callable[[int], None],
        mandatory: bool = False,
    ) -> None:
        """Publish (routing key, JSON) in order and return when all are confirmed.

        :param connection: an :class:`amqp.Connection`. It is given up when an answer is missing: a late one must not be
            taken for an answer to later messages.
        :param arrived: called with the index of each message that is confirmed, also when others are not.
        :param mandatory: one that no queue takes has not arrived; without it the broker drops and confirms it.
        :raises amqp.exceptions.MessageNacked: the broker refused the others.
        :raises Exception: of the others it is not known whether they arrived.
        """
        self._arrived, self._refused, self._mandatory = arrived, False, mandatory
        try:
            self._open(connection)
            for index, (key, body) in enumerate(messages):
                self._published += 1
                self._waiting[self._published] = index
                self._channel._basic_publish(
                    self._message(body), exchange=exchange, routing_key=key, mandatory=mandatory
                )
            self._wait()
        except BaseException:
            self._connection = self._channel = None
            with contextlib.suppress(Exception):
                connection.collect()
            raise
        if self._refused:
            raise amqp.exceptions.MessageNacked

    def _open(self, connection: Any) -> None:
        if self._connection is connection:
            return
        self._channel = connection.channel()
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)
        self._connection, self._published = connection, 0
        self._waiting.clear()

    def _message(self, body: bytes) -> Any:
        # What comes back is known by its number.
        number = {"correlation_id": str(self._published)} if self._mandatory else {}
        return self._channel.prepare_message(
            body,
            priority=0,
            content_type="application/json",
            content_encoding="utf-8",
            headers={},
            properties={"delivery_mode": _PERSISTENT, **number},
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + self._timeout
        while self._waiting:
            self._connection.drain_events(timeout=max(0.01, deadline - time.monotonic()))
            if time.monotonic() > deadline and self._waiting:
                raise TimeoutError(f"the broker did not confirm {len(self._waiting)} messages in {self._timeout:g} s")

    def _on_ack(self, tag: int, multiple: bool) -> None:
        for index in self._settled(tag, multiple):
            self._arrived(index)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._refused = True
        self._settled(tag, multiple)

    def _on_return(self, error: Exception, exchange: str, key: str, message: Any) -> None:
        """No queue took it; its confirmation follows."""
        self._waiting.pop(int(message.properties["correlation_id"]), None)

    def _settled(self, tag: int, multiple: bool) -> list[int]:
        tags = [t for t in self._waiting if t <= tag] if multiple else [tag]
        return [index for t in tags if (index := self._waiting.pop(t, None)) is not None]
