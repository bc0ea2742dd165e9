"""Real deaths on a real host: the worker, libvirtd, qemu, RabbitMQ and the host itself, in the middle of a command.

Each cell asks the oracle: the right state, one running copy, each effect once, nothing left over, one terminal
notification, and no person was needed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from compute_worker.objects import Vif
from compute_worker.states import OperationState
from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.killcell import HOST, PATIENCE, KillHost, kill_host
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

BUILD, DELETE = "build_and_run_instance", "terminate_instance"
KEEPALIVE_BYTES = 28
"""A question whether libvirtd lives; a call is longer."""


@pytest.fixture
def host(cell: Cell, lab_guest: GuestImages) -> Iterator[KillHost]:
    with kill_host(cell, lab_guest) as made:
        yield made


def at(kind: str, step: str, point: str, direction: str = "do") -> str:
    return f"{kind}:{step}:{direction}:{point}"


def delete(host: KillHost, instance, deaths: int) -> None:
    """Delete it, see nothing left, and end the worker, which died as often as it should."""
    operation = host.do(DELETE, instance.uuid)
    host.assert_gone()
    host.assert_ended_once(instance, operation, "instance.delete.end")
    assert host.deaths == deaths
    host.stop()


@pytest.mark.parametrize(
    ("build_step", "build_point", "delete_step", "delete_point"),
    [
        ("fetch_images", "after_do", "power_off", "before_do"),
        ("create_disks", "after_do", "power_off", "after_do"),
        ("plug_vifs", "before_record", "undefine", "before_do"),
        ("define", "after_do", "undefine", "after_do"),
        ("start_paused", "after_do", "undefine", "after_record"),
        ("wait_for_vifs", "before_do", "unplug_vifs", "after_do"),
        ("commit", "before_record", "delete_files", "before_do"),
        ("commit", "after_record", "delete_files", "after_do"),
        ("resume_guest", "after_do", "delete_files", "after_record"),
    ],
)
def test_worker_killed(
    host: KillHost, build_step: str, build_point: str, delete_step: str, delete_point: str
) -> None:
    """SIGKILL in the middle of a build, and again in the middle of the delete."""
    host.start(kill_at=f"{at(BUILD, build_step, build_point)},{at(DELETE, delete_step, delete_point)}")
    instance, operation = host.boot()
    assert host.deaths == 1
    host.assert_runs(instance)
    host.assert_ended_once(instance, operation, "instance.create.end")
    delete(host, instance, deaths=2)


@pytest.mark.parametrize("step", ["create_disks", "fetch_images"])
def test_worker_killed_while_a_build_is_undone(host: KillHost, step: str) -> None:
    """A bridge is missing: the build is undone, and the worker dies on the way back, too."""
    host.start(kill_at=at(BUILD, step, "after_do", "undo"))
    vif = Vif(id="99999999-9999-4999-8999-999999999999", mac="52:54:00:1a:b0:08", bridge="nosuch0")
    instance = host.instance(vifs=[vif])
    operation = host.send(BUILD, instance)
    ended = host.outcome(operation)
    assert ended.state is OperationState.UNDONE
    assert ended.error is not None and "nosuch0" in ended.error["message"]
    host.assert_gone()
    host.assert_ended_once(instance, operation, "instance.create.error")
    assert host.deaths == 1
    host.stop()


@pytest.mark.parametrize("step", ["define", "start_paused"])
def test_libvirtd_killed_inside_a_call(host: KillHost, step: str) -> None:
    """libvirtd is stopped, the worker calls it, libvirtd is killed: the call is lost, the build is not."""
    point = at(BUILD, step, "before_do")
    host.start(hold_at=point)
    instance = host.instance()
    operation = host.send(BUILD, instance)
    host.wait_held(point)
    host.node.libvirtd.freeze()
    host.release(point)
    wait_for(lambda: host.unanswered_bytes() > KEEPALIVE_BYTES, 10, "a call that libvirtd does not answer")
    host.node.libvirtd.kill()
    waiting = wait_for(lambda: host.api.get_operation(operation, host=HOST).waiting_for, 30, "the operation to wait")
    assert waiting and "hypervisor" in waiting
    host.node.libvirtd.start()
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(instance)
    host.assert_ended_once(instance, operation, "instance.create.end")
    delete(host, instance, deaths=0)


def test_libvirtd_killed_while_qemu_starts(host: KillHost) -> None:
    """The moment qemu's process is there: whether libvirtd keeps it or not, one copy runs in the end."""
    host.start()
    instance = host.instance()
    operation = host.send(BUILD, instance)
    wait_for(lambda: oracle.qemu_processes(host.node), PATIENCE, "qemu's process")
    host.node.libvirtd.kill()
    host.node.libvirtd.start()
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(instance)
    host.assert_ended_once(instance, operation, "instance.create.end")
    delete(host, instance, deaths=0)


