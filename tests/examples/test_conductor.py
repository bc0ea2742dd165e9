from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.objects import Flavor, ImageMeta, Instance
from compute_worker.states import VmState
from tests.ctl.cell import IMAGE, CtlCell
from tests.ctl.test_placement import host as host_state
from tests.examples.load import EXAMPLES, example

conductor = example("conductor")
FLAVOR = Flavor(vcpus=1, memory_mb=128, root_gb=1)


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[CtlCell]:
    with CtlCell(["node1", "node2"], tmp_path / "cell") as cell:
        (cell.directory / "images" / IMAGE).write_bytes(b"an image")
        yield cell


def made(cell: CtlCell, **options: Any) -> Any:
    topic = cell.settings["node1"].telemetry.notification_topic
    found = conductor.Conductor(
        cell.api, cell.transport, exchange=cell.exchange, topic=topic, url=cell.url, say=lambda text: None, **options
    )
    assert found.discover(5.0, expected=2) == ["node1", "node2"]
    return found


def instances(count: int, flavor: Flavor = FLAVOR) -> list[Instance]:
    found: list[Instance] = conductor.instances(count, flavor, ImageMeta(id=IMAGE))
    return found


def where(cell: CtlCell) -> dict[str, list[str]]:
    """The hosts that run each guest, asked of the simulated machines."""
    found: dict[str, list[str]] = {}
    for name in cell.workers:
        host = cell.simulated(name)
        for uuid in host.slots:
            if host.running(uuid):
                found.setdefault(uuid, []).append(name)
    return found


def test_candidates_are_filtered_and_weighed() -> None:
    states = [
        host_state("small", memory=100), host_state("busy", vcpus=0), host_state("full", disk=0),
        host_state("off", enabled=False), host_state("down", hypervisor_up=False), host_state("said-no"),
        host_state("b"), host_state("a"), host_state("big", memory=9000),
    ]
    assert conductor.candidates(states, FLAVOR, ["said-no"]) == ["big", "a", "b"]


def test_instances_are_spread_and_followed_to_their_end(cell: CtlCell) -> None:
    on = made(cell)
    wanted = instances(6)
    with on.listening():
        for instance in wanted:
            on.boot(instance)
        assert on.run(30)
    assert {b.state for b in on.builds.values()} == {"running"}
    found = where(cell)
    assert sorted(found) == sorted(i.uuid for i in wanted)
    assert sorted(hosts[0] for hosts in found.values()) == ["node1"] * 3 + ["node2"] * 3
    assert all(len(hosts) == 1 for hosts in found.values())


