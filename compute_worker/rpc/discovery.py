"""Who is there: ``announce`` to everybody, collect the answers on a queue of one's own."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

from oslo_messaging._drivers import common, impl_rabbit

from compute_worker import errors, objects
from compute_worker.objects import HostState
from compute_worker.rpc import transport as transports
from compute_worker.rpc.client import ComputeAPI

LOG = logging.getLogger(__name__)

QUEUE_TTL_SECONDS = 60
POLL_SECONDS = 0.1


def find_hosts(
    transport: Any,
    api: ComputeAPI,
    timeout: float = 2.0,
    exchange: str = "compute_worker",
    enough: Callable[[list[HostState]], bool] = lambda found: False,
) -> list[HostState]:
    """Every host that answers within ``timeout`` seconds, by name; sooner when ``enough`` says so.

    The queue is deleted afterwards; the broker deletes it by itself when this process dies.

    :raises compute_worker.errors.PeerUnavailable: the broker cannot be reached.
    """
    reply_topic = f"hosts.{uuid.uuid4()}"
    found: dict[str, HostState] = {}
    connection = _open(transport)
    try:
        connection.declare_consumer(_consumer(connection, exchange, reply_topic, lambda message: _note(message, found)))
        api.announce(reply_topic)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not enough(list(found.values())):
            _consume(connection, POLL_SECONDS)
    finally:
        _close(connection, reply_topic)
    return [found[host] for host in sorted(found)]


def _open(transport: Any) -> Any:
    try:
        return transports.open_listening(transport)
    except Exception as exc:
        raise errors.PeerUnavailable(f"no host can be asked: no broker ({exc})", host="*") from None


def _consumer(connection: Any, exchange: str, topic: str, callback: Callable[[Any], None]) -> Any:
    return impl_rabbit.Consumer(
        exchange_name=exchange,
        queue_name=topic,
        routing_key=topic,
        type="topic",
        durable=connection.durable,
        exchange_auto_delete=connection.amqp_auto_delete,
        queue_auto_delete=False,
        callback=callback,
        rabbit_queue_ttl=QUEUE_TTL_SECONDS,
    )


def _consume(connection: Any, timeout: float) -> None:
    try:
        connection.consume(timeout=timeout)
    except common.Timeout:
        return


def _note(message: Any, found: dict[str, HostState]) -> None:
    message.acknowledge()
    if message.get("method") != "host_announced" or not isinstance(message.get("args"), dict):
        return
    try:
        state: HostState = objects.decode(message["args"].get("state"), HostState, "host_announced")
    except errors.InvalidCommand:
        return
    found[state.host] = state


def _close(connection: Any, queue: str) -> None:
    try:
        connection.channel.queue_delete(queue)
        connection.close()
    except Exception as exc:
        LOG.debug("queue %s is left to its time limit: %s", queue, exc)
