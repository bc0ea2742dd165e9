"""Moves whose destination has lost its journal before the decision: they are decided all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.manager import resize_source
from compute_worker.moves import Side
from compute_worker.states import MigrationStatus, OperationState, VmState
from tests.manager.cell import DECISION, DESTINATION, MIGRATION, OPERATION, SOURCE, UUID, WRITTEN, Cell
from tests.manager.machine import quiet_deaths
from tests.manager.net import Mishap
from tests.waiting import wait_for

DONE = OperationState.DONE


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path)
    yield cell
    cell.close()


def forgotten(cell: Cell, told: bool = True) -> None:
    """Resized, and the destination has lost its journal; ``told``: the source has told it of the move since."""
    cell.boot()
    cell.resized()
    cell.quiet()
    if not told:
        cell.net.mishaps["get_migration"] = Mishap("lose", 10**6)
    lose_journal(cell)
    if told:
        heard_again(cell)


def lose_journal(cell: Cell) -> None:
    destination = cell[DESTINATION]
    destination.kill()
    for file in Path(destination.settings.compute.state_path).glob("journal.sqlite*"):
        file.unlink()
    destination.restart()


def heard_again(cell: Cell) -> None:
    destination = cell[DESTINATION]
    wait_for(destination.worker.core.moves.list, what="the destination to know of the move again")
    record = destination.instance(UUID)
    assert (record.vm_state, record.migration, record.task_state) == (VmState.RESIZED, MIGRATION, None)


def one_copy(cell: Cell, owner: str) -> None:
    assert cell.simulated.violations == []
    assert cell.owners() == [owner]
    assert cell.simulated.running_copies(UUID) == [owner]
    record = cell[owner].instance(UUID)
    assert (record.vm_state, record.migration, record.task_state) == (VmState.ACTIVE, None, None)
    assert cell[owner].host.read_disk(UUID).endswith(WRITTEN)
    other = SOURCE if owner == DESTINATION else DESTINATION
    assert cell.leftovers(other) == set() and cell.used_mb(other) == 0


def test_it_is_confirmed(cell):
    forgotten(cell)
    assert cell[DESTINATION].do("confirm_resize", UUID, MIGRATION).state is DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    one_copy(cell, DESTINATION)
    assert cell.used_mb(DESTINATION) == 256


def test_it_is_reverted(cell):
    forgotten(cell)
    assert cell[DESTINATION].do("revert_resize", UUID, MIGRATION).state is DONE
    cell.quiet()
    one_copy(cell, SOURCE)
    assert cell.used_mb(SOURCE) == 128


def test_the_source_need_not_have_told_it_yet(cell):
    """Sent to the source, the confirm goes through at once; at the destination it says what to do."""
    forgotten(cell, told=False)
    for method in ("confirm_resize", "revert_resize"):
        with pytest.raises(errors.MigrationNotFound, match=r"lost its journal: .* send it to the source"):
            cell[DESTINATION].send(method, UUID, MIGRATION, operation=DECISION)
    assert cell[SOURCE].do("confirm_resize", UUID, MIGRATION).state is DONE
    cell.net.mishaps.clear()
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    one_copy(cell, DESTINATION)


def test_the_source_had_not_heard_how_it_ended(cell):
    cell.boot()
    cell[SOURCE].die_at = ("resize_instance", "await_outcome", "do", "before_do")
    cell.resize()
    wait_for(cell[SOURCE].dead.is_set, what="the source to die")
    assert cell.outcome(DESTINATION).state is DONE
    lose_journal(cell)
    cell[SOURCE].restart()
    assert cell.outcome(SOURCE).state is DONE
    heard_again(cell)
    assert cell[DESTINATION].do("revert_resize", UUID, MIGRATION).state is DONE
    cell.quiet()
    one_copy(cell, SOURCE)


def test_a_stranger_is_not_remembered(cell):
    """The record beside the disks must bear out what is told."""
    forgotten(cell, told=False)
    destination = cell[DESTINATION]
    record = cell[SOURCE].worker.core.moves.get(MIGRATION, Side.SOURCE)
    for other in ("cccccccc-0000-4000-8000-00000000000f", MIGRATION):
        status = MigrationStatus.FINISHED if other != MIGRATION else MigrationStatus.POST_MIGRATING
        told = cell.migration(uuid=other, status=status)
        with pytest.raises(errors.MigrationNotFound):
            destination.send("finish_resize", record.instance, told, record.disk_info, operation=OPERATION)
    assert destination.worker.core.moves.list() == []
    cell.net.mishaps.clear()
    wait_for(destination.worker.core.moves.list, what="the destination to know of the move again")


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_being_undone_in_one_directory_is_no_answer_yet(cell, monkeypatch, shared):
    """On shared storage the destination removes its files where the source would put its own back."""
    cell.boot()
    told = resize_source._told
    monkeypatch.setattr(
        resize_source, "_told", lambda run: {"disk_info": told(run)["disk_info"] | {"shared": shared}}
    )
    destination, seen = cell[DESTINATION], []

    def asked() -> int:
        return cell.net.sent.count((SOURCE, DESTINATION, "settle_operation"))

    def look() -> None:
        before = asked()
        wait_for(lambda: asked() > before + 1 or cell.phase(SOURCE) != "await_outcome", what="the source to ask")
        seen.append(cell[SOURCE].worker.operations.get(OPERATION).phase)

    destination.host.faults.fail("define", errors.GuestFailed(instance=UUID, reason="no such machine type"))
    destination.at[("prep_resize", "grow_disks", "undo", "before_do")] = look
    cell.resize()
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    assert (seen == ["await_outcome"]) is shared, seen
    cell.quiet()
    one_copy(cell, SOURCE)
