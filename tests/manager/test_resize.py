"""The choreography of a cold move when nothing dies, and when something is refused."""

from __future__ import annotations

import pytest

from compute_worker.states import OperationState, PowerState, VmState
from tests.manager.cell import BIGGER, DECISION, DESTINATION, MIGRATION, OPERATION, SOURCE, UUID, WRITTEN, Cell
from tests.manager.machine import quiet_deaths
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path)
    yield cell
    cell.close()


def test_a_resize_moves_the_guest_and_grows_it(cell):
    cell.boot()
    cell.resized()
    cell.quiet()
    assert cell.owners() == [DESTINATION]
    record = cell[DESTINATION].instance(UUID)
    assert record.vm_state is VmState.RESIZED
    assert record.power_state is PowerState.RUNNING
    assert record.flavor == BIGGER
    assert cell[DESTINATION].host.running(UUID)
    assert cell[DESTINATION].host.read_disk(UUID).endswith(WRITTEN)
    assert cell.simulated.violations == []
    assert cell.leftovers(SOURCE) == {"resize"}
    assert cell.used_mb(SOURCE) == 128
    assert cell.used_mb(DESTINATION) == 256


def test_confirm_drops_the_copy(cell):
    cell.boot()
    cell.resized()
    cell[DESTINATION].send("confirm_resize", UUID, MIGRATION, operation=DECISION)
    assert cell.outcome(DESTINATION, DECISION).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    record = cell[DESTINATION].instance(UUID)
    assert record.vm_state is VmState.ACTIVE
    assert record.migration is None
    assert cell.used_mb(SOURCE) == 0


def test_revert_brings_it_back(cell):
    cell.boot()
    cell.resized()
    cell[DESTINATION].send("revert_resize", UUID, MIGRATION, operation=DECISION)
    assert cell.outcome(DESTINATION, DECISION).state is OperationState.DONE, cell.outcome(DESTINATION, DECISION).error
    cell.quiet()
    assert cell.owners() == [SOURCE]
    record = cell[SOURCE].instance(UUID)
    assert record.vm_state is VmState.ACTIVE
    assert record.flavor.memory_mb == 128
    assert cell[SOURCE].host.running(UUID)
    assert cell[SOURCE].host.read_disk(UUID).endswith(WRITTEN)
    assert cell.leftovers(DESTINATION) == set()
    assert cell.used_mb(DESTINATION) == 0
    assert cell.used_mb(SOURCE) == 128
    assert cell.simulated.violations == []
    assert OPERATION != DECISION


def test_resize_is_refused_and_nothing_changes(cell):
    from compute_worker import errors
    from compute_worker.objects import BlockDeviceInfo, Flavor
    from tests.manager.cell import changed

    instance = cell.boot()
    destination = cell[DESTINATION]
    small = Flavor(vcpus=1, memory_mb=128, root_gb=0, ephemeral_gb=1)
    large = Flavor(vcpus=1, memory_mb=1 << 20, root_gb=1, ephemeral_gb=1)
    volumes = BlockDeviceInfo(block_device_mapping=[{"connection_info": "x"}])
    elsewhere = changed(instance.image, properties={"hw_architecture": "aarch64"})
    cases = [
        (instance, {"new_flavor": small}, errors.InvalidCommand),
        (instance, {"new_flavor": changed(BIGGER, ephemeral_gb=0)}, errors.InvalidCommand),
        (instance, {"new_flavor": large}, errors.InsufficientResources),
        (instance, {"dest_host": "node9"}, errors.InvalidCommand),
        (instance, {"dest_host": DESTINATION, "source_host": DESTINATION}, errors.Unschedulable),
        (instance, {"migration_type": "live-migration"}, errors.InvalidCommand),
        (instance, {"instance": MIGRATION}, errors.InvalidCommand),
        (changed(instance, block_device_info=volumes), {}, errors.NotSupported),
        (changed(instance, image=elsewhere), {}, errors.Unschedulable),
    ]
    for record, changes, error in cases:
        with pytest.raises(error):
            destination.send("prep_resize", record, cell.migration(**changes), operation=OPERATION)
    destination.send("disable_host", "maintenance")
    with pytest.raises(errors.HostDisabled):
        cell.resize()
    assert cell.owners() == [SOURCE]
    assert cell[SOURCE].host.running(UUID)
    assert cell.leftovers(DESTINATION) == set()
    assert cell.used_mb(DESTINATION) == 0
    assert destination.worker.core.moves.list(False) == []


