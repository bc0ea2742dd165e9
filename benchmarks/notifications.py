"""Reads the workers' notifications as a conductor would, with bare kombu."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import kombu

TOPIC = "compute_notifications"
FINAL = ("end", "error")


class Listener:
    """Calls ``on_payload(event_type, payload)`` for each notification, on a thread of its own.

    It declares the queues as the worker does, so that what was sent before is read too.

    :param quorum: whether they are quorum queues.
    """

    def __init__(self, url: str, on_payload: Callable[[str, dict[str, Any]], None], quorum: bool = False) -> None:
        self._url = url
        self._arguments = {"x-queue-type": "quorum"} if quorum else None
        self._on_payload = on_payload
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notifications", daemon=True)
        self.problem: str | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._listen()
        except Exception as exc:
            self.problem = f"{type(exc).__name__}: {exc}"

    def _listen(self) -> None:
        with kombu.Connection(self._url) as connection:
            channel = connection.channel()
            exchange = kombu.Exchange("compute_worker", type="topic", durable=True)
            queues = [
                kombu.Queue(name, exchange, name, durable=True, queue_arguments=self._arguments)
                for name in (f"{TOPIC}.info", f"{TOPIC}.error")
            ]
            with kombu.Consumer(channel, queues, callbacks=[self._on_message], accept=["json"], prefetch_count=200):
                while not self._stopping.is_set():
                    with contextlib.suppress(socket.timeout):
                        connection.drain_events(timeout=0.2)

    def _on_message(self, body: Any, message: Any) -> None:
        try:
            notification = json.loads(body["oslo.message"])
            self._on_payload(notification["event_type"], notification["payload"])
        except Exception as exc:
            self.problem = self.problem or f"{type(exc).__name__}: {exc}"
        message.ack()


def is_final(event_type: str) -> bool:
    """Whether it is the last of its operation."""
    return event_type.rpartition(".")[2] in FINAL
