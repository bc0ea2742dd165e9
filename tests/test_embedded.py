from __future__ import annotations

import uuid
from pathlib import Path

import oslo_messaging

from compute_worker.embedded import EmbeddedCell
from compute_worker.objects import Flavor, ImageMeta, Instance
from compute_worker.rpc.discovery import find_hosts
from compute_worker.rpc.transport import get_transport
from compute_worker.states import OperationState, VmState
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated.host import SimulatedHost
from tests.waiting import wait_for

IMAGE = "img"


def made(directory: Path, *names: str) -> EmbeddedCell:
    cell = EmbeddedCell(names or ["node1"], directory)
    (directory / "images" / IMAGE).write_bytes(b"root")
    return cell


def instance() -> Instance:
    return Instance(
        uuid=str(uuid.uuid4()), flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1), image=ImageMeta(id=IMAGE)
    )


def simulated(cell: EmbeddedCell, host: str = "node1") -> SimulatedHost:
    driver = cell.workers[host].manager.core.driver
    assert isinstance(driver, FakeDriver)
    return driver.simulated


def test_every_host_listens_when_the_cell_is_up(tmp_path: Path) -> None:
    with made(tmp_path / "cell", "node1", "node2", "node3") as cell:
        enough = lambda found: len(found) == 3  # noqa: E731
        found = find_hosts(cell.transport, cell.api, 5.0, cell.exchange, enough)
    assert [state.host for state in found] == ["node1", "node2", "node3"]


def test_a_killed_worker_goes_on_with_its_build_when_it_starts_again(tmp_path: Path) -> None:
    with made(tmp_path / "cell") as cell:
        host = simulated(cell)
        stall = host.faults.stall("create_disks")
        guest = instance()
        accepted = cell.api.build_and_run_instance(guest, host="node1")
        assert stall.entered.wait(10)
        cell.kill("node1")
        assert host.effects[guest.uuid, "boot"] == 0
        cell.start("node1")
        assert accepted.operation is not None
        ended = cell.api.get_operation(accepted.operation, 20, host="node1")
        assert ended.state is OperationState.DONE
        assert cell.api.get_instance(guest.uuid, host="node1").vm_state is VmState.ACTIVE
        assert simulated(cell).effects[guest.uuid, "boot"] == 1


def test_a_killed_worker_does_nothing_more(tmp_path: Path) -> None:
    with made(tmp_path / "cell") as cell:
        host = simulated(cell)
        stall = host.faults.stall("create_disks")
        guest = instance()
        cell.api.build_and_run_instance(guest, host="node1")
        assert stall.entered.wait(10)
        cell.kill("node1")
        stall.release()
        before = (host.files(guest.uuid), dict(host.effects))
        assert cell.workers == {} and host.connections == []
        assert (host.files(guest.uuid), dict(host.effects)) == before


def test_the_same_directory_is_the_same_cell(tmp_path: Path) -> None:
    guest = instance()
    with made(tmp_path / "cell") as cell:
        accepted = cell.api.build_and_run_instance(guest, host="node1")
        assert accepted.operation is not None
        cell.api.get_operation(accepted.operation, 20, host="node1")
    with made(tmp_path / "cell") as cell:
        assert [i.uuid for i in cell.api.list_instances(host="node1")] == [guest.uuid]


def test_notifications_are_sent(tmp_path: Path) -> None:
    seen: list[str] = []

    class Endpoint:
        def info(self, context, publisher, event_type, payload, metadata):  # type: ignore[no-untyped-def]
            if payload.get("instance") == guest.uuid:
                seen.append(event_type)

    guest = instance()
    with made(tmp_path / "cell") as cell:
        topic = cell.settings["node1"].telemetry.notification_topic
        transport = get_transport(cell.url, exchange=cell.exchange)
        target = oslo_messaging.Target(topic=topic, exchange=cell.exchange)
        listener = oslo_messaging.get_notification_listener(transport, [target], [Endpoint()], executor="threading")
        listener.start()
        try:
            cell.api.build_and_run_instance(guest, host="node1")
            wait_for(lambda: "instance.create.end" in seen, what="the notification of the build's end")
        finally:
            listener.stop()
            listener.wait()
            transport.cleanup()
    assert seen[0] == "instance.create.start"