def test_a_disabled_and_a_full_host_are_passed_by(cell: CtlCell) -> None:
    on = made(cell)
    cell.api.disable_host("fan", host="node1")
    room = int(on.hosts["node2"].memory_mb.free)
    big, bigger = instances(2, Flavor(vcpus=1, memory_mb=room // 2 + 1, root_gb=1))
    with on.listening():
        assert on.boot(big).host == "node2"
        refused = on.boot(bigger)
        assert on.run(30)
    assert refused.state == "failed" and "no host can take it" in refused.error
    assert where(cell) == {big.uuid: ["node2"]}


def test_a_no_from_one_host_leads_to_the_next(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    on = made(cell)
    real, asked = cell.api.build_and_run_instance, []

    def first_says_no(instance: Instance, *, host: str, **options: Any) -> Any:
        asked.append(host)
        if len(asked) == 1:
            raise errors.HostFull(host=host, running=1, limit=1, queued=9)
        return real(instance, host=host, **options)

    monkeypatch.setattr(cell.api, "build_and_run_instance", first_says_no)
    with on.listening():
        build = on.boot(instances(1)[0])
        assert on.run(30)
    assert asked == ["node1", "node2"] and build.state == "running" and build.host == "node2"


def test_a_no_that_no_host_would_change_is_final(cell: CtlCell) -> None:
    on = made(cell)
    (instance,) = instances(1, Flavor(vcpus=1, memory_mb=128, root_gb=1))
    cell.api.terminate_instance(instance.uuid, host="node1")
    build = on.boot(instance)
    assert build.state == "failed" and "deleted" in build.error


def test_an_undone_build_goes_to_another_host(cell: CtlCell) -> None:
    on = made(cell)
    cell.simulated("node1").faults.fail("create_disks", errors.DiskFull(path="/instances"))
    with on.listening():
        build = on.boot(instances(1)[0])
        assert build.host == "node1"
        assert on.run(30)
    assert (build.state, build.host) == ("running", "node2")
    assert where(cell) == {build.instance.uuid: ["node2"]}


def test_an_undone_build_that_nothing_can_help_has_failed(cell: CtlCell) -> None:
    on = made(cell)
    with on.listening():
        build = on.boot(conductor.instances(1, FLAVOR, ImageMeta(id="absent"))[0])
        assert on.run(30)
    assert build.state == "failed" and "absent" in build.error


def test_silence_after_acceptance_is_no_second_copy(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    on = made(cell)
    real = cell.api.build_and_run_instance

    def answer_is_lost(instance: Instance, *, host: str, **options: Any) -> Any:
        real(instance, host=host, **options)
        raise errors.PeerUnavailable(host=host)

    monkeypatch.setattr(cell.api, "build_and_run_instance", answer_is_lost)
    with on.listening():
        build = on.boot(instances(1)[0])
        assert build.state == "in doubt"
        assert on.run(30)
    assert build.state == "running" and build.refused_by == {}
    assert where(cell) == {build.instance.uuid: [build.host]}


def test_a_command_that_never_came_is_called_off_before_another_host_gets_it(
    cell: CtlCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = made(cell)
    real, lost = cell.api.build_and_run_instance, []

    def command_is_lost(instance: Instance, *, host: str, **options: Any) -> Any:
        if not lost:
            lost.append((host, options["operation"]))
            raise errors.PeerUnavailable(host=host)
        return real(instance, host=host, **options)

    monkeypatch.setattr(cell.api, "build_and_run_instance", command_is_lost)
    with on.listening():
        build = on.boot(instances(1)[0])
        assert on.run(30)
    host, operation = lost[0]
    assert build.state == "running" and build.host != host
    with pytest.raises(errors.OperationRefusedBefore):
        real(build.instance, host=host, operation=operation)
    assert where(cell) == {build.instance.uuid: [build.host]}


def test_a_silent_host_keeps_the_instance_until_its_command_has_expired(
    cell: CtlCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = made(cell)

    def silent(*args: Any, host: str, **options: Any) -> Any:
        raise errors.PeerUnavailable(host=host)

    monkeypatch.setattr(cell.api, "build_and_run_instance", silent)
    build = on.boot(instances(1)[0])
    monkeypatch.setattr(cell.api, "get_operation", silent)
    on._settle_doubts()
    assert build.state == "in doubt"
    monkeypatch.undo()
    monkeypatch.setattr(cell.api, "get_operation", silent)
    build.expires_at = time.time() - 61
    on._settle_doubts()
    assert build.state == "sent" and list(build.refused_by) == ["node1"]


def test_what_was_missed_is_caught_up_with(cell: CtlCell) -> None:
    """The conductor is away while its builds end, and while another client's do."""
    on = made(cell)
    wanted = instances(3)
    for instance in wanted:
        on.boot(instance)
    other = cell.boot("other")
    builds = list(on.builds.values())
    for build in builds:
        cell.api.get_operation(build.operation, 20, host=build.host)
    assert {b.state for b in builds} == {"sent"}
    assert on.catch_up() == 4
    assert {b.state for b in builds} == {"running"} and other not in on.builds
    assert on.catch_up() == 0
    cell.ctl("stop", other)
    assert on.catch_up() == 1


def test_a_worker_that_dies_in_the_middle_is_waited_for(cell: CtlCell) -> None:
    on = made(cell)
    stall = cell.simulated("node1").faults.stall("define")
    with on.listening():
        build = on.boot(instances(1)[0])
        assert stall.entered.wait(10)
        cell.kill("node1")
        assert not on.run(0.2)
        restart = threading.Thread(target=cell.start, args=("node1",))
        restart.start()
        assert on.run(30)
        restart.join()
    assert (build.state, build.host) == ("running", "node1")
    assert cell.api.get_instance(build.instance.uuid, host="node1").vm_state is VmState.ACTIVE


def test_a_repeated_notification_changes_nothing(cell: CtlCell) -> None:
    on = made(cell)
    payload = {"host": "node1", "operation": "o", "sequence": 2, "instance": "i", "error": None}
    on._hear("instance.create.end", payload)
    before = set(on._seen)
    on._hear("instance.create.end", payload)
    assert on._seen == before
    on._hear("instance.create.end", {**payload, "host": "node2"})
    assert len(on._seen) == len(before) + 1, "the same operation on another host is counted there"


def test_the_program(tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "conductor.py"), "--embedded", "--count", "3"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 run: 2 on node1, 1 on node2" in done.stdout and done.stderr == ""
    environment = {k: v for k, v in os.environ.items() if k != "COMPUTE_WORKER_TRANSPORT_URL"}
    bare = subprocess.run(program[:2], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert bare.returncode == 2 and "--embedded" in bare.stderr


