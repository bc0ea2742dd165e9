"""Snapshots of one host's instances: what is in the store when they end, and what is refused."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.states import OperationState, VmState
from tests.manager.machine import Machine, make_instance, quiet_deaths
from tests.manager.scenes import UUID
from tests.waiting import wait_for

IMAGE = "snap"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    assert machine.do("build_and_run_instance", make_instance()).state is OperationState.DONE
    machine.host.guest_write(UUID, b"written by the guest")
    yield machine
    machine.close()



def test_the_image_is_what_the_guest_had(machine):
    found = machine.do("snapshot_instance", UUID, IMAGE)
    assert found.state is OperationState.DONE, found.error
    assert found.result["image"]["id"] == IMAGE
    image = machine.host.images.get(IMAGE)
    assert image.data.endswith(b"written by the guest")
    assert machine.host.running(UUID)
    record = machine.instance(UUID)
    assert (record.vm_state, record.task_state) == (VmState.ACTIVE, None)


def test_cancelled_while_it_is_sent_nothing_is_in_the_store(machine):
    stall = machine.host.faults.stall("upload")
    operation = machine.send("snapshot_instance", UUID, IMAGE)
    assert stall.entered.wait(10)
    wait_for(lambda: machine.instance(UUID).task_state == "image_uploading", what="the task")
    machine.send("cancel_operation", operation)
    assert machine.outcome(operation).state is OperationState.UNDONE
    assert machine.host.images.get(IMAGE) is None
    assert machine.instance(UUID).task_state is None
    assert {left.kind for left in machine.host.leftovers()} == {"directory", "domain"}


def test_deleted_while_it_is_sent(machine):
    stall = machine.host.faults.stall("upload")
    operation = machine.send("snapshot_instance", UUID, IMAGE)
    assert stall.entered.wait(10)
    assert machine.do("terminate_instance", UUID).state is OperationState.DONE
    assert machine.outcome(operation).state is OperationState.UNDONE
    assert machine.host.images.get(IMAGE) is None
    assert machine.host.leftovers() == []


def test_refused_where_the_driver_makes_none(machine, monkeypatch):
    def refuse(*args):
        raise errors.NotSupported(what="snapshots")

    monkeypatch.setattr(machine.driver, "snapshot", refuse)
    with pytest.raises(errors.NotSupported, match="snapshots"):
        machine.send("snapshot_instance", UUID, IMAGE)
    assert machine.instance(UUID).task_state is None


def test_no_more_at_once_than_allowed(tmp_path):
    machine = Machine(tmp_path, max_concurrent_snapshots=1)
    uuids = []
    for number in (1, 2):
        instance = make_instance(number)
        assert machine.do("build_and_run_instance", instance).state is OperationState.DONE
        uuids.append(instance.uuid)
    stall = machine.host.faults.stall("upload", uuids[0])
    first = machine.send("snapshot_instance", uuids[0], "one")
    assert stall.entered.wait(10)
    second = machine.send("snapshot_instance", uuids[1], "two")
    assert machine.worker.operations.get(second).state is OperationState.QUEUED
    stall.release()
    assert machine.outcome(first).state is OperationState.DONE
    assert machine.outcome(second).state is OperationState.DONE
    machine.close()
