"""What is left over between real managers: told with its reason, removed only where nobody needs it."""

from __future__ import annotations

import dataclasses
import uuid

import pytest

from compute_worker import errors
from compute_worker.manager.doctor import METHOD
from compute_worker.moves import Move, Side
from compute_worker.objects import Finding
from compute_worker.operations.executor import Point
from compute_worker.states import OperationState
from tests.manager.cell import DECISION, DESTINATION, MIGRATION, SOURCE, UUID, Cell
from tests.manager.machine import Machine, make_instance, quiet_deaths
from tests.waiting import wait_for

STRANGER = make_instance(9).uuid


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path)
    yield cell
    cell.close()


def findings(machine: Machine) -> list[Finding]:
    return machine.worker.doctor.list_leftovers(machine.context())


def told(machine: Machine) -> set[tuple[str, bool, bool]]:
    return {(found.kind, found.safe, found.kept) for found in findings(machine)}


def repair(machine: Machine, instance: str | None = UUID):
    return machine.outcome(machine.send(METHOD, instance, operation=str(uuid.uuid4())))


def moved(cell: Cell) -> None:
    """The instance is on the destination, confirmed, and the source's copy is gone."""
    cell.boot()
    cell.resized()
    cell[DESTINATION].send("confirm_resize", UUID, MIGRATION, operation=DECISION)
    wait_for(lambda: cell.leftovers(SOURCE) == set(), what="the copy to go")
    cell.quiet()


def leave(machine: Machine, suffix: str = "_resize", instance: str = UUID) -> None:
    """Put a directory where no operation would leave one."""
    with machine.host.cell.lock:
        slot = machine.host.slot(instance)
        slot.directories[suffix] = {}
        machine.host.changed(slot)


def test_a_host_where_all_is_well(cell):
    cell.boot()
    assert findings(cell[SOURCE]) == [] and findings(cell[DESTINATION]) == []


def test_a_copy_that_waits_for_a_decision_is_kept(cell):
    cell.boot()
    cell.resized()
    cell.quiet()
    assert told(cell[SOURCE]) == {("resize", False, True), ("move", False, True)}
    assert told(cell[DESTINATION]) == {("move", False, True)}
    with pytest.raises(errors.InvalidState, match=r"waits .*for confirm or revert"):
        repair(cell[SOURCE])
    with pytest.raises(errors.InvalidState, match="is host node2's"):
        repair(cell[DESTINATION])
    assert cell.leftovers(SOURCE) == {"resize"}


def test_what_is_left_where_the_instance_was_goes(cell):
    moved(cell)
    leave(cell[SOURCE])
    (found,) = findings(cell[SOURCE])
    assert found.safe and found.reason == "host node2 owns it and needs nothing here" and found.remedy == "remove it"
    outcome = repair(cell[SOURCE])
    assert outcome.state is OperationState.DONE, outcome.error
    assert findings(cell[SOURCE]) == [] and cell.leftovers(SOURCE) == set()
    assert cell[DESTINATION].host.running(UUID) and cell.owners() == [DESTINATION]


@pytest.mark.parametrize("why", ["silent", "shared", "unknown-directory", "does-not-own", "open-move"])
def test_without_the_owners_word_it_stays(cell, monkeypatch, why):
    moved(cell)
    leave(cell[SOURCE])
    destination = cell[DESTINATION].worker
    if why == "silent":
        cell.net.cut.add(DESTINATION)
    elif why == "shared":
        monkeypatch.setattr(cell[SOURCE].worker.core.driver.simulated, "name", DESTINATION)
    elif why == "unknown-directory":
        real = destination.core.driver.get_available_resource
        unread = dataclasses.replace(real(), instances_id="")
        destination.core.claims.refresh(unread)
    elif why == "does-not-own":
        destination.database.write(lambda tx: tx.execute("DELETE FROM instances"))
    else:
        destination.database.write(lambda tx: destination.core.moves.put(tx, open_move(cell)))
    (found,) = findings(cell[SOURCE])
    assert not found.safe and not found.kept and "node2" in found.reason
    outcome = repair(cell[SOURCE])
    assert outcome.state is OperationState.UNDONE
    assert found.reason in outcome.error["message"]
    assert cell.leftovers(SOURCE) == {"resize"}


