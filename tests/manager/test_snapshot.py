"""Snapshots of one host's instances: what is in the store when they end, and what is refused."""

from __future__ import annotations

import pytest

from compute_worker import errors, objects
from compute_worker.manager import withdrawals
from compute_worker.objects import SnapshotOptions
from compute_worker.states import OperationState, VmState
from compute_worker.virt.simulated.images import from_qcow2
from tests.manager.machine import Machine, make_instance, quiet_deaths
from tests.manager.scenes import OPERATION, UUID
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
    assert from_qcow2(image.data).endswith(b"written by the guest")
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


@pytest.mark.parametrize("method", ["snapshot", "snapshot_instance"])
def test_by_either_name_it_is_one_operation(machine, method):
    operation = machine.send("snapshot_instance", UUID, IMAGE, operation=OPERATION)
    assert machine.send(method, UUID, IMAGE, operation=OPERATION) == operation
    found = machine.outcome(operation)
    assert (found.kind, found.state) == ("snapshot_instance", OperationState.DONE)
    with pytest.raises(errors.OperationConflict):
        machine.send(method, UUID, "another", operation=OPERATION)


def test_what_was_asked_for_is_what_the_store_is_told(machine):
    options = SnapshotOptions(name="golden", disk_format="raw", properties={"os_distro": "debian"})
    found = machine.do("snapshot_instance", UUID, IMAGE, True, options)
    told = objects.decode(found.result["image"], objects.ImageMeta, "test")
    assert (told.name, told.disk_format, told.min_disk_gb) == ("golden", "raw", 1)
    assert told.properties["os_distro"] == "debian"
    assert told.properties["instance_uuid"] == UUID
    assert told.size_bytes == len(machine.host.images.get(IMAGE).data)
    assert [entry.image for entry in machine.ask("list_images", None, {"os_distro": "debian"})] == [told]


def test_a_second_guest_boots_from_it(machine):
    found = machine.do("snapshot_instance", UUID, IMAGE)
    image = objects.decode(found.result["image"], objects.ImageMeta, "test")
    second = make_instance(2, image=image, vifs=[])
    assert machine.do("build_and_run_instance", second).state is OperationState.DONE
    assert from_qcow2(machine.host.read_disk(second.uuid)).endswith(b"written by the guest")
    cached = {entry.size_bytes: entry.in_use for entry in machine.ask("list_cached_images")}
    assert cached[1 << 30]


def test_a_silent_store_holds_up_neither_the_guest_nor_its_delete(machine):
    silent = errors.ImageStoreUnavailable(store="simulated", reason="injected")
    machine.host.faults.fail("withdraw", silent, times=None)
    machine.host.faults.fail("upload", errors.GuestFailed(instance=UUID, reason="injected"))
    found = machine.do("snapshot_instance", UUID, IMAGE)
    assert found.state is OperationState.UNDONE
    assert machine.instance(UUID).task_state is None
    assert [image.id for image in withdrawals.waiting(machine.worker.core)] == [IMAGE]
    assert machine.do("terminate_instance", UUID).state is OperationState.DONE
    machine.kill()
    machine.restart()
    assert [image.id for image in withdrawals.waiting(machine.worker.core)] == [IMAGE]
    assert f"{IMAGE}.part" in machine.host.images.names()
    machine.host.faults.clear()
    wait_for(lambda: withdrawals.waiting(machine.worker.core) == [], what="the image to be withdrawn")
    assert f"{IMAGE}.part" not in machine.host.images.names()


def test_an_image_that_is_there_is_not_touched(machine):
    assert machine.do("snapshot_instance", UUID, IMAGE).state is OperationState.DONE
    before = machine.host.images.get(IMAGE)
    found = machine.do("snapshot_instance", UUID, IMAGE)
    assert found.state is OperationState.UNDONE
    assert found.error["class"] == "ImageUnacceptable"
    assert machine.host.images.get(IMAGE) == before
    assert [step.name for step in found.steps if step.direction == "do"] == ["create_image"]


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
