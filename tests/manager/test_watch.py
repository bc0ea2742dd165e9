"""What happens outside any operation: crashes, host reboots, a lost journal, a hypervisor that goes and comes back."""

from __future__ import annotations

import dataclasses
import threading

import msgspec
import pytest

from compute_worker import errors
from compute_worker.manager.recovery import Action
from compute_worker.objects import ExternalEvent
from compute_worker.operations.executor import Point
from compute_worker.states import OperationState, PowerState, VmState
from compute_worker.virt.driver import Leftover, NullJob
from tests.manager.machine import VIF, Machine, make_instance, quiet_deaths
from tests.waiting import wait_for

UUID = make_instance().uuid


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path, sync_power_state_interval=600.0)
    yield machine
    machine.close()


def boot(machine, number=1, **changes):
    instance = make_instance(number, **changes)
    assert machine.do("build_and_run_instance", instance).state is OperationState.DONE
    machine.settle(instance.uuid)
    return instance.uuid


def told(machine, event):
    return [n.payload for n in machine.notifications() if n.event_type == event]


def test_guest_that_crashed_is_recorded_and_told_and_can_be_started(machine):
    boot(machine)
    machine.host.guest_crash(UUID)
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.ERROR, what="the crash on record")
    assert "crashed" in machine.instance(UUID).fault
    assert [p["state"] for p in told(machine, "instance.power_state")] == ["error"]
    assert machine.host.effects[UUID, "boot"] == 1, "the comparison changes records, never guests"
    assert machine.do("start_instance", UUID).state is OperationState.DONE
    assert machine.instance(UUID).vm_state is VmState.ACTIVE and machine.instance(UUID).fault is None


def test_what_was_seen_in_the_middle_of_an_operation_is_not_recorded_after_its_end(machine, monkeypatch):
    """The hypervisor shows a guest paused while its memory is saved; the save ends before that is written down."""
    boot(machine)
    real, seen = machine.driver.get_info, []

    def late(uuid):
        if seen:
            return real(uuid)
        seen.append(uuid)
        machine.driver.pause(machine.instance(uuid))
        info = real(uuid)
        machine.driver.unpause(machine.instance(uuid))
        assert machine.do("suspend_instance", uuid).state is OperationState.DONE
        return info

    monkeypatch.setattr(machine.driver, "get_info", late)
    machine.worker.watch.look_at(UUID)
    wait_for(lambda: seen and machine.instance(UUID).vm_state is VmState.SUSPENDED, what="the suspended guest")
    machine.settle(UUID)
    assert machine.instance(UUID).vm_state is VmState.SUSPENDED
    assert told(machine, "instance.power_state") == []


def test_guest_that_shut_itself_down_is_stopped(machine):
    boot(machine)
    machine.host.guest_shutdown(UUID)
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.STOPPED, what="the shutdown on record")
    assert machine.do("start_instance", UUID).state is OperationState.DONE


def test_host_reboot_starts_what_ran_and_nothing_else(machine):
    boot(machine)
    stopped = boot(machine, 2, vifs=[])
    machine.do("stop_instance", stopped)
    suspended = boot(machine, 3, vifs=[])
    machine.do("suspend_instance", suspended)
    machine.host.power_failure()
    machine.kill()
    machine.host.power_restore()
    machine.restart()
    wait_for(lambda: machine.host.running(UUID), what="the guest to be started again")
    machine.settle(UUID)
    assert machine.host.power_of(stopped) is PowerState.SHUTDOWN
    assert machine.instance(suspended).vm_state is VmState.SUSPENDED
    assert machine.host.cell.violations == []


def test_host_reboot_starts_what_was_paused(machine):
    boot(machine)
    assert machine.do("pause_instance", UUID).state is OperationState.DONE
    machine.host.power_failure()
    machine.kill()
    machine.host.power_restore()
    machine.restart()
    wait_for(lambda: machine.host.running(UUID), what="the guest to be started again")
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.ACTIVE, what="the record to say so")


def test_host_reboot_starts_what_ran_when_the_operation_it_interrupted_is_over(machine):
    boot(machine)
    machine.die_at = ("suspend_instance", "suspend", "do", Point.BEFORE_DO)
    operation = machine.send("suspend_instance", UUID)
    assert machine.dead.wait(10)
    machine.host.power_failure()
    machine.host.power_restore()
    machine.restart()
    assert machine.outcome(operation).state is OperationState.UNDONE
    wait_for(lambda: machine.host.running(UUID), what="the guest to be started again")
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.ACTIVE, what="the record to say so")
    machine.driver.power_off(machine.instance(UUID), NullJob())
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.STOPPED, what="a later shutdown on record")
    machine.kill()
    machine.restart()
    machine.worker.watch.compared.wait(5)
    assert machine.host.effects[UUID, "boot"] == 2


