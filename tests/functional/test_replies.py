"""Answers that are published together: all arrive, also where a queue, a connection or the whole broker is missing."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import kombu
import pytest
from oslo_messaging._drivers import amqpdriver

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.replies import Replies
from tests.lab.rabbit import Rabbit
from tests.rpc.hosts import UUID, Host
from tests.waiting import wait_for

pytestmark = pytest.mark.functional


class Caller:
    """Who asked, and reads its queue without oslo.messaging."""

    def __init__(self, rabbit: Rabbit, transport: Any) -> None:
        self.queue = f"reply_{uuid.uuid4().hex[:8]}"
        self._rabbit = rabbit
        self._listener = amqpdriver.AMQPListener(transport._driver, None)
        self._obsolete = amqpdriver.ObsoleteReplyQueuesCache()

    def ask(self, number: int) -> Any:
        """A message of its own that waits for an answer."""
        message_id = f"m{number}"
        return amqpdriver.AMQPIncomingMessage(
            self._listener, {}, {}, None, message_id, self.queue, None, self._obsolete, None
        )

    def has_queue(self) -> None:
        with self._connection() as connection:
            kombu.Queue(self.queue, durable=False, auto_delete=False)(connection.default_channel).declare()

    def answers(self) -> list[Any]:
        """What came, taken out of the queue."""
        found = []
        with self._connection() as connection:
            bound = kombu.Queue(self.queue, no_declare=True)(connection.default_channel)
            while (message := bound.get(no_ack=True)) is not None:
                found.append(message)
        return found

    def _connection(self) -> kombu.Connection:
        return kombu.Connection(self._rabbit.url().replace("rabbit://", "amqp://"))


@pytest.fixture
def caller(rabbit: Rabbit, transport: Any) -> Caller:
    return Caller(rabbit, transport)


@pytest.fixture
def replies(transport: Any) -> Iterator[Replies]:
    made = Replies(transport, 4)
    yield made
    made.stop(10)


@pytest.fixture
def alone(replies: Replies, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages whose answers oslo.messaging sent."""
    noted: list[str] = []
    real: Callable[..., None] = replies.send_alone

    def note(incoming: Any, **answer: Any) -> None:
        noted.append(incoming.msg_id)
        real(incoming, **answer)

    monkeypatch.setattr(replies, "send_alone", note)
    return noted


def told(messages: list[Any]) -> dict[str, Any]:
    bodies = [json.loads(json.loads(message.body)["oslo.message"]) for message in messages]
    return {body["_msg_id"]: body["result"] for body in bodies}


def test_they_are_as_those_that_go_alone(caller: Caller, replies: Replies, alone: list[str]) -> None:
    caller.has_queue()
    for number in range(200):
        replies.send(caller.ask(number), {"n": number, "text": "\u00e9"})
    assert replies.stop(10)
    together = caller.answers()
    assert told(together) == {f"m{n}": {"n": n, "text": "\u00e9"} for n in range(200)}
    assert alone == []
    replies.send_alone(caller.ask(7), reply=None)
    (bare,) = caller.answers()
    one = together[0]
    assert (one.content_type, one.content_encoding, one.headers) == (
        bare.content_type, bare.content_encoding, bare.headers,
    )  # fmt: skip
    assert json.loads(one.body).keys() == json.loads(bare.body).keys()
    inner = [json.loads(json.loads(message.body)["oslo.message"]) for message in (one, bare)]
    assert inner[0].keys() == inner[1].keys()


def test_a_caller_without_a_queue_delays_nobody(
    rabbit: Rabbit, transport: Any, caller: Caller, replies: Replies, alone: list[str]
) -> None:
    """Its answer is tried again until it has one."""
    absent = Caller(rabbit, transport)
    caller.has_queue()
    replies.send(absent.ask(1), "late")
    for number in range(10):
        replies.send(caller.ask(number), number)
    found: dict[str, Any] = {}
    wait_for(lambda: found.update(told(caller.answers())) or len(found) == 10, 10, "the other answers")
    wait_for(lambda: alone == ["m1"], 10, "the answer to go its own way")
    absent.has_queue()
    wait_for(lambda: told(absent.answers()) == {"m1": "late"}, 10, "the late answer")


def test_answers_outlive_their_connection(caller: Caller, replies: Replies, alone: list[str]) -> None:
    caller.has_queue()
    replies.send(caller.ask(1), 1)
    wait_for(lambda: told(caller.answers()) == {"m1": 1}, 10, "the first answer")
    replies._connection.channel.connection.transport.sock.shutdown(2)
    replies.send(caller.ask(2), 2)
    wait_for(lambda: told(caller.answers()) == {"m2": 2}, 20, "the second answer")
    assert alone == ["m2"]
    replies.send(caller.ask(3), 3)
    wait_for(lambda: told(caller.answers()) == {"m3": 3}, 20, "the third answer")
    assert alone == ["m2"], "a new connection carries the next"


def test_a_broker_that_takes_its_time_gets_them_again(
    rabbit: Rabbit, caller: Caller, replies: Replies, alone: list[str]
) -> None:
    """What was not confirmed is sent by oslo.messaging: twice is better than not at all."""
    caller.has_queue()
    replies.send(caller.ask(1), 1)
    wait_for(lambda: told(caller.answers()) == {"m1": 1}, 10, "the first answer")
    replies._pipeline._timeout = 0.5
    rabbit.freeze()
    try:
        replies.send(caller.ask(2), 2)
        wait_for(lambda: alone == ["m2"], 10, "the answer to go its own way")
    finally:
        rabbit.thaw()
    wait_for(lambda: told(caller.answers()) == {"m2": 2}, 20, "the answer")


def test_calls_from_many_threads_are_answered(host: Host, api: ComputeAPI, name: str) -> None:
    """Each caller gets its own answer."""
    with ThreadPoolExecutor(24) as pool:
        uuids = [UUID.format(n) for n in range(400)]
        asked = [pool.submit(api.start_instance, each, host=name, operation=each) for each in uuids]
        assert [str(one.result().operation) for one in asked] == uuids
    assert [t.name for t in threading.enumerate()].count("rpc-replies") <= 1