def test_a_source_that_refuses_ends_it_and_nothing_changes(cell):
    """Another operation holds the instance, or its state does not allow it."""
    cell.boot()
    assert cell[SOURCE].do("suspend_instance", UUID).state is OperationState.DONE
    cell.resize()
    found = cell.outcome(DESTINATION)
    assert found.state is OperationState.UNDONE
    assert "vm_state" in found.error["message"]
    cell.quiet()
    assert cell.leftovers(DESTINATION) == set()
    assert cell.used_mb(DESTINATION) == 0
    assert cell[SOURCE].instance(UUID).vm_state is VmState.SUSPENDED


def test_unknown_source_host_ends_it(cell):
    instance = cell.boot()
    migration = cell.migration(source_host="node9")
    cell[DESTINATION].send("prep_resize", instance, migration, operation=OPERATION)
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    assert cell.used_mb(DESTINATION) == 0


def test_cancel_before_the_hand_over_runs_on_at_the_source(cell):
    cell.boot()
    cell[SOURCE].host.faults.stall("send_disk")
    cell.resize()
    wait_for(lambda: cell[SOURCE].host.power_of(UUID) is PowerState.NOSTATE, what="the guest to be set aside")
    cell[DESTINATION].send("cancel_operation", OPERATION)
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    cell.quiet()
    assert cell[SOURCE].host.running(UUID)
    assert cell.leftovers(DESTINATION) == set()


def test_cancel_at_the_source_while_the_destination_decides(cell):
    """After HANDED_OVER the cancel is the destination's to answer."""
    cell.boot()
    cell[DESTINATION].host.faults.stall("grow_disks")
    cell.resize()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the hand-over")
    cell[SOURCE].send("cancel_operation", OPERATION)
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    cell.quiet()
    assert cell[SOURCE].host.running(UUID)
    assert cell.leftovers(DESTINATION) == set()


def test_the_window_confirms_by_itself(tmp_path):
    cell = Cell(tmp_path, resize_confirm_window=0.2)
    cell.boot()
    cell.resized()
    wait_for(lambda: cell[DESTINATION].instance(UUID).vm_state is VmState.ACTIVE, what="the window to end")
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.close()


def test_confirm_and_revert_are_one_decision(cell):
    from compute_worker import errors

    cell.boot()
    cell.resized()
    assert cell[DESTINATION].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE
    with pytest.raises(errors.MigrationNotFinished):
        cell[DESTINATION].send("revert_resize", UUID, MIGRATION)
    # Again, and by the other host: it is done already.
    assert cell[DESTINATION].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    assert cell[SOURCE].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE


def test_asked_at_the_source_it_says_where_the_instance_went(cell):
    from compute_worker import errors

    cell.boot()
    cell.resized()
    with pytest.raises(errors.InstanceMoved) as caught:
        cell[SOURCE].worker.core.store.get(UUID)
    assert caught.value.host == DESTINATION
    assert [i.host for i in cell[SOURCE].worker.core.store.list(since=0)] == [DESTINATION]


def test_it_moves_back_and_forth(cell):
    cell.boot()
    cell.resized()
    assert cell[DESTINATION].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    other = "cccccccc-0000-4000-8000-000000000002"
    back = cell.migration(uuid=other, source_host=DESTINATION, dest_host=SOURCE, new_flavor=None)
    cell[SOURCE].send("prep_resize", cell[DESTINATION].instance(UUID), back, operation=DECISION)
    assert cell.outcome(SOURCE, DECISION).state is OperationState.DONE, cell.outcome(SOURCE, DECISION).error
    cell.quiet()
    assert cell.owners() == [SOURCE]
    assert cell[SOURCE].host.read_disk(UUID).endswith(WRITTEN)
    assert cell.used_mb(SOURCE) == 256
