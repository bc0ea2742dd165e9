"""Backups: a snapshot each, and as many kept as were asked for."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.objects import SnapshotOptions
from compute_worker.states import OperationState, TaskState
from tests.manager.machine import IMAGE, Machine, make_instance, quiet_deaths
from tests.manager.scenes import UUID
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    assert machine.do("build_and_run_instance", make_instance()).state is OperationState.DONE
    yield machine
    machine.close()


def backup(machine: Machine, image: str, kind: str = "daily", rotation: int = 2, uuid: str = UUID):
    found = machine.do("backup_instance", uuid, image, kind, rotation)
    assert found.state is OperationState.DONE, found.error
    return found


def test_the_oldest_go_and_no_others(machine):
    assert machine.do("snapshot_instance", UUID, "snap").state is OperationState.DONE
    other = make_instance(2, vifs=[])
    assert machine.do("build_and_run_instance", other).state is OperationState.DONE
    backup(machine, "other-1", uuid=other.uuid, rotation=1)
    backup(machine, "weekly-1", "weekly", 1)
    results = [backup(machine, f"daily-{number}").result["deleted"] for number in range(1, 5)]
    assert results == [[], [], ["daily-1"], ["daily-2"]]
    assert machine.host.images.names() == {IMAGE, "snap", "other-1", "weekly-1", "daily-3", "daily-4"}
    assert backup(machine, "daily-5", rotation=1).result["deleted"] == ["daily-3", "daily-4"]


def test_its_properties_say_what_it_is(machine):
    found = backup(machine, "b").result["image"]
    assert found["properties"]["image_type"] == "backup"
    assert found["properties"]["backup_type"] == "daily"
    assert found["name"] == "vm1 daily"


def test_a_backup_that_fails_rotates_nothing(machine):
    for number in (1, 2):
        backup(machine, f"b-{number}")
    machine.host.faults.fail("publish", errors.GuestFailed(instance=UUID, reason="injected"), times=1)
    assert machine.do("backup_instance", UUID, "b-3", "daily", 1).state is OperationState.UNDONE
    assert machine.host.images.names() == {IMAGE, "b-1", "b-2"}


@pytest.mark.parametrize("call", ["store_list", "store_delete"])
def test_what_the_store_does_not_let_go_goes_with_the_next(machine, call):
    for number in (1, 2):
        backup(machine, f"b-{number}")
    machine.host.faults.fail(call, errors.ImageStoreUnavailable(store="simulated", reason="injected"), times=1)
    found = backup(machine, "b-3")
    assert found.result["deleted"] == [] and "injected" in found.result["rotation_error"]
    assert machine.host.images.names() == {IMAGE, "b-1", "b-2", "b-3"}
    assert backup(machine, "b-4").result["deleted"] == ["b-1", "b-2"]


def test_busy_while_it_is_made_and_the_task_says_so(machine):
    stall = machine.host.faults.stall("create_image")
    operation = machine.send("backup_instance", UUID, "b", "daily", 1)
    assert stall.entered.wait(10)
    assert machine.instance(UUID).task_state is TaskState.IMAGE_BACKUP
    with pytest.raises(errors.InstanceBusy, match="backup_instance"):
        machine.send("snapshot_instance", UUID, "snap")
    stall.release()
    assert machine.outcome(operation).state is OperationState.DONE
    assert machine.instance(UUID).task_state is None


def test_cancelled_while_it_is_sent(machine):
    stall = machine.host.faults.stall("upload")
    operation = machine.send("backup_instance", UUID, "b", "daily", 1)
    assert stall.entered.wait(10)
    wait_for(lambda: machine.instance(UUID).task_state is TaskState.IMAGE_UPLOADING, what="the task")
    machine.send("cancel_operation", operation)
    assert machine.outcome(operation).state is OperationState.UNDONE
    assert machine.host.images.names() == {IMAGE}


def test_a_backup_in_a_format_and_compressed(machine):
    options = SnapshotOptions(compression="zlib")
    found = machine.do("backup_instance", UUID, "b", "daily", 1, options)
    assert found.result["image"]["disk_format"] == "qcow2"
