"""Bad messages to a worker process over RabbitMQ: a few of ``tests/badinput``, since RabbitMQ is between them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest

from compute_worker import errors
from compute_worker.rpc.client import ComputeAPI, local
from compute_worker.rpc.transport import get_transport
from compute_worker.states import OperationState
from tests.badinput.cases import CASES, CASTS
from tests.functional.daemon import Daemon
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

NAMES = [
    "method 'no_such_method'", "version 2", "nothing", "a second disk", "instance is None", "uuid: traversal",
    "image.id: absolute", "instance: nul", "operation: dash", "hostname: space", "instance: surrogate",
    "flavor.vcpus: -1", "flavor.root_gb: 1180591620717411303424", "shutdown_timeout: nan", "ten mebibytes",
    "a long name", "no room: vcpus", "expired at the epoch", "pause_instance: unknown", "get_console_output: unknown",
    "reply_topic: traversal",
]  # fmt: skip


@pytest.fixture(scope="module")
def daemon(rabbit: Rabbit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if rabbit.process() is None:
        rabbit.start()
    # Cases name the host in what they expect.
    made = Daemon(rabbit.url(), tmp_path_factory.mktemp("bad"), "node1")
    made.start()
    yield made
    assert made.stop() == 0
    assert "Traceback" not in made.log()


@pytest.fixture(scope="module")
def connected(rabbit: Rabbit, daemon: Daemon) -> Iterator[Any]:
    transport = get_transport(rabbit.url())
    yield transport
    transport.cleanup()


@pytest.mark.parametrize("name", NAMES)
def test_one_typed_error_and_nothing_changes(daemon: Daemon, connected: Any, name: str) -> None:
    case, api = CASES[name], ComputeAPI(connected, timeout=20)
    target = oslo_messaging.Target(exchange="compute_worker", topic="compute", server=daemon.host)
    client = oslo_messaging.get_rpc_client(connected, target, timeout=20, version_cap=None)
    prepared = client.prepare(version=case.version)
    before = files(daemon.directory)
    with pytest.raises(errors.ComputeError) as caught:
        prepared.call({"request_id": "req-bad"}, case.method, **case.args)
    error = local(caught.value)
    assert type(error) is case.error and case.word in error.message
    assert "Traceback" not in str(caught.value) and ".py" not in str(caught.value)
    if name in CASTS and "operation" not in case.args:
        operation = str(uuid.uuid4())
        prepared.cast({"request_id": "req-bad"}, case.method, **case.args, operation=operation)
        refused = wait_for(lambda: found(api, daemon, operation), what="the refusal to be recorded")
        assert refused.state is OperationState.REFUSED and refused.error["class"] == case.error.__name__
    assert api.list_instances(0, host=daemon.host) == []
    assert files(daemon.directory) == before


def found(api: ComputeAPI, daemon: Daemon, operation: str) -> Any:
    try:
        return api.get_operation(operation, host=daemon.host)
    except errors.OperationNotFound:
        return None


def files(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*") if not path.name.endswith(("-wal", "-shm")))
