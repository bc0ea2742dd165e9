"""The outbox reaches the broker in order, at least once, whatever fails between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from oslo_config import cfg

from compute_worker.objects import Capacity, HostState
from compute_worker.operations.database import Database
from compute_worker.operations.outbox import Outbox
from compute_worker.operations.schema import SCHEMA
from compute_worker.telemetry.notifications import (
    HostStatePayload,
    Message,
    MessagingNotifier,
    Payload,
    message_id_of,
    sealed,
)
from compute_worker.telemetry.sender import BATCH, OutboxSender
from tests.waiting import wait_for

INSTANCE = "7f0c1d52-6c55-4d3f-9a34-1c8f7d2c5b60"


@dataclass
class Recorder:
    """A broker that says no when it is told to, before or after it took the message."""

    fail: Callable[[int], str | None] = lambda attempt: None
    sent: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    attempts: int = 0
    closed: bool = False

    def send(self, messages: Sequence[Message], arrived: Callable[[int], None]) -> None:
        for index, message in enumerate(messages):
            self.attempts += 1
            how = self.fail(self.attempts)
            if how == "before":
                raise ConnectionError("broker is down")
            self.sent.append(message[:4])
            if how == "after":
                raise TimeoutError("no confirmation")
            arrived(index)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    database = Database(tmp_path / "journal.sqlite", [SCHEMA])
    yield Outbox(database, "node1")
    database.close()


def add(outbox: Outbox, names: Sequence[str]) -> None:
    for name in names:
        outbox._database.write(lambda tx, name=name: outbox.add(tx, name, {"instance": INSTANCE}))
    outbox.ring()


@pytest.fixture
def running() -> Iterator[Callable[..., OutboxSender]]:
    senders: list[OutboxSender] = []

    def make(*args: Any, **kwargs: Any) -> OutboxSender:
        senders.append(OutboxSender(*args, first_backoff=0.01, **kwargs))
        senders[-1].start()
        return senders[-1]

    yield make
    for sender in senders:
        assert sender.stop()


def host_state() -> HostState:
    some = Capacity(total=4, usable=4)
    return HostState(host="node1", vcpus=some, memory_mb=some, disk_gb=some)


def test_rows_go_in_order_and_leave_the_outbox(outbox: Outbox, running: Callable[..., OutboxSender]) -> None:
    names = [f"instance.build.{n}" for n in range(BATCH * 2 + 3)]
    add(outbox, names[:5])
    told: list[str] = []
    broker = Recorder()
    running(outbox, broker, "j", on_sent=told.append)
    add(outbox, names[5:])
    wait_for(lambda: outbox.depth() == 0, what="the outbox to be empty")
    assert [event for _, event, _, _ in broker.sent] == names == told


def test_a_row_that_comes_later_is_sent_at_once(outbox: Outbox, running: Callable[..., OutboxSender]) -> None:
    broker = Recorder()
    running(outbox, broker, "j")
    add(outbox, ["instance.build.start"])
    wait_for(lambda: broker.sent, deadline=1, what="the notification, long before the next look")


@pytest.mark.parametrize("how", ["before", "after"])
def test_failures_keep_the_order_and_the_message_id(
    outbox: Outbox, running: Callable[..., OutboxSender], how: str
) -> None:
    names = [f"instance.build.{n}" for n in range(6)]
    add(outbox, names)
    broker = Recorder(fail=lambda attempt: how if attempt in (1, 2, 4) else None)
    sender = running(outbox, broker, "j")
    wait_for(lambda: outbox.depth() == 0, what="the outbox to be empty")
    ids: dict[str, str] = {}
    for message_id, event, _, _ in broker.sent:
        assert ids.setdefault(event, message_id) == message_id
    assert list(ids) == names
    assert len(set(ids.values())) == len(names)
    assert sender.failing is None


def test_while_the_broker_is_down_it_says_why_and_keeps_everything(
    outbox: Outbox, running: Callable[..., OutboxSender]
) -> None:
    add(outbox, ["instance.build.start"])
    broker = Recorder(fail=lambda attempt: "before")
    sender = running(outbox, broker, "j")
    wait_for(lambda: broker.attempts > 2, what="several attempts")
    assert sender.failing == "broker is down"
    assert outbox.depth() == 1


def test_what_a_dead_process_left_is_sent_by_the_next(tmp_path: Path, running: Callable[..., OutboxSender]) -> None:
    database = Database(tmp_path / "journal.sqlite", [SCHEMA])
    add(Outbox(database, "node1"), ["instance.build.start"])
    database.close()
    database = Database(tmp_path / "journal.sqlite", [SCHEMA])
    broker = Recorder()
    sender = running(Outbox(database, "node1"), broker, "j")
    wait_for(lambda: broker.sent, what="the notification")
    assert sender.stop()
    assert broker.closed
    database.close()


def test_the_payload_is_the_documented_one(outbox: Outbox, running: Callable[..., OutboxSender]) -> None:
    error = {"class": "DiskFull", "message": "m", "details": {}, "reschedulable": True, "retry_after": None}
    body = {"instance": INSTANCE, "kind": "build_and_run_instance", "state": "undone", "error": error}
    outbox._database.write(lambda tx: outbox.add(tx, "instance.build.error", body, priority="ERROR"))
    outbox.ring()
    broker = Recorder()
    running(outbox, broker, "j")
    wait_for(lambda: broker.sent, what="the notification")
    message_id, _, priority, payload = broker.sent[0]
    said = msgspec.convert(payload, Payload)
    assert payload.keys() <= {f.name for f in msgspec.structs.fields(Payload)}
    assert (said.version, said.host, said.instance, said.state) == ("1.0", "node1", INSTANCE, "undone")
    assert said.error == error
    assert priority == "ERROR"
    assert message_id == message_id_of("j", 1)


def test_host_state_comes_again_and_again(outbox: Outbox, running: Callable[..., OutboxSender]) -> None:
    broker = Recorder()
    running(outbox, broker, "j", host_state=host_state, host_state_interval=0.05)
    wait_for(lambda: len(broker.sent) >= 3, what="three host.state")
    payload = msgspec.convert(broker.sent[0][3], HostStatePayload)
    assert payload.version == "1.0"
    assert payload.vcpus.total == 4
    assert {event for _, event, _, _ in broker.sent} == {"host.state"}
    assert len({message_id for message_id, *_ in broker.sent}) == len(broker.sent)


def test_a_host_state_that_cannot_be_found_does_not_hold_up_rows_for_ever(
    outbox: Outbox, running: Callable[..., OutboxSender]
) -> None:
    def broken() -> HostState:
        raise RuntimeError("hypervisor is away")

    add(outbox, ["instance.build.start"])
    broker = Recorder()
    running(outbox, broker, "j", host_state=broken, host_state_interval=60)
    wait_for(lambda: broker.sent, what="the row")


def test_that_the_broker_is_back_is_found_with_nothing_to_send(
    outbox: Outbox, running: Callable[..., OutboxSender]
) -> None:
    broker = Recorder(fail=lambda attempt: "before" if attempt <= 2 else None)
    sender = running(outbox, broker, "j", host_state=host_state, host_state_interval=60)
    wait_for(lambda: broker.sent, what="host.state to be tried again, long before it is due again")
    wait_for(lambda: sender.failing is None, what="the sender to be well")


def test_through_oslo_messaging_in_one_process(outbox: Outbox, running: Callable[..., OutboxSender]) -> None:
    """A listener of oslo.messaging's own gets what was sent."""
    got, listener, transport = listen("kombu+memory://")
    sender = running(outbox, MessagingNotifier(transport, "node1", "cw_test"), "j")
    try:
        add(outbox, ["instance.build.start"])
        wait_for(lambda: got, what="the notification at a listener")
        assert wait_for(lambda: outbox.depth() == 0, what="the outbox to be empty")
    finally:
        listener.stop()
        listener.wait()
        sender.stop()
    publisher, event, payload, message_id = got[0]
    assert (publisher, event, message_id) == ("compute.node1", "instance.build.start", message_id_of("j", 1))
    assert payload["instance"] == INSTANCE


