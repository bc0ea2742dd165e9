"""Schedules of moves that need more than one kill or one lost message: each broke a rule once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest

from compute_worker import errors
from compute_worker.manager import resize_force
from compute_worker.moves import Side
from compute_worker.operations.service import MAX_EXPIRY
from compute_worker.states import MigrationStatus, OperationState, VmState
from tests.manager.cell import DECISION, DESTINATION, MIGRATION, OPERATION, SOURCE, THIRD, UUID, WRITTEN, Cell, new_uuid
from tests.manager.machine import Machine, make_instance, quiet_deaths
from tests.manager.net import Mishap
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path)
    yield cell
    cell.close()


def resized(cell: Cell) -> None:
    cell.boot()
    cell.resized()
    cell.quiet()


def off(cell: Cell) -> None:
    cell[DESTINATION].kill()
    cell[DESTINATION].host.power_failure()


def back(cell: Cell) -> None:
    cell[DESTINATION].host.power_restore()
    cell[DESTINATION].restart()


def prune(machine: Machine, moves: bool = True) -> None:
    """What the worker forgets when days have passed."""
    worker = machine.worker
    worker.operations._key_retention = -MAX_EXPIRY - 1
    worker.operations.prune()
    if moves:
        worker.core.moves.prune(time.time() + 1)


def one_copy(cell: Cell, owner: str) -> None:
    assert cell.simulated.violations == []
    assert cell.owners() == [owner]
    assert cell.simulated.running_copies(UUID) == [owner]


def test_a_forced_take_back_beats_a_confirm_that_waits(cell):
    """The confirm at the source must not drop the only copy there is, because the other host is off."""
    resized(cell)
    off(cell)
    cell[SOURCE].send("confirm_resize", UUID, MIGRATION, operation=DECISION)
    wait_for(lambda: cell.phase(SOURCE, DECISION) == "ask_destination", what="the confirm to wait")
    forced = cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    assert cell[SOURCE].outcome(forced).state is OperationState.DONE, cell[SOURCE].outcome(forced).error
    assert cell.outcome(SOURCE, DECISION).state is OperationState.UNDONE
    assert cell[SOURCE].host.running(UUID)
    assert cell[SOURCE].host.read_disk(UUID).endswith(WRITTEN)


def test_a_revert_waits_until_the_move_has_ended(cell):
    """The move is FINISHED before its guest runs: a revert that comes between must not race with its start."""
    cell.boot()

    def revert() -> None:
        destination = cell[DESTINATION]
        destination.send("revert_resize", UUID, MIGRATION, operation=DECISION)
        aside = threading.Event()
        destination.at[("revert_resize", "await_outcome", "do", "after_record")] = aside.set
        aside.wait(1.5)

    cell[DESTINATION].at[("prep_resize", "resume_guest", "do", "before_do")] = revert
    cell.resize()
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    assert cell.outcome(DESTINATION, DECISION).state is OperationState.DONE
    cell.quiet()
    one_copy(cell, SOURCE)
    assert cell.leftovers(DESTINATION) == set()


def in_doubt(cell: Cell) -> None:
    """The destination has committed and confirmed; the source was dead before it heard of either."""
    cell.boot()
    cell[SOURCE].die_at = ("resize_instance", "await_outcome", "do", "before_do")
    cell.resize()
    wait_for(cell[SOURCE].dead.is_set, what="the source to die")
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    assert cell[DESTINATION].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE


@pytest.mark.parametrize("moves", [False, True])
def test_a_source_that_was_away_for_days_does_not_take_back(cell, moves):
    in_doubt(cell)
    prune(cell[DESTINATION], moves)
    cell[SOURCE].restart()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    one_copy(cell, DESTINATION)
    assert cell.used_mb(SOURCE) == 0


def test_a_source_that_was_away_for_days_does_not_revive_what_was_deleted(cell):
    in_doubt(cell)
    assert cell[DESTINATION].do("terminate_instance", UUID).state is OperationState.DONE
    prune(cell[DESTINATION])
    cell[SOURCE].restart()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    assert cell.simulated.running_copies(UUID) == []
    assert cell.used_mb(SOURCE) == 0


def lose_journal(machine: Machine) -> None:
    machine.kill()
    for file in Path(machine.settings.compute.state_path).glob("journal.sqlite*"):
        file.unlink()
    machine.restart()


def test_a_destination_that_lost_its_journal_after_the_confirm_still_owns_it(cell):
    in_doubt(cell)
    lose_journal(cell[DESTINATION])
    cell[SOURCE].restart()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    one_copy(cell, DESTINATION)


def test_a_destination_that_was_away_for_days_does_not_start_what_was_given_back(cell):
    resized(cell)
    cell[DESTINATION].die_at = ("revert_resize", "await_outcome", "do", "before_do")
    cell[DESTINATION].send("revert_resize", UUID, MIGRATION, operation=DECISION)
    wait_for(cell[DESTINATION].dead.is_set, what="the destination to die")
    assert cell.outcome(SOURCE, DECISION).state is OperationState.DONE
    prune(cell[SOURCE])
    cell[DESTINATION].restart()
    assert cell.outcome(DESTINATION, DECISION).state is OperationState.DONE
    cell.quiet()
    one_copy(cell, SOURCE)
    assert cell.leftovers(DESTINATION) == set()


def test_a_later_attempt_that_comes_late_does_not_move_it_again(cell):
    """A host that was passed over may ask the source long after another attempt has succeeded, or was reverted."""
    resized(cell)
    late = {"operation": OPERATION}
    with pytest.raises(errors.InstanceMoved):
        cell[SOURCE].send("resize_instance", UUID, cell.migration(attempt=2), **late)
    assert cell[DESTINATION].do("revert_resize", UUID, MIGRATION).state is OperationState.DONE
    cell.quiet()
    with pytest.raises(errors.OperationRefusedBefore):
        cell[SOURCE].send("resize_instance", UUID, cell.migration(attempt=3), **late)
    one_copy(cell, SOURCE)


@pytest.mark.parametrize("at", [SOURCE, DESTINATION])
def test_a_delete_just_after_the_revert_was_recorded(cell, at):
    resized(cell)
    deletes: list[str] = []
    point = ("revert_resize", "commit", "do", "after_record")
    cell[DESTINATION].at[point] = lambda: deletes.append(cell[at].send("terminate_instance", UUID))
    cell[DESTINATION].send("revert_resize", UUID, MIGRATION, operation=DECISION)
    wait_for(lambda: deletes, what="the delete")
    assert cell[at].outcome(deletes[0]).state is OperationState.DONE
    cell.quiet()
    assert cell.owners() == []
    for name in cell.machines:
        assert cell.leftovers(name) == set(), name
        assert cell.used_mb(name) == 0, name


def test_a_source_without_a_hypervisor_is_not_silent(cell):
    """It took the guest back by force, and its worker answers though its hypervisor does not."""
    cell.boot()
    cell[DESTINATION].die_at = ("prep_resize", "commit", "do", "after_record")
    cell.resize()
    wait_for(cell[DESTINATION].dead.is_set, what="the destination to die")
    cell[DESTINATION].host.power_failure()
    cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    cell[SOURCE].settle(UUID)
    cell[SOURCE].host.faults.fail("list_leftovers", errors.HypervisorUnavailable(reason="it is down"), times=4)
    back(cell)
    cell.outcome(DESTINATION)
    cell.quiet()
    one_copy(cell, SOURCE)


def test_a_confirm_of_what_was_taken_back_by_force_gives_it_up(tmp_path):
    cell = Cell(tmp_path, resume_guests_state_on_host_boot=False)
    resized(cell)
    off(cell)
    forced = cell[SOURCE].send("take_back_instance", UUID, MIGRATION, destination_is_off=True)
    assert cell[SOURCE].outcome(forced).state is OperationState.DONE
    back(cell)
    cell[DESTINATION].send("confirm_resize", UUID, MIGRATION, operation=DECISION)
    cell.outcome(DESTINATION, DECISION)
    cell.quiet()
    one_copy(cell, SOURCE)
    assert cell.leftovers(DESTINATION) == {"resize"}
    assert cell.used_mb(DESTINATION) == 0
    cell.close()


def test_a_hand_over_that_is_refused_ends_the_move(cell, monkeypatch):
    """A destination of another release: neither host may wait for the other for ever."""
    cell.boot()
    send = cell.net.send

    def refuse(source, host, method, args, options):
        if method == "finish_resize":
            raise errors.InvalidCommand(method=method, problem="unknown argument")
        return send(source, host, method, args, options)

    monkeypatch.setattr(cell.net, "send", refuse)
    cell.resize()
    assert cell.outcome(DESTINATION).state is OperationState.UNDONE
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    cell.quiet()
    one_copy(cell, SOURCE)
    assert cell.leftovers(DESTINATION) == set()


def test_a_full_queue_refuses_nothing_that_never_waits_in_it(cell):
    cell.boot()
    operations = cell[DESTINATION].worker.operations
    point = ("prep_resize", "await_disks", "do", "before_do")
    cell[DESTINATION].at[point] = lambda: setattr(operations, "_max_queued", 0)
    cell.resize()
    assert cell.outcome(DESTINATION).state is OperationState.DONE, cell.outcome(DESTINATION).error


def test_confirmed_in_place_before_the_source_side_has_recorded_the_end(tmp_path):
    cell = Cell(tmp_path, (SOURCE,), allow_resize_to_same_host=True)
    cell.boot()
    machine = cell[SOURCE]
    point = ("resize_instance", "await_outcome", "do", "before_do")
    machine.at[point] = lambda: cell.net.mishaps.update(settle_operation=Mishap("lose", 10**6))
    cell.resize(dest_host=SOURCE)
    moves = machine.worker.core.moves
    wait_for(
        lambda: any(m.status is MigrationStatus.FINISHED for m in moves.list() if m.side is Side.DESTINATION)
        and machine.instance(UUID).task_state is None,
        what="the destination's side to end",
    )
    assert machine.do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE
    cell.net.mishaps.clear()
    cell.quiet()
    assert moves.list() == []
    assert machine.instance(UUID).vm_state is VmState.ACTIVE
    assert cell.used_mb(SOURCE) == 256
    cell.close()


ASKED = ("drop_resize", "ask_destination", "do", "before_do")


def confirmed_unheard(cell: Cell) -> None:
    """Confirmed at the destination; the source has not heard of it, and asks when this returns."""
    resized(cell)
    cell.net.mishaps["confirm_resize"] = Mishap("lose", 1)
    cell.net.mishaps["get_migration"] = Mishap("lose", 10**6)
    assert cell[DESTINATION].do("confirm_resize", UUID, MIGRATION).state is OperationState.DONE


def test_the_copy_goes_though_the_destination_is_busy_when_it_is_asked(cell):
    confirmed_unheard(cell)
    stall = cell[DESTINATION].host.faults.stall("pause")
    cell[SOURCE].at[ASKED] = lambda: cell[DESTINATION].send("pause_instance", UUID)
    cell.net.mishaps.clear()
    wait_for(lambda: (SOURCE, DESTINATION, "confirm_resize") in cell.net.sent, what="the source to ask")
    stall.release()
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    assert cell.used_mb(SOURCE) == 0


def test_the_copy_goes_though_dropping_it_was_cancelled(cell):
    confirmed_unheard(cell)

    def cancel() -> None:
        drop = next(o for o in cell[SOURCE].worker.operations.list(None, UUID, True) if o.kind == "drop_resize")
        cell[SOURCE].send("cancel_operation", drop.uuid)

    cell[SOURCE].at[ASKED] = cancel
    cell.net.mishaps.clear()
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()
    assert cell.used_mb(SOURCE) == 0


def test_a_source_that_is_away_holds_no_slot(tmp_path):
    cell = Cell(tmp_path, (SOURCE, DESTINATION, THIRD), max_concurrent_inbound=1)
    cell.boot()
    other = make_instance(2)
    assert cell[THIRD].do("build_and_run_instance", other).state is OperationState.DONE
    cell.net.cut.add(SOURCE)
    cell.resize()
    wait_for(lambda: cell.phase(DESTINATION) == "ask_source", what="the first move to wait")
    second = cell.migration(uuid=new_uuid(), instance=other.uuid, source_host=THIRD)
    operation = cell[DESTINATION].send("prep_resize", cell[THIRD].instance(other.uuid), second)
    assert cell[DESTINATION].outcome(operation).state is OperationState.DONE
    cell.net.cut.clear()
    assert cell.outcome(DESTINATION).state is OperationState.DONE
    cell.close()


def test_force_that_comes_with_the_commit_changes_nothing(cell):
    """It was POST_MIGRATING when the operator's command was looked at, and FINISHED when it was written."""
    resized(cell)
    core = cell[SOURCE].worker.core
    with pytest.raises(errors.InvalidState):
        core.database.write(lambda tx: resize_force.admit(core, tx, UUID, MIGRATION, finished=False))
    assert core.moves.get(MIGRATION, Side.SOURCE).status is MigrationStatus.FINISHED


