"""One private RabbitMQ on 127.0.0.1 for all functional tests of a run."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.lab.rabbit import BIN, Permissions, Rabbit, User
from tests.rpc.hosts import Host


def worker_user(host: str) -> User:
    """A broker's user with no more than the worker ``host`` needs (doc: RabbitMQ permissions)."""
    own = rf"compute\.{host}|(compute_worker_fanout|reply)_{host}:compute-worker:[0-9]+"
    exchanges = "compute_worker|compute_worker_fanout"
    return User(
        host,
        f"secret-of-{host}",
        Permissions(
            configure=rf"^({own}|{exchanges}|compute_notifications\..*)$",
            write=rf"^({own}|{exchanges}|compute_notifications\..*|amq\.default)$",
            read=rf"^({own}|{exchanges})$",
        ),
    )


@pytest.fixture(scope="session")
def rabbit() -> Iterator[Rabbit]:
    """A broker that is up. Tests may stop it, and leave it up."""
    if not (BIN / "rabbitmq-server").exists():
        if os.environ.get("CI"):
            pytest.fail("RabbitMQ is not installed (rabbitmq-server)")
        pytest.skip("RabbitMQ is not installed (rabbitmq-server)")
    directory = Path(tempfile.mkdtemp(prefix="cwmq-"))
    broker = Rabbit.local(directory, tls=True)
    try:
        broker.up([worker_user("alpha"), worker_user("beta")])
        yield broker
    finally:
        broker.down()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def transport(rabbit: Rabbit) -> Iterator[Any]:
    if rabbit.process() is None:
        rabbit.start()
    transport = get_transport(rabbit.url())
    yield transport
    transport.cleanup()


@pytest.fixture
def name() -> str:
    """A host name of the test's own."""
    return f"node-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def host(transport: Any, tmp_path: Path, name: str) -> Iterator[Host]:
    with Host(transport, tmp_path, name) as host:
        yield host


@pytest.fixture
def api(transport: Any) -> ComputeAPI:
    return ComputeAPI(transport, timeout=20)
