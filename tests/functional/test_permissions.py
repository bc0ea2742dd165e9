"""What etc/rabbitmq/host-permissions gives a worker is enough for its work, and nothing for another host's."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp
import kombu
import oslo_messaging
import pytest
from amqp.exceptions import AccessRefused
from oslo_config import cfg

from compute_worker.objects import Capacity, HostState
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.discovery import find_hosts
from compute_worker.rpc.transport import get_transport, set_defaults
from compute_worker.telemetry.notifications import Message, MessagingNotifier
from tests.lab.rabbit import Rabbit, User
from tests.rpc.hosts import UUID, Host

pytestmark = pytest.mark.functional

SCRIPTS = Path(__file__).parents[2] / "etc" / "rabbitmq"
SCRIPT = SCRIPTS / "host-permissions"
NOTHING = Capacity(total=0, usable=0)


@pytest.fixture(scope="module")
def users(rabbit: Rabbit) -> dict[str, User]:
    """A user for each of two hosts, permitted by the commands that the script prints."""
    if rabbit.process() is None:
        rabbit.start()
    made = {name: User(f"compute-{name}", f"password-of-{name}") for name in ("perm1", "perm.2")}
    for name, user in made.items():
        rabbit.ctl("add_user", user.name, user.password)
        do_as_printed(rabbit, SCRIPT, name, rabbit.vhost)
    made["caller"] = User("caller", "password-of-caller")
    rabbit.ctl("add_user", "caller", "password-of-caller")
    do_as_printed(rabbit, SCRIPTS / "caller-permissions", rabbit.vhost, "caller")
    return made


def do_as_printed(rabbit: Rabbit, script: Path, *arguments: str) -> None:
    printed = subprocess.run([script, *arguments], capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        program, *words = shlex.split(line)
        assert program == "rabbitmqctl"
        rabbit.ctl(*words)


@pytest.fixture
def connect(rabbit: Rabbit, users: dict[str, User], tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Transports as etc/rabbitmq/worker.conf.sample makes them."""
    set_defaults(cfg.CONF)
    from oslo_concurrency import lockutils

    cfg.CONF.register_opts(lockutils._opts, "oslo_concurrency")
    cfg.CONF.set_override("lock_path", str(tmp_path), "oslo_concurrency")
    opened = []

    def open_as(name: str) -> Any:
        named = f"?use_queue_manager=true&processname=compute-worker&hostname={name}"
        opened.append(get_transport(rabbit.url(users[name]) + ("" if name == "caller" else named)))
        return opened[-1]

    yield open_as
    for transport in opened:
        transport.cleanup()
    cfg.CONF.clear_override("lock_path", "oslo_concurrency")


def test_it_is_enough_for_the_work_of_workers_and_callers(
    rabbit: Rabbit, users: dict[str, User], connect: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    as_one = connect("perm1")
    transport = connect("caller")
    caller = ComputeAPI(transport)
    with Host(as_one, tmp_path / "one", "perm1") as one:
        peers = ComputeAPI(as_one)
        state = HostState(host="perm1", vcpus=NOTHING, memory_mb=NOTHING, disk_gb=NOTHING)
        one.notebook.on_announce = lambda topic: peers.host_announced(topic, state)
        assert caller.start_instance(UUID.format(1), host="perm1").host == "perm1"
        assert [found.host for found in find_hosts(transport, caller, enough=bool)] == ["perm1"]
        with Host(connect("perm.2"), tmp_path / "two", "perm.2") as two:
            assert peers.start_instance(UUID.format(2), host="perm.2").host == "perm.2"
            assert two.notebook.arguments("start_instance")[0]["instance"] == UUID.format(2)
        sending = oslo_messaging.get_notification_transport(cfg.CONF, url=as_one._driver._url)
        notifier = MessagingNotifier(sending, "perm1", "compute_notifications")
        notifier.send([Message("m", "host.state", "INFO", {}, 0.0)], lambda index: None)
        notifier.close()
    with kombu.Connection(rabbit.url(users["caller"]).replace("rabbit://", "amqp://")) as connection:
        assert connection.default_channel.basic_get("compute_notifications.info", no_ack=True) is not None
        with pytest.raises(AccessRefused):
            connection.default_channel.basic_get("compute.perm1")


FORBIDDEN: dict[str, Callable[[Any], Any]] = {
    "take another host's commands": lambda channel: channel.basic_get("compute.perm.2"),
    "consume them": lambda channel: channel.basic_consume("compute.perm.2", callback=print),
    "drop them": lambda channel: channel.queue_purge("compute.perm.2"),
    "remove its queue": lambda channel: channel.queue_delete("compute.perm.2"),
    "have a copy of them": lambda channel: channel.queue_bind("compute.perm1", "compute_worker", "compute.perm.2"),
    "have a copy of all": lambda channel: channel.queue_bind("compute.perm1", "compute_worker", "#"),
    "claim a name alike": lambda channel: channel.queue_declare("compute.perm1x"),
    "take its answers": lambda channel: channel.queue_declare("reply_perm.2:compute-worker:1"),
    "read notifications": lambda channel: channel.basic_get("compute_notifications.info"),
    "send elsewhere": lambda channel: channel.basic_publish_confirm(
        amqp.Message("x"), "compute_worker", "other_topic"
    ),
    "command every host at once": lambda channel: channel.basic_publish_confirm(
        amqp.Message("x"), "compute_worker_fanout", ""
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_it_cannot(rabbit: Rabbit, users: dict[str, User], what: str) -> None:
    administrator = rabbit.url().replace("rabbit://", "amqp://")
    with kombu.Connection(administrator) as connection:
        exchange = kombu.Exchange("compute_worker", "topic", durable=True)
        for name in ("perm1", "perm.2"):
            kombu.Queue(f"compute.{name}", exchange, f"compute.{name}")(connection.default_channel).declare()
        fanout = kombu.Exchange("compute_worker_fanout", "fanout", durable=False, auto_delete=True)
        fanout(connection.default_channel).declare()
        kombu.Queue("compute_notifications.info", durable=True)(connection.default_channel).declare()
        with (
            kombu.Connection(rabbit.url(users["perm1"]).replace("rabbit://", "amqp://")) as own,
            pytest.raises(AccessRefused),
        ):
            FORBIDDEN[what](own.default_channel)


def test_a_name_that_is_no_host_name_is_refused() -> None:
    done = subprocess.run([SCRIPT, "x'; rm -rf"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
