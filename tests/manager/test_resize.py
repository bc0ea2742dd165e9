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