def open_move(cell):
    """A move back that the owner knows of, and this host does not (any more)."""
    record = cell[DESTINATION].instance(UUID)
    migration = cell.migration(uuid=str(uuid.uuid4()), source_host=DESTINATION, dest_host=SOURCE)
    return Move(migration=migration, side=Side.SOURCE, instance=record, operation=migration.uuid)


def test_nobody_knows_whose_it_is(cell):
    leave(cell[SOURCE], "", STRANGER)
    (found,) = findings(cell[SOURCE])
    assert (found.kind, found.instance, found.safe) == ("directory", STRANGER, False)
    assert found.reason == "nothing says whose it is"
    assert repair(cell[SOURCE], STRANGER).state is OperationState.UNDONE
    assert cell.leftovers(SOURCE) == {"directory"}


def test_what_was_deleted_goes(cell):
    cell.boot()
    cell[SOURCE].do("terminate_instance", UUID)
    leave(cell[SOURCE], "_del")
    assert told(cell[SOURCE]) == {("del", True, False)}
    assert repair(cell[SOURCE]).state is OperationState.DONE
    assert cell.leftovers(SOURCE) == set()


def test_an_operation_that_waits_is_told(cell):
    cell.boot()
    cell[DESTINATION].at[("prep_resize", "check_source", "do", Point.BEFORE_DO)] = lambda: cell.net.cut.add(DESTINATION)
    cell.resize()

    def waits() -> list[Finding]:
        return [f for f in findings(cell[SOURCE]) if f.kind == "operation" and "does not answer" in f.reason]

    (found,) = wait_for(waits, what="the source to say what it waits for")
    assert found.kept and not found.safe and found.instance == UUID and "host node2 does not answer" in found.reason
    with pytest.raises(errors.InstanceBusy):
        repair(cell[SOURCE])
    cell.net.cut.clear()
    cell.quiet()


def test_a_move_of_the_same_uuid_waits_for_the_repair(cell):
    moved(cell)
    leave(cell[SOURCE])
    seen = []

    def back():
        record = cell[DESTINATION].instance(UUID)
        again = cell.migration(uuid=str(uuid.uuid4()), source_host=DESTINATION, dest_host=SOURCE, new_flavor=None)
        try:
            cell[SOURCE].send("prep_resize", record, again, operation=str(uuid.uuid4()))
        except errors.InstanceBusy as exc:
            seen.append(exc)

    cell[SOURCE].at[(METHOD, "ask_owner", "do", Point.AFTER_DO)] = back
    assert repair(cell[SOURCE]).state is OperationState.DONE
    assert len(seen) == 1


def test_stale_image_locks(cell, monkeypatch):
    names = ["gone"]

    def stale(remove: bool = False) -> list[str]:
        found = list(names)
        if remove:
            names.clear()
        return found

    monkeypatch.setattr(cell[SOURCE].driver, "stale_image_locks", stale)
    assert told(cell[SOURCE]) == {("lock", True, False)}
    outcome = repair(cell[SOURCE], None)
    assert outcome.state is OperationState.DONE and outcome.result == {"locks": ["gone"]}
    assert findings(cell[SOURCE]) == []


def test_check_only_changes_nothing(cell):
    moved(cell)
    leave(cell[SOURCE])
    assert cell[SOURCE].send(METHOD, UUID, check_only=True) is None
    assert cell.leftovers(SOURCE) == {"resize"}


STEPS = ("ask_owner", "commit", "power_off", "undefine", "unplug_vifs", "delete_files")


@pytest.mark.parametrize("point", list(Point))
@pytest.mark.parametrize("step", STEPS)
def test_killed_anywhere_it_goes_on(cell, step, point):
    moved(cell)
    leave(cell[SOURCE])
    source = cell[SOURCE]
    source.die_at = (METHOD, step, "do", point)
    operation = str(uuid.uuid4())
    source.send(METHOD, UUID, operation=operation)
    died = source.dead.wait(5)
    if died:
        source.restart()
    assert source.outcome(operation).state is OperationState.DONE
    assert died or (step, point) == ("commit", Point.AFTER_DO), "a commit is not done, only recorded"
    assert cell.leftovers(SOURCE) == set() and cell[DESTINATION].host.running(UUID)