def test_restart_of_the_worker_alone_starts_nothing(machine):
    boot(machine)
    machine.kill()
    machine.host.guest_crash(UUID)
    machine.restart()
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.ERROR, what="the crash on record")
    assert machine.host.effects[UUID, "boot"] == 1


def test_resume_guests_can_be_turned_off(tmp_path):
    machine = Machine(tmp_path, resume_guests_state_on_host_boot=False)
    boot(machine)
    machine.host.power_failure()
    machine.kill()
    machine.host.power_restore()
    machine.restart()
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.STOPPED, what="the record to follow")
    assert machine.host.effects[UUID, "boot"] == 1
    machine.close()


def test_lost_journal_is_rebuilt_from_what_stands_beside_the_disks(machine):
    boot(machine)
    first = machine.worker.database.journal_id
    machine.kill()
    machine.bury()
    for path in machine.worker.database.path.parent.glob("journal.sqlite*"):
        path.unlink()
    machine.start()
    wait_for(lambda: machine.instance(UUID), what="the instance to be adopted")
    assert machine.worker.database.journal_id != first
    assert machine.instance(UUID).vm_state is VmState.ACTIVE
    assert machine.worker.core.claims.usage()["memory_mb"].used == 128
    assert machine.host.effects[UUID, "boot"] == 1
    assert machine.do("terminate_instance", UUID).state is OperationState.DONE
    assert machine.host.leftovers() == []


def test_what_is_built_while_the_hypervisor_is_asked_is_no_stranger(machine, monkeypatch):
    machine.worker.watch.stop()
    real = machine.driver.list_records
    monkeypatch.setattr(machine.driver, "list_records", lambda: [boot(machine)] and real())
    decided = machine.worker.recovery.compare()
    assert decided[UUID][0] is Action.NOTHING
    assert machine.instance(UUID).launched_at is not None


def test_what_is_undone_while_the_hypervisor_is_asked_is_not_adopted(machine, monkeypatch):
    machine.worker.watch.stop()
    real = machine.driver.list_records

    def late():
        operation = machine.send("build_and_run_instance", make_instance(vifs=waiting_vif()))
        wait_for(lambda: machine.worker.operations.get(operation).phase == "wait_for_vifs", what="the wait to begin")
        records = real()
        machine.send("cancel_operation", operation)
        assert machine.outcome(operation).state is OperationState.UNDONE
        return records

    monkeypatch.setattr(machine.driver, "list_records", late)
    machine.worker.recovery.compare()
    assert machine.instance(UUID) is None
    assert machine.worker.core.claims.usage()["memory_mb"].used == 0


def test_what_another_host_owns_is_left_alone(machine):
    boot(machine)
    machine.kill()
    machine.bury()
    for path in machine.worker.database.path.parent.glob("journal.sqlite*"):
        path.unlink()
    machine.settings = dataclasses.replace(
        machine.settings, compute=dataclasses.replace(machine.settings.compute, host="node9")
    )
    machine.start()
    machine.worker.watch.compared.wait(5)
    assert machine.instance(UUID) is None
    assert machine.host.running(UUID)


@pytest.mark.parametrize("record", [True, False])
def test_leftovers_of_a_deleted_instance_are_removed_at_start(machine, record):
    boot(machine)
    if not record:
        machine.host.slots[UUID].directories.clear()
    store, database = machine.worker.core.store, machine.worker.database
    database.write(lambda tx: (store.bury(tx, UUID), store.remove(tx, UUID)))
    machine.kill()
    machine.restart()
    wait_for(lambda: machine.host.leftovers() == [], what="the leftovers to go")


