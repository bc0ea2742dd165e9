"""A source whose step fails while the destination decides: whatever it was, the destination's decision stands."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from compute_worker import errors
from compute_worker.states import OperationState
from tests.manager.cell import DECISION, DESTINATION, MIGRATION, OPERATION, SOURCE, UUID, Cell
from tests.manager.machine import Machine, quiet_deaths
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path)
    yield cell
    cell.close()


class Unwell:
    """A host that answers each question of what became of a command by ``error``, until it is well."""

    def __init__(self, machine: Machine, error: Exception) -> None:
        self.asked = 0
        self.well = threading.Event()
        operations = machine.worker.operations
        settle = operations.settle

        def answer(*args, **kwargs):
            if not self.well.is_set():
                self.asked += 1
                raise error
            return settle(*args, **kwargs)

        operations.settle = answer


def undoing(machine: Machine, operation: str) -> bool:
    return machine.worker.operations.get(operation).state is OperationState.UNDOING


def held(machine: Machine, point: tuple[str, str, str, str]) -> threading.Event:
    """The host's operation waits at ``point`` for the event."""
    go_on = threading.Event()
    machine.at[point] = lambda: go_on.wait(30)
    return go_on


def wait_until_asked_in_vain(source: Machine, operation: str, asked: Callable[[], int]) -> None:
    """More often than a step is tried."""
    wait_for(lambda: asked() > 6 or undoing(source, operation), deadline=30, what="the source to ask in vain")


def one_copy(cell: Cell, owner: str) -> None:
    cell.quiet()
    assert cell.owners() == [owner]
    assert cell.simulated.running_copies(UUID) == [owner]
    assert cell.simulated.violations == []


UNABLE = [errors.StoreBusy("the journal cannot be written: disk is full"), errors.ComputeError("internal error")]


@pytest.mark.parametrize("error", UNABLE, ids=["no room", "defect"])
def test_a_destination_that_cannot_answer_now_has_said_nothing(cell, error):
    """Its disk is full while it takes the instance: it can say nothing, and then it commits."""
    cell.boot()
    go_on = held(cell[DESTINATION], ("prep_resize", "check_source", "do", "before_do"))
    cell.resize()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the source to hand over")
    unwell = Unwell(cell[DESTINATION], error)
    wait_until_asked_in_vain(cell[SOURCE], OPERATION, lambda: unwell.asked)
    unwell.well.set()
    go_on.set()
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    one_copy(cell, DESTINATION)


@pytest.mark.parametrize("error", UNABLE, ids=["no room", "defect"])
def test_a_destination_of_a_live_migration_that_cannot_answer_now_has_said_nothing(cell, error):
    cell.boot()
    go_on = held(cell[DESTINATION], ("pre_live_migration", "commit", "do", "before_record"))
    cell.migrate()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the guest to land")
    unwell = Unwell(cell[DESTINATION], error)
    wait_until_asked_in_vain(cell[SOURCE], OPERATION, lambda: unwell.asked)
    unwell.well.set()
    go_on.set()
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    one_copy(cell, DESTINATION)


def test_a_source_that_cannot_answer_a_revert_now_has_said_nothing(cell):
    cell.boot()
    cell.resized()
    go_on = held(cell[SOURCE], ("finish_revert_resize", "commit", "do", "before_record"))
    cell[DESTINATION].send("revert_resize", UUID, MIGRATION, operation=DECISION)
    wait_for(lambda: cell.phase(DESTINATION, DECISION) == "await_outcome", what="the destination to hand back")
    unwell = Unwell(cell[SOURCE], UNABLE[0])
    wait_until_asked_in_vain(cell[DESTINATION], DECISION, lambda: unwell.asked)
    unwell.well.set()
    go_on.set()
    assert cell.outcome(DESTINATION, DECISION).state is OperationState.DONE
    one_copy(cell, SOURCE)


def test_a_source_that_fails_when_the_guest_has_landed_ends_as_the_destination_has_decided(cell, monkeypatch):
    """Its own journal has no room just then, for longer than a step is tried; the guest is at the destination."""
    cell.boot()
    moves = cell[SOURCE].worker.core.moves
    change, failed = moves.change, []

    def full(tx, migration, side, status=None, **changes):
        if changes.get("landed") and len(failed) < 6 and not undoing(cell[SOURCE], OPERATION):
            failed.append(1)
            raise errors.StoreBusy("the journal cannot be written: disk is full")
        return change(tx, migration, side, status, **changes)

    monkeypatch.setattr(moves, "change", full)
    cell.migrate()
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    assert failed
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    one_copy(cell, DESTINATION)
    assert cell.used_mb(SOURCE) == 0
