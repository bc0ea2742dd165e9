"""A host that is off for good: what an operator may force, and what happens when it returns after all."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.states import OperationState, VmState
from tests.manager.cell import DESTINATION, MIGRATION, SOURCE, UUID, WRITTEN, Cell
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


def handed_over(cell: Cell) -> None:
    """The destination has everything and dies before its COMMIT."""
    cell.boot()
    cell[DESTINATION].host.faults.stall("grow_disks")
    cell.resize()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the hand-over")


def off(cell: Cell) -> None:
    cell[DESTINATION].kill()
    cell[DESTINATION].host.power_failure()


def back(cell: Cell) -> None:
    cell[DESTINATION].host.faults.clear()
    cell[DESTINATION].host.power_restore()
    cell[DESTINATION].restart()


def test_force_is_refused_while_the_destination_answers(cell):
    handed_over(cell)
    with pytest.raises(errors.InvalidState, match="answers"):
        cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    with pytest.raises(errors.InvalidState, match="destination_is_off"):
        cell[SOURCE].send("take_back_instance", UUID, MIGRATION)
    with pytest.raises(errors.InvalidState, match="answers"):
        cell[SOURCE].send("forget_host", DESTINATION)


@pytest.mark.parametrize("command", ["take_back_instance", "forget_host"])
def test_taken_back_by_force_and_the_destination_returns(cell, command):
    handed_over(cell)
    off(cell)
    if command == "take_back_instance":
        cell[SOURCE].send(command, UUID, MIGRATION, destination_is_off=True)
    else:
        cell[SOURCE].send(command, DESTINATION)
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    cell[SOURCE].settle(UUID)
    assert cell[SOURCE].host.running(UUID)
    assert cell[SOURCE].instance(UUID).generation == 1
    back(cell)
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    cell.quiet()
    assert cell.owners() == [SOURCE]
    assert cell.simulated.violations == []
    assert cell.leftovers(DESTINATION) == set()


def test_a_destination_that_had_committed_sets_its_copy_aside(cell):
    cell.boot()
    cell[DESTINATION].die_at = ("prep_resize", "commit", "do", "after_record")
    cell.resize()
    wait_for(cell[DESTINATION].dead.is_set, what="the destination to die")
    cell[DESTINATION].host.power_failure()
    cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    cell[SOURCE].settle(UUID)
    back(cell)
    cell.outcome(DESTINATION)
    cell.quiet()
    assert cell.owners() == [SOURCE]
    assert cell.simulated.running_copies(UUID) == [SOURCE]
    assert cell.simulated.violations == []
    assert cell.leftovers(DESTINATION) == {"resize"}
    with pytest.raises(errors.InstanceMoved):
        cell[DESTINATION].worker.core.store.get(UUID)


def test_a_resized_guest_is_taken_back_and_not_started_again_there(cell):
    """It ran at the destination; what it wrote there since is set aside, not lost and not run."""
    cell.boot()
    cell.resized()
    cell.quiet()
    off(cell)
    operation = cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    assert cell[SOURCE].outcome(operation).state is OperationState.DONE
    assert cell[SOURCE].host.running(UUID)
    assert cell[SOURCE].host.read_disk(UUID).endswith(WRITTEN)
    back(cell)
    wait_for(lambda: cell.leftovers(DESTINATION) == {"resize"}, what="the destination to set its copy aside")
    cell.quiet()
    assert cell.owners() == [SOURCE]
    assert cell.simulated.running_copies(UUID) == [SOURCE]
    assert cell.simulated.violations == []


def test_after_a_host_reboot_a_resized_guest_runs_again(cell):
    cell.boot()
    cell.resized()
    cell.quiet()
    off(cell)
    back(cell)
    wait_for(lambda: cell[DESTINATION].host.running(UUID), what="the guest to run")
    cell.quiet()
    assert cell[DESTINATION].instance(UUID).vm_state is VmState.RESIZED


def test_a_delete_waits_for_a_silent_host_until_it_is_forgotten(cell):
    cell.boot()
    cell.resized()
    cell.quiet()
    off(cell)
    operation = cell[SOURCE].send("terminate_instance", UUID)
    wait_for(lambda: cell[SOURCE].worker.operations.get(operation).phase == "tell_other_hosts", what="the delete")
    assert not cell[SOURCE].worker.operations.get(operation).state.final
    cell[SOURCE].send("forget_host", DESTINATION)
    assert cell[SOURCE].outcome(operation).state is OperationState.DONE
    assert cell.leftovers(SOURCE) == set()


@pytest.mark.parametrize("returns", ["before", "after"])
def test_a_delete_also_removes_the_copy_that_a_host_set_aside_for_force(cell, returns):
    """Also when the host returns only after the delete came, which waits for it."""
    cell.boot()
    cell.resized()
    cell.quiet()
    off(cell)
    operation = cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    assert cell[SOURCE].outcome(operation).state is OperationState.DONE
    if returns == "before":
        back(cell)
        wait_for(lambda: cell.leftovers(DESTINATION) == {"resize"}, what="the destination to set its copy aside")
    operation = cell[SOURCE].send("terminate_instance", UUID)
    if returns == "after":
        wait_for(lambda: cell[SOURCE].worker.operations.get(operation).waiting_for, what="the delete to wait")
        back(cell)
    assert cell[SOURCE].outcome(operation).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(DESTINATION) == set(), what="the copy to go")
    cell.quiet()
    assert cell.leftovers(SOURCE) == set() and cell.used_mb(DESTINATION) == 0
    assert cell.simulated.violations == []
