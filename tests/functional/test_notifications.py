"""Notifications through a real RabbitMQ: confirmed, durable, and none lost when the broker goes away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import oslo_messaging
import pytest
from oslo_config import cfg

from compute_worker.operations.database import Database
from compute_worker.operations.outbox import Outbox
from compute_worker.operations.schema import SCHEMA
from compute_worker.rpc.transport import set_defaults
from compute_worker.telemetry.notifications import MessagingNotifier
from compute_worker.telemetry.sender import OutboxSender
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

TOPIC = "cw_notifications"


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    database = Database(tmp_path / "journal.sqlite", [SCHEMA])
    yield Outbox(database, "node1")
    database.close()


def add(outbox: Outbox, numbers: range) -> None:
    for n in numbers:
        outbox._database.write(lambda tx, n=n: outbox.add(tx, f"instance.build.{n}", {"instance": str(n)}))
    outbox.ring()


def received(url: str, wanted: int) -> list[dict[str, Any]]:
    """What lies in the queue, read without oslo.messaging."""
    found: list[dict[str, Any]] = []
    with kombu.Connection(url.replace("rabbit://", "amqp://")) as connection:
        queue = kombu.Queue(f"{TOPIC}.info", no_declare=True)(connection.default_channel)

        def take() -> bool:
            while (message := queue.get(no_ack=True)) is not None:
                found.append(json.loads(json.loads(message.body)["oslo.message"]))
            return len({said["message_id"] for said in found}) >= wanted

        wait_for(take, deadline=20, what=f"{wanted} notifications")
    return found


def test_none_is_lost_and_the_order_holds_when_the_broker_restarts(rabbit: Rabbit, outbox: Outbox) -> None:
    if rabbit.process() is None:
        rabbit.start()
    cfg.CONF([], project="compute-worker", default_config_files=[])
    set_defaults(cfg.CONF)
    transport = oslo_messaging.get_notification_transport(cfg.CONF, url=rabbit.url())
    sender = OutboxSender(outbox, MessagingNotifier(transport, "node1", TOPIC), "journal", first_backoff=0.1)
    sender.start()
    add(outbox, range(20))
    wait_for(lambda: outbox.depth() == 0, what="the first rows to be sent")

    rabbit.kill()
    add(outbox, range(20, 40))
    wait_for(lambda: sender.failing, deadline=30, what="the sender to see that the broker is down")
    assert outbox.depth() == 20

    rabbit.start()
    wait_for(lambda: outbox.depth() == 0, deadline=60, what="the rest to be sent")
    found = received(rabbit.url(), 40)
    assert sender.stop()

    events = [said["event_type"] for said in found]
    assert list(dict.fromkeys(events)) == [f"instance.build.{n}" for n in range(40)]
    assert len({said["message_id"] for said in found}) == 40
    assert found[0]["publisher_id"] == "compute.node1"
    assert found[0]["payload"]["sequence"] == 1
