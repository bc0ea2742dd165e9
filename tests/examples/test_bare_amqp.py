from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker.embedded import settings_for
from compute_worker.rpc.transport import get_transport
from compute_worker.worker import Worker
from tests.examples.daemon import Daemon
from tests.examples.load import EXAMPLES, example
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

bare_amqp = example("bare_amqp")


@pytest.fixture
def bare(rabbit: Rabbit) -> Iterator[Any]:
    made = bare_amqp.Bare(rabbit.url(scheme="amqp"))
    yield made
    made.close()


def test_it_needs_neither_our_package_nor_oslo() -> None:
    program = (
        "import sys, runpy\n"
        f"runpy.run_path({str(EXAMPLES / 'bare_amqp.py')!r}, run_name='imported')\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('compute_worker', 'oslo_messaging')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_whole_story(bare: Any, daemons: list[Daemon]) -> None:
    said: list[str] = []
    told = bare_amqp.story(bare, "image", "raw", said.append)
    text = "\n".join(said)
    assert text.startswith("2 hosts answer"), text
    assert "sent once more: repeated=True" in text and "build: done" in text
    assert "stop, by cast: done" in text and "delete: done" in text
    assert "start after delete: InstanceDeleted" in text
    types = [notification["event_type"] for notification in told]
    for expected in ("instance.create.start", "instance.create.end", "instance.power_off.end", "instance.delete.end"):
        assert types.count(expected) == 1, types


@pytest.fixture
def pair(rabbit: Rabbit, tmp_path: Path) -> Iterator[list[Worker]]:
    """Two workers in this process: simulated hosts reach each other's disks only so."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "image").write_bytes(b"an image")
    made = []
    transport = get_transport(rabbit.url())
    try:
        for number in (1, 2):
            name = f"pair{number}-{tmp_path.name[-12:]}".replace("_", "-")
            settings = settings_for(name, tmp_path, rpc={"exchange": "compute_worker"},
                                    telemetry={"notification_topic": "compute_notifications"})
            made.append(Worker(settings, transport))
            made[-1].start()
            wait_for(lambda: made[-1].server.connected, what=f"{name} to listen")
        yield made
    finally:
        for worker in made:
            worker.stop(5)
        transport.cleanup()


def test_a_resize(bare: Any, pair: list[Worker]) -> None:
    said: list[str] = []
    bare_amqp.story(bare, "image", "raw", said.append, resize=True)
    moved = next(line for line in said if line.startswith("resize on "))
    assert ": done; steps: " in moved and "await_disks" in moved and "grow_disks" in moved
    assert "confirmation: done" in said and "delete: done" in said
    assert all(not worker.manager.core.store.list() for worker in pair)


def test_refusals_carry_what_a_scheduler_needs(bare: Any, daemons: list[Daemon]) -> None:
    host = daemons[0].host
    instance = {"uuid": str(uuid.uuid4()), "flavor": {"vcpus": 1024, "memory_mb": 64}, "image": {"id": "image"}}
    with pytest.raises(bare_amqp.Refused) as refused:
        bare.call(host, "build_and_run_instance", instance=instance)
    assert refused.value.kind == "InsufficientResources"
    assert refused.value.details["resource"] == "vcpus" and refused.value.details["requested"] == 1024
    with pytest.raises(bare_amqp.Refused) as invalid:
        bare.call(host, "build_and_run_instance", instance={})
    assert invalid.value.kind == "InvalidCommand"


def test_a_host_that_never_was_is_known_at_once(bare: Any) -> None:
    for send in (bare.call, bare.cast):
        with pytest.raises(bare_amqp.NoSuchHost, match="NO_ROUTE"):
            send("nobody-here", "get_host_state")
    assert bare.find_hosts(0.2) == [], "the connection can be used on"


def test_the_program(rabbit: Rabbit, daemons: list[Daemon]) -> None:
    program = [sys.executable, str(EXAMPLES / "bare_amqp.py"), "image", "raw"]
    environment = os.environ | {"COMPUTE_WORKER_AMQP_URL": rabbit.url(scheme="amqp")}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "delete: done" in done.stdout
    usage = subprocess.run(program[:2], capture_output=True, text=True, timeout=60, check=False)
    assert usage.returncode == 2 and "COMPUTE_WORKER_AMQP_URL" in usage.stderr


def test_the_conductor_and_ctl_speak_to_the_same_hosts(rabbit: Rabbit, daemons: list[Daemon]) -> None:
    environment = os.environ | {"COMPUTE_WORKER_TRANSPORT_URL": rabbit.url()}

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    conducted = run(str(EXAMPLES / "conductor.py"), "--count", "3", "--image", "image")
    assert conducted.returncode == 0, conducted.stderr
    assert "3 of 3 run" in conducted.stdout
    listed = run("-m", "compute_worker.cmd.ctl", "list")
    assert listed.returncode == 0 and listed.stdout.count("active") == 3, listed
    from_file = run("-m", "compute_worker.cmd.ctl", "stop", "vm2", "--config-file", str(daemons[0].config))
    assert from_file.returncode == 0 and "done on host" in from_file.stdout, from_file
