"""A destination that falls silent before the source has handed over: the guest is not kept off for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.manager.peers import Patience
from compute_worker.states import OperationState, PowerState, VmState
from tests.manager.cell import DESTINATION, OPERATION, SOURCE, UUID, Cell
from tests.manager.machine import quiet_deaths
from tests.waiting import wait_for

SENDING = ("resize_instance", "send_disk", "do", "before_do")


def cut(cell: Cell, off: bool = True) -> None:
    """Nobody reaches the destination, or everybody does again."""
    cell[DESTINATION].host.reachable = not off
    (cell.net.cut.add if off else cell.net.cut.discard)(DESTINATION)


def source_waits(cell: Cell) -> bool:
    """The source's side waits for the destination."""
    try:
        return DESTINATION in (cell[SOURCE].worker.operations.get(OPERATION).waiting_for or "")
    except errors.OperationNotFound:
        return False


@pytest.fixture
def cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cell]:
    quiet_deaths(monkeypatch)
    cell = Cell(tmp_path, peer_patience=0.5)
    yield cell
    cell.close()


def test_the_guest_is_taken_back_and_the_destination_learns_it_later(cell: Cell) -> None:
    cell.boot()
    cell[SOURCE].at[SENDING] = lambda: cut(cell)
    cell.resize()
    wait_for(lambda: source_waits(cell), what="the source to wait")
    ended = cell.outcome(SOURCE)
    assert ended.state is OperationState.UNDONE
    assert ended.error is not None and f"host {DESTINATION} has been silent" in ended.error["message"]
    record = cell[SOURCE].instance(UUID)
    assert (record.vm_state, record.power_state, record.task_state) == (VmState.ACTIVE, PowerState.RUNNING, None)
    assert cell[SOURCE].host.running(UUID)
    cut(cell, off=False)
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    cell.quiet()
    assert cell.leftovers(DESTINATION) == set() and cell.used_mb(DESTINATION) == 0
    assert cell.owners() == [SOURCE] and cell.simulated.violations == []


def test_a_short_silence_is_waited_out(cell: Cell) -> None:
    cell.boot()
    cell[SOURCE].at[SENDING] = lambda: cut(cell)
    cell.resize()
    wait_for(lambda: source_waits(cell), what="the source to wait")
    cut(cell, off=False)
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    assert cell.outcome(SOURCE).state is OperationState.DONE


def test_after_the_hand_over_it_is_waited_for(cell: Cell) -> None:
    """From then on only the destination, or an operator, can say that it has not got the guest."""
    cell.boot()
    cell[SOURCE].at["resize_instance", "hand_over", "do", "before_do"] = lambda: cut(cell)
    cell.resize()
    wait_for(lambda: source_waits(cell), what="the source to wait")
    patience = Patience(DESTINATION, 0.5)
    with pytest.raises(errors.MigrationFailed):
        wait_for(lambda: patience.failed("m"), what="longer than the patience")
    assert cell[SOURCE].worker.operations.get(OPERATION).state is OperationState.RUNNING
    assert not cell[SOURCE].host.running(UUID)
    cut(cell, off=False)
    assert cell.outcome(DESTINATION).state is OperationState.DONE


def test_patience_begins_anew_with_every_answer() -> None:
    now = [100.0]
    patience = Patience("node2", 60.0, clock=lambda: now[0])
    patience.failed("m")
    now[0] += 59
    patience.failed("m")
    patience.heard()
    patience.asks()
    now[0] += 20
    patience.failed("m")
    patience.asks()
    now[0] += 40
    with pytest.raises(errors.MigrationFailed, match="host node2 has been silent for 60 s"):
        patience.failed("m")