def test_libvirtd_killed_inside_a_delete(host: KillHost) -> None:
    point = at(DELETE, "undefine", "before_do")
    host.start(hold_at=point)
    instance, _ = host.boot()
    operation = host.send(DELETE, instance.uuid)
    host.wait_held(point)
    host.node.libvirtd.kill()
    host.release(point)
    host.node.libvirtd.start()
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_gone()
    host.assert_ended_once(instance, operation, "instance.delete.end")
    host.stop()


def test_qemu_killed(host: KillHost) -> None:
    """The record says crashed, it is told once, and start works, its counter going on."""
    host.start()
    instance, _ = host.boot()
    host.assert_runs(instance)
    os.kill(oracle.qemu_processes(host.node)[0].pid, signal.SIGKILL)
    record = wait_for(
        lambda: (r := host.api.get_instance(instance.uuid, host=HOST)).vm_state == "error" and r, 20, "the crash"
    )
    assert record and record.power_state == "crashed" and record.fault and "crashed" in record.fault
    host.do("start_instance", instance.uuid)
    host.assert_runs(instance, boot=2)
    told = [said["priority"] for said in host.notified(instance) if said["event_type"] == "instance.power_state"]
    assert told.count("ERROR") == 1
    delete(host, instance, deaths=0)


def test_qemu_killed_before_the_commit(host: KillHost) -> None:
    """The guest dies between its start and the COMMIT: it runs in the end, and booted once."""
    point = at(BUILD, "commit", "before_record")
    host.start(hold_at=point)
    instance = host.instance()
    operation = host.send(BUILD, instance)
    host.wait_held(point)
    os.kill(oracle.qemu_processes(host.node)[0].pid, signal.SIGKILL)
    wait_for(lambda: not oracle.qemu_processes(host.node), 10, "qemu's end")
    host.release(point)
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(instance)
    delete(host, instance, deaths=0)


@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_rabbitmq_stopped(host: KillHost, seconds: float) -> None:
    """The broker is away, for at least so long, while a build and a stop run: both end without it, and are told of."""
    point = at(BUILD, "define", "before_do")
    host.start(hold_at=point)
    instance = host.instance()
    operation = host.send(BUILD, instance)
    host.wait_held(point)
    host.cell.rabbit.stop()
    since = time.monotonic()
    host.release(point)
    host.wait_ticks(instance, count=1)
    wait_for(lambda: time.monotonic() - since >= seconds, seconds + 1, "the broker's absence")
    host.cell.rabbit.start()
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(instance)
    host.assert_ended_once(instance, operation, "instance.create.end")
    delete(host, instance, deaths=0)


def test_host_power_failure(host: KillHost) -> None:
    """The guest that ran is started again, the one that was stopped stays so; both are whole."""
    host.start()
    stopped, _ = host.boot()
    host.do("stop_instance", stopped.uuid, clean_shutdown=False)
    instance, _ = host.boot()
    host.assert_runs(instance)
    host.cell.kill_node(HOST)
    host.cell.start_node(HOST)
    host.revive()
    host.worker.wait_ready()
    host.assert_runs(instance, boot=2)
    assert oracle.domains(host.node)[stopped.uuid].state == "shut off"
    assert host.api.get_instance(stopped.uuid, host=HOST).vm_state == "stopped"
    host.do(DELETE, stopped.uuid)
    delete(host, instance, deaths=1)


@pytest.mark.parametrize("step", ["create_disks", "start_paused", "resume_guest"])
def test_host_power_failure_in_a_build(host: KillHost, step: str) -> None:
    """The host goes down in the middle of a build, also after its COMMIT: the build ends with a guest that runs."""
    point = at(BUILD, step, "before_do")
    host.start(hold_at=point)
    instance = host.instance()
    operation = host.send(BUILD, instance)
    host.wait_held(point)
    host.cell.kill_node(HOST)
    host.cell.start_node(HOST)
    host.node.path(host.mark).mkdir(parents=True, mode=0o777)
    host.node.path(host.mark).chmod(0o777)
    host.node.path(f"{host.mark}/{point}.held").touch()
    host.release(point)
    host.revive()
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(instance)
    host.assert_ended_once(instance, operation, "instance.create.end")
    delete(host, instance, deaths=1)


def test_worker_killed_in_a_clean_stop(host: KillHost) -> None:
    """Killed after the guest went down and before that was recorded: it is off, by its own doing, and boots again."""
    host.start(kill_at=at("stop_instance", "power_off", "after_do"))
    instance, _ = host.boot()
    host.wait_ticks(instance)
    host.do("stop_instance", instance.uuid)
    assert oracle.domains(host.node)[instance.uuid].state == "shut off"
    assert oracle.boots(host.console(instance))[-1].clean_shutdown
    wait_for(lambda: host.api.get_instance(instance.uuid, host=HOST).power_state == "shutdown", PATIENCE, "its record")
    host.do("start_instance", instance.uuid)
    host.assert_runs(instance, boot=2)
    delete(host, instance, deaths=1)