def test_several_in_one_process_come_one_by_one(outbox: Outbox, running: Callable[..., OutboxSender]) -> None:
    """Where there is no RabbitMQ nothing is sent together."""
    got, listener, transport = listen("kombu+memory://")
    add(outbox, [f"instance.build.{n}" for n in range(7)])
    sender = running(outbox, MessagingNotifier(transport, "node1", "cw_test"), "j")
    try:
        wait_for(lambda: len(got) == 7, what="the notifications at a listener")
    finally:
        listener.stop()
        listener.wait()
        sender.stop()
    assert [event for _, event, _, _ in got] == [f"instance.build.{n}" for n in range(7)]


def test_a_sealed_notification_is_what_oslo_messaging_makes() -> None:
    from oslo_messaging._drivers import amqp, common

    body = {"message_id": "m", "payload": {"a": [1, 2.5, None, "\u00e9"]}, "priority": "INFO"}
    theirs = dict(body)
    amqp._add_unique_id(theirs)
    amqp.pack_context(theirs, {})
    envelope = common.serialize_msg(theirs)
    ours = msgspec.json.decode(sealed(body))
    assert ours.keys() == envelope.keys() and ours["oslo.version"] == envelope["oslo.version"]
    inner, expected = msgspec.json.decode(ours["oslo.message"]), msgspec.json.decode(envelope["oslo.message"])
    assert len(inner.pop("_unique_id")) == len(expected.pop("_unique_id"))
    assert inner == expected


def test_a_broker_that_is_not_there_is_an_error_soon() -> None:
    import oslo_messaging

    transport = oslo_messaging.get_notification_transport(cfg.CONF, url="rabbit://u:p@127.0.0.1:1/")
    notifier = MessagingNotifier(transport, "node1", "cw_test")
    began = time.monotonic()
    failed: list[Exception] = []

    def attempt() -> None:
        try:
            notifier.send([Message("m", "instance.build.start", "INFO", {}, 0.0)], lambda index: None)
        except Exception as exc:
            failed.append(exc)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20)
    assert failed and "refused" in str(failed[0]), failed
    assert time.monotonic() - began < 15


def listen(url: str) -> tuple[list[tuple[str, str, dict[str, Any], str]], Any, Any]:
    """Notifications of topic ``cw_test`` as oslo.messaging's listener sees them, and a transport to send them on."""
    import oslo_messaging

    got: list[tuple[str, str, dict[str, Any], str]] = []

    class Endpoint:
        def info(self, ctxt: Any, publisher: str, event: str, payload: dict[str, Any], metadata: Any) -> None:
            got.append((publisher, event, payload, metadata["message_id"]))

    cfg.CONF([], project="compute-worker", default_config_files=[])
    receiving = oslo_messaging.get_notification_transport(cfg.CONF, url=url)
    target = oslo_messaging.Target(topic="cw_test")
    listener = oslo_messaging.get_notification_listener(receiving, [target], [Endpoint()], executor="threading")
    listener.start()
    return got, listener, oslo_messaging.get_notification_transport(cfg.CONF, url=url)
