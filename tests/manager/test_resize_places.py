"""Moves that stay on their host, that are passed on to another, and many at once."""

from __future__ import annotations

import pytest

from compute_worker.errors import DiskFull
from compute_worker.objects import Migration
from compute_worker.states import OperationState, PowerState, VmState
from tests.manager.cell import (
    BIGGER,
    DECISION,
    DESTINATION,
    MIGRATION,
    OPERATION,
    SOURCE,
    THIRD,
    UUID,
    WRITTEN,
    Cell,
    new_uuid,
)
from tests.manager.machine import make_instance, quiet_deaths
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def alone(tmp_path):
    cell = Cell(tmp_path, (SOURCE,), allow_resize_to_same_host=True)
    yield cell
    cell.close()


@pytest.fixture
def three(tmp_path):
    cell = Cell(tmp_path, (SOURCE, DESTINATION, THIRD))
    yield cell
    cell.close()


def in_place(cell: Cell) -> None:
    cell.boot()
    cell.resize(dest_host=SOURCE)
    cell.quiet()
    record = cell[SOURCE].instance(UUID)
    assert record.vm_state is VmState.RESIZED, [o.error for o in cell[SOURCE].worker.operations.list(None, UUID, False)]
    assert record.flavor == BIGGER
    assert cell[SOURCE].host.running(UUID)
    assert cell.used_mb(SOURCE) == 128 + 256


def test_a_resize_in_place_confirmed(alone):
    in_place(alone)
    assert alone[SOURCE].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE
    alone.quiet()
    assert alone[SOURCE].instance(UUID).vm_state is VmState.ACTIVE
    assert alone.leftovers(SOURCE) == {"directory", "domain"}
    assert alone.used_mb(SOURCE) == 256
    assert alone[SOURCE].host.read_disk(UUID).endswith(WRITTEN)


def test_a_resize_in_place_reverted(alone):
    in_place(alone)
    assert alone[SOURCE].do("revert_resize", UUID, MIGRATION).state is OperationState.DONE
    alone.quiet()
    record = alone[SOURCE].instance(UUID)
    assert (record.vm_state, record.flavor.memory_mb) == (VmState.ACTIVE, 128)
    assert alone.leftovers(SOURCE) == {"directory", "domain"}
    assert alone.used_mb(SOURCE) == 128
    assert alone[SOURCE].host.running(UUID)
    assert alone.simulated.violations == []


def test_a_resize_in_place_that_fails_goes_back(alone):
    alone.boot()
    alone[SOURCE].host.faults.fail("grow_disks", DiskFull(path="instances"), times=1)
    alone.resize(dest_host=SOURCE)
    alone.quiet()
    record = alone[SOURCE].instance(UUID)
    assert (record.vm_state, record.flavor.memory_mb) == (VmState.ACTIVE, 128)
    assert alone.leftovers(SOURCE) == {"directory", "domain"}
    assert alone.used_mb(SOURCE) == 128
    assert alone[SOURCE].host.running(UUID)


def test_deleted_while_resized_in_place(alone):
    in_place(alone)
    assert alone[SOURCE].do("terminate_instance", UUID).state is OperationState.DONE
    alone.quiet()
    assert alone.leftovers(SOURCE) == set()
    assert alone.used_mb(SOURCE) == 0


def on_third(cell: Cell) -> None:
    wait_for(lambda: cell.owners() == [THIRD], deadline=30, what="the third host to own it")
    cell.quiet()
    assert cell[THIRD].instance(UUID).vm_state is VmState.RESIZED
    assert cell[THIRD].host.running(UUID)
    assert cell[THIRD].host.read_disk(UUID).endswith(WRITTEN)
    assert cell.leftovers(DESTINATION) == set()
    assert cell.used_mb(DESTINATION) == 0
    assert cell.leftovers(SOURCE) == {"resize"}
    assert cell.simulated.violations == []


def test_a_destination_that_refuses_passes_it_on(three):
    three.boot()
    three[DESTINATION].send("disable_host", "maintenance")
    three.resize(alternates=[THIRD])
    on_third(three)


def test_a_destination_that_fails_passes_it_on_once_the_guest_is_back(three):
    three.boot()
    three[DESTINATION].host.faults.fail("grow_disks", DiskFull(path="instances"), times=1)
    three.resize(alternates=[THIRD])
    on_third(three)
    assert three[THIRD].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE
    wait_for(lambda: three.leftovers(SOURCE) == set(), what="the copy to go")


def test_no_host_is_left(three):
    three.boot()
    for name in (DESTINATION, THIRD):
        three[name].host.faults.fail("grow_disks", DiskFull(path="instances"), times=1)
    three.resize(alternates=[THIRD])
    wait_for(lambda: three[THIRD].worker.core.moves.list(False), deadline=30, what="the third host to be asked")
    three.quiet()
    assert three.owners() == [SOURCE]
    assert three[SOURCE].host.running(UUID)
    assert all(three.leftovers(name) == set() for name in (DESTINATION, THIRD))


def test_no_host_takes_it(three):
    three.boot()
    for name in (DESTINATION, THIRD):
        three[name].send("disable_host", "maintenance")
    three.resize(alternates=[THIRD])
    assert three.outcome(DESTINATION).state is OperationState.UNDONE
    assert three[SOURCE].host.running(UUID)


def test_a_cancelled_move_is_passed_on_to_nobody(three):
    three.boot()
    three[SOURCE].host.faults.stall("send_disk")
    three.resize(alternates=[THIRD])
    wait_for(lambda: three[SOURCE].host.power_of(UUID) is PowerState.NOSTATE, what="the guest to be set aside")
    three[DESTINATION].send("cancel_operation", OPERATION)
    three.quiet()
    assert three.owners() == [SOURCE]
    assert three[THIRD].worker.core.moves.list(False) == []
    assert DECISION


def test_twenty_moves_at_once_in_both_directions(tmp_path):
    """Limits of one in each direction: they wait for each other and none for ever."""
    cell = Cell(tmp_path, max_concurrent_inbound=1, max_concurrent_outbound=1)
    moves = []
    for number in range(1, 21):
        source, destination = (SOURCE, DESTINATION) if number % 2 else (DESTINATION, SOURCE)
        instance = make_instance(number)
        assert cell[source].do("build_and_run_instance", instance).state is OperationState.DONE
        moves.append((source, destination, instance.uuid, new_uuid()))
    for source, destination, uuid, operation in moves:
        migration = Migration(uuid=new_uuid(), instance=uuid, source_host=source, dest_host=destination)
        cell[destination].send("prep_resize", cell[source].instance(uuid), migration, operation=operation)
    for _, destination, uuid, operation in moves:
        assert cell[destination].outcome(operation, wait=60).state is OperationState.DONE
        assert cell[destination].host.running(uuid)
    cell.quiet()
    assert cell.simulated.violations == []
    cell.close()