def test_a_guest_of_somebody_else_is_logged_once_and_again_when_it_changes(machine, monkeypatch, caplog):
    stranger, compare = make_instance(9).uuid, machine.worker.recovery.compare
    monkeypatch.setattr(machine.driver, "list_leftovers", lambda: [Leftover(stranger, "domain", "its name")])

    def logged():
        caplog.clear()
        assert compare()[stranger][0] is Action.REPORT
        return [r.getMessage() for r in caplog.records if stranger in r.getMessage()]

    assert len(logged()) == 1
    assert logged() == []
    record = msgspec.structs.replace(make_instance(9), host="elsewhere")
    monkeypatch.setattr(machine.driver, "list_records", lambda: [record])
    (line,) = logged()
    assert "elsewhere" in line
    monkeypatch.setattr(machine.driver, "list_leftovers", list)
    monkeypatch.setattr(machine.driver, "list_records", list)
    compare()
    monkeypatch.setattr(machine.driver, "list_records", lambda: [record])
    assert len(logged()) == 1, "it went and came back"


def test_hypervisor_that_is_down_at_start_is_waited_for(tmp_path):
    machine = Machine(tmp_path)
    machine.kill()
    machine.host.hypervisor_down()
    machine.restart()
    with pytest.raises(errors.HypervisorUnavailable):
        machine.worker.core.driver.list_instances()
    machine.host.hypervisor_restart()
    machine.worker.watch.compared.wait(10)
    assert machine.worker.watch.compared.is_set()
    boot(machine)
    machine.close()


def test_external_pause_and_resume_are_followed(machine):
    boot(machine)
    machine.driver.pause(make_instance())
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.PAUSED, what="the pause on record")
    machine.driver.unpause(make_instance())
    wait_for(lambda: machine.instance(UUID).vm_state is VmState.ACTIVE, what="the resume on record")


def waiting_vif():
    vif = make_instance().vifs[0]
    return [msgspec.structs.replace(vif, wait_for_plug=True)]


def test_guest_waits_paused_until_its_interface_is_plugged(machine):
    operation = machine.send("build_and_run_instance", make_instance(vifs=waiting_vif()))
    wait_for(lambda: machine.worker.operations.get(operation).phase == "wait_for_vifs", what="the wait to begin")
    assert machine.host.power_of(UUID) is PowerState.PAUSED
    machine.send("external_instance_event", UUID, [ExternalEvent(name="network-vif-plugged", tag=VIF)])
    assert machine.outcome(operation, 5).state is OperationState.DONE
    assert machine.host.running(UUID)


@pytest.mark.parametrize("status", ["failed", None])
def test_interface_that_is_not_plugged_undoes_the_build(tmp_path, status):
    machine = Machine(tmp_path, vif_plugging_timeout=0.5 if status is None else 30.0)
    operation = machine.send("build_and_run_instance", make_instance(vifs=waiting_vif()))
    if status:
        wait_for(lambda: machine.worker.operations.get(operation).phase == "wait_for_vifs", what="the wait to begin")
        event = ExternalEvent(name="network-vif-plugged", tag=VIF, status=status)
        machine.send("external_instance_event", UUID, [event])
    ended = machine.outcome(operation, 10)
    assert ended.error["class"] == "VifPlugTimeout" and ended.error["reschedulable"]
    assert machine.host.leftovers() == []
    machine.close()


def test_missing_plug_event_is_tolerated_where_it_is_not_fatal(tmp_path):
    machine = Machine(tmp_path, vif_plugging_timeout=0.3, vif_plugging_is_fatal=False)
    done = machine.do("build_and_run_instance", make_instance(vifs=waiting_vif()))
    assert done.state is OperationState.DONE
    assert "is off" in next(s.reason for s in done.steps if s.name == "wait_for_vifs")
    machine.close()


def test_a_look_that_finds_nothing_new_writes_nothing(machine, monkeypatch):
    boot(machine)
    wait_for(lambda: machine.worker.operations.counts() == (0, {}), what="the boot to be over")
    machine.worker.watch.stop()
    real, looks, commits = machine.driver.get_info, [], []
    monkeypatch.setattr(machine.driver, "get_info", lambda uuid: looks.append(uuid) or real(uuid))
    monkeypatch.setattr(machine.worker.database, "_on_commit", commits.append)
    for _ in range(3):
        machine.worker.watch._one(UUID)
    assert looks == [UUID] * 3
    assert commits == []


def test_events_that_an_operation_causes_are_looked_at_once_after_its_end(machine, monkeypatch):
    real, states = machine.driver.get_info, []

    def look(uuid):
        if threading.current_thread() is machine.worker.watch._thread:
            states.append(machine.instance(uuid).vm_state)
        return real(uuid)

    monkeypatch.setattr(machine.driver, "get_info", look)
    boot(machine)
    wait_for(lambda: states, what="the look after the end")
    machine.worker.watch.stop()
    assert set(states) == {VmState.ACTIVE}, "never while it was being built"