def test_it_does_not_come_back_before_its_copy_was_dropped(cell):
    """The copy set aside here is still the earlier move's."""
    confirmed_unheard(cell)
    again = cell.migration(uuid=new_uuid(), source_host=DESTINATION, dest_host=SOURCE, new_flavor=None)
    with pytest.raises(errors.InstanceBusy):
        cell[SOURCE].send("prep_resize", cell[DESTINATION].instance(UUID), again)


def test_what_is_on_its_way_here_is_not_adopted(cell):
    """The comparison had read what moves before the move was accepted, and finds its record beside its disks."""
    cell.boot()
    stall = cell[DESTINATION].host.faults.stall("grow_disks")
    cell.resize()
    assert stall.entered.wait(10)
    cell[DESTINATION].worker.recovery._strangers({}, set())
    assert cell[DESTINATION].instance(UUID) is None
    stall.release()
    assert cell.outcome(DESTINATION).state is OperationState.DONE


def test_a_list_of_moves_looks_at_the_disks_once(cell):
    resized(cell)
    looked: list[str] = []
    cell[SOURCE].host.faults.hook("list_leftovers", looked.append, times=None)
    core = cell[SOURCE].worker.core
    move = core.moves.get(MIGRATION, Side.SOURCE)
    for _ in range(3):
        earlier = cell.migration(uuid=new_uuid(), status=MigrationStatus.ERROR)
        copy = msgspec.structs.replace(move, migration=earlier)
        core.database.write(lambda tx, c=copy: core.moves.put(tx, c))
    found = cell[SOURCE].ask("list_migrations", open_only=False)
    assert len(found) == 4
    assert all(side.has_copy for side in found)
    assert len(looked) == 1
