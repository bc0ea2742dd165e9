"""The private RabbitMQ, in the hub and on 127.0.0.1."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import amqp
import kombu
import pytest

from tests.lab.cell import Cell
from tests.lab.rabbit import Permissions, Rabbit, User
from tests.lab.worker import REPOSITORY
from tests.waiting import wait_for

pytestmark = pytest.mark.lab


def connects(url: str, timeout: float = 2.0) -> bool:
    try:
        with kombu.Connection(url, connect_timeout=timeout) as connection:
            connection.connect()
            return True
    except (OSError, amqp.AccessRefused):
        return False


def test_rabbit_killed_stopped_and_frozen(cell: Cell) -> None:
    rabbit = cell.rabbit
    assert rabbit.ready()
    rabbit.freeze()
    assert not rabbit.ready()
    rabbit.thaw()
    wait_for(rabbit.ready, what="the thawed broker")
    rabbit.kill()
    assert not rabbit.ready()
    rabbit.start()
    rabbit.stop()
    assert rabbit.process() is None
    rabbit.start()
    assert rabbit.ready()


def test_relay_reaches_the_hub_from_this_process(cell: Cell) -> None:
    relay = cell.relay()
    assert connects(f"amqp://lab:lab@127.0.0.1:{relay.port}/lab")
    assert not connects(f"amqp://lab:wrong@127.0.0.1:{relay.port}/lab")
    relay.close()
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", relay.port)) != 0


def test_local_broker_with_users_and_permissions(lab_machine: None, tmp_path: Path) -> None:
    """On 127.0.0.1 beside everything else; a user may use only what it was given."""
    rabbit = Rabbit.local(tmp_path / "mq")
    only_mine = Permissions("^mine$", "^mine$", "^mine$")
    try:
        rabbit.up([User("one", "s3cret@/", only_mine)], vhosts=["lab", "other"])
        user = User("one", "s3cret@/")
        assert connects(rabbit.url(user, "amqp")) and connects(rabbit.url(user, "amqp", "other"))
        with kombu.Connection(rabbit.url(user, "amqp")) as connection:
            assert connection.channel().queue_declare("mine").queue == "mine"
            with pytest.raises(amqp.AccessRefused):
                connection.channel().queue_declare("yours")
        rabbit.set_permissions("one", Permissions())
        with kombu.Connection(rabbit.url(user, "amqp")) as connection:
            assert connection.channel().queue_declare("yours").queue == "yours"
        rabbit.stop()
        rabbit.start()
        assert connects(rabbit.url(user, "amqp"))
        pid = rabbit.ns.pid
    finally:
        rabbit.down()
    assert not Path(f"/proc/{pid}").exists() and not rabbit.directory.exists()


def test_local_broker_dies_with_its_maker(lab_machine: None, tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys\n"
        "from tests.lab.rabbit import Rabbit\n"
        "rabbit = Rabbit.local(pathlib.Path(sys.argv[1]))\n"
        "rabbit.start = lambda: None\n"
        "rabbit.up()\n"
        "print(rabbit.ns.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "mq")], cwd=REPOSITORY,
                          text=True, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        pid = maker.stdout.readline().strip()
        assert Path(f"/proc/{pid}").exists()
        maker.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 10, "the end of the broker's PID 1")
