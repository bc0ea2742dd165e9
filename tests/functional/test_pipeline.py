"""Several notifications published together: what the broker takes, refuses or leaves unanswered."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import amqp
import kombu
import oslo_messaging
import pytest
from oslo_config import cfg

from compute_worker.rpc.transport import set_defaults
from compute_worker.telemetry.notifications import Message, MessagingNotifier
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

Made = Callable[[], tuple[MessagingNotifier, str]]


@pytest.fixture
def made(rabbit: Rabbit) -> Iterator[Made]:
    """A notifier with a topic of its own."""
    if rabbit.process() is None:
        rabbit.start()
    cfg.CONF([], project="compute-worker", default_config_files=[])
    set_defaults(cfg.CONF)
    notifiers = []

    def make() -> tuple[MessagingNotifier, str]:
        topic = f"cw_{uuid.uuid4().hex[:8]}"
        transport = oslo_messaging.get_notification_transport(cfg.CONF, url=rabbit.url())
        notifiers.append(MessagingNotifier(transport, "node1", topic))
        return notifiers[-1], topic

    yield make
    for notifier in notifiers:
        notifier.close()


def messages(count: int, priority: str = "INFO") -> list[Message]:
    return [Message(f"m{n}", f"instance.build.{n}", priority, {"n": n, "text": "\u00e9"}, 1.5) for n in range(count)]


def waiting(rabbit: Rabbit, queue: str) -> list[Any]:
    """The messages in a queue, taken out of it, without oslo.messaging."""
    found = []
    with kombu.Connection(rabbit.url().replace("rabbit://", "amqp://")) as connection:
        bound = kombu.Queue(queue, no_declare=True)(connection.default_channel)
        while (message := bound.get(no_ack=True)) is not None:
            found.append(message)
    return found


def test_they_are_as_those_that_go_alone(rabbit: Rabbit, made: Made) -> None:
    """The first goes through oslo.messaging; nothing but its content tells it from the others."""
    notifier, topic = made()
    arrived: list[int] = []
    notifier.send(messages(50), arrived.append)
    assert sorted(arrived) == list(range(50))
    found = waiting(rabbit, f"{topic}.info")
    first, later = found[0], found[1:]
    assert len(later) == 49
    for message in later:
        assert (message.properties, message.content_type, message.content_encoding, message.headers) == (
            first.properties,
            first.content_type,
            first.content_encoding,
            first.headers,
        )
    assert first.properties["delivery_mode"] == 2


def test_a_listener_of_oslo_messaging_gets_them_in_order(rabbit: Rabbit, made: Made) -> None:
    notifier, topic = made()
    got: list[tuple[str, str, Any]] = []

    class Endpoint:
        def info(self, context: Any, publisher: str, event: str, payload: Any, metadata: Any) -> None:
            got.append((event, metadata["timestamp"], payload["text"]))

    receiving = oslo_messaging.get_notification_transport(cfg.CONF, url=rabbit.url())
    target = oslo_messaging.Target(topic=topic)
    listener = oslo_messaging.get_notification_listener(receiving, [target], [Endpoint()], executor="threading")
    listener.start()
    try:
        notifier.send(messages(20), lambda index: None)
        wait_for(lambda: len(got) == 20, what="all at the listener")
    finally:
        listener.stop()
        listener.wait()
        receiving.cleanup()
    assert got == [(f"instance.build.{n}", "1970-01-01 00:00:01.500000", "\u00e9") for n in range(20)]


def test_a_queue_that_was_not_declared_yet_is_not_missed(rabbit: Rabbit, made: Made) -> None:
    notifier, topic = made()
    mixed = [*messages(5), *messages(5, "ERROR"), *messages(5)]
    arrived: list[int] = []
    notifier.send(mixed, arrived.append)
    assert sorted(arrived) == list(range(15))
    assert [len(waiting(rabbit, f"{topic}.{priority}")) for priority in ("info", "error")] == [10, 5]


def test_what_the_broker_refuses_has_not_arrived(rabbit: Rabbit, made: Made) -> None:
    notifier, topic = made()
    queue = f"{topic}.info"
    notifier.send(messages(1), lambda index: None)
    rule = '{"max-length": 4, "overflow": "reject-publish"}'
    rabbit.ctl("set_policy", "-p", rabbit.vhost, topic, f"^{topic}\\.", rule, "--apply-to", "queues")
    try:
        arrived: list[int] = []

        def refused() -> bool:
            """The policy is applied some time after it was accepted."""
            arrived.clear()
            waiting(rabbit, queue)
            try:
                notifier.send(messages(40), arrived.append)
            except amqp.exceptions.MessageNacked:
                return True
            return False

        wait_for(refused, what="the policy to hold")
    finally:
        rabbit.ctl("clear_policy", "-p", rabbit.vhost, topic)
    assert 0 < len(arrived) < 40
    assert len(waiting(rabbit, queue)) == len(arrived), "what arrived is what is there"

    def taken() -> bool:
        try:
            notifier.send(messages(10), lambda index: None)
        except amqp.exceptions.MessageNacked:
            return False
        return True

    wait_for(taken, what="the queue to take all again")


def test_a_broker_that_does_not_answer_confirms_nothing(rabbit: Rabbit, made: Made) -> None:
    """Its late answer to what was given up is not taken for one to what comes after."""
    notifier, topic = made()
    notifier._pipeline._timeout = 0.5
    notifier.send(messages(10), lambda index: None)
    arrived: list[int] = []
    rabbit.freeze()
    try:
        with pytest.raises((TimeoutError, OSError)):
            assert notifier._send_together(messages(20), 0, arrived.append) == 0
    finally:
        rabbit.thaw()
    assert arrived == []
    notifier._pipeline._timeout = 30.0

    def sent() -> bool:
        arrived.clear()
        try:
            notifier.send(messages(20), arrived.append)
        except Exception:
            return False
        return True

    wait_for(sent, deadline=30, what="the connection to come up again")
    assert sorted(arrived) == list(range(20))
    events = [json.loads(found.payload["oslo.message"])["event_type"] for found in waiting(rabbit, f"{topic}.info")]
    assert events[-20:] == [f"instance.build.{n}" for n in range(20)], "behind what the broker took before it froze"
