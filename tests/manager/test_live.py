"""The choreography of a live migration when nothing dies, and what is refused."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.manager import live_source
from compute_worker.moves import Side
from compute_worker.states import MigrationStatus, OperationState, PowerState, VmState
from tests.manager.cell import DESTINATION, MIGRATION, OPERATION, SOURCE, UUID, WRITTEN, Cell
from tests.manager.machine import quiet_deaths
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def options():
    return {}


@pytest.fixture
def cell(tmp_path, options):
    cell = Cell(tmp_path, **options)
    yield cell
    cell.close()


def arrived(cell: Cell, vm_state: VmState = VmState.ACTIVE) -> None:
    cell.quiet()
    assert cell.owners() == [DESTINATION]
    record = cell[DESTINATION].instance(UUID)
    assert (record.vm_state, record.task_state, record.migration) == (vm_state, None, None)
    assert cell.leftovers(SOURCE) == set()
    assert cell.leftovers(DESTINATION) == {"directory", "domain"}
    assert (cell.used_mb(SOURCE), cell.used_mb(DESTINATION)) == (0, 128)
    assert cell.simulated.violations == []


def stayed(cell: Cell) -> None:
    cell.quiet()
    assert cell.owners() == [SOURCE]
    record = cell[SOURCE].instance(UUID)
    assert (record.vm_state, record.task_state, record.migration) == (VmState.ACTIVE, None, None)
    assert cell[SOURCE].host.running(UUID)
    assert cell.simulated.running_copies(UUID) == [SOURCE]
    assert cell.leftovers(DESTINATION) == set()
    assert (cell.used_mb(SOURCE), cell.used_mb(DESTINATION)) == (128, 0)
    assert cell.simulated.violations == []


def flying(cell: Cell) -> None:
    """A flight that takes for ever, in the air."""
    cell.boot()
    cell[SOURCE].host.rate = 200_000_000.0
    cell[SOURCE].host.dirty_rate = 400_000_000.0
    cell.migrate()
    wait_for(lambda: cell.simulated.flights.get(UUID), what="the flight to take off")


def test_a_running_guest_moves_with_its_memory(cell):
    cell.boot()
    before = cell[SOURCE].host.guest_memory(UUID)
    cell.migrate()
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    arrived(cell)
    after = cell[DESTINATION].host.guest_memory(UUID)
    assert after[0] == before[0]
    assert after[1] >= before[1]
    assert cell[DESTINATION].host.read_disk(UUID).endswith(WRITTEN)


def test_a_paused_guest_arrives_paused(cell):
    cell.boot()
    assert cell[SOURCE].do("pause_instance", UUID).state is OperationState.DONE
    cell.migrate()
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    arrived(cell, VmState.PAUSED)
    assert cell[DESTINATION].host.power_of(UUID) is PowerState.PAUSED


def test_there_and_back(cell):
    cell.boot()
    cell.migrate()
    arrived(cell)
    other = "cccccccc-0000-4000-8000-000000000009"
    back = cell.migration(uuid=other, source_host=DESTINATION, dest_host=SOURCE, new_flavor=None)
    operation = cell[DESTINATION].send("live_migration", UUID, back)
    assert cell[DESTINATION].outcome(operation).state is OperationState.DONE
    cell.quiet()
    assert cell.owners() == [SOURCE]
    assert cell.simulated.violations == []


@pytest.mark.parametrize("how", ["abort", "cancel"])
def test_stopped_in_the_middle_the_guest_goes_on(cell, how):
    flying(cell)
    if how == "abort":
        cell[SOURCE].send("live_migration_abort", UUID, MIGRATION)
    else:
        cell[SOURCE].send("cancel_operation", OPERATION)
    both_say(cell, "Cancelled", MigrationStatus.CANCELLED)
    stayed(cell)


def test_cancelled_at_the_destination(cell):
    flying(cell)
    cell[DESTINATION].send("cancel_operation", OPERATION)
    both_say(cell, "Cancelled", MigrationStatus.CANCELLED)
    stayed(cell)


def both_say(cell: Cell, error: str, status: MigrationStatus) -> set[str]:
    """It came to nothing on both hosts for the same reason; in whose words."""
    said = [(cell.outcome(name), side) for name, side in ((SOURCE, Side.SOURCE), (DESTINATION, Side.DESTINATION))]
    assert [found.state for found, _ in said] == [OperationState.UNDONE] * 2
    assert [found.error["class"] for found, _ in said] == [error] * 2
    cell.quiet()
    for found, side in said:
        assert cell[found.host].worker.core.moves.get(MIGRATION, side).status is status
    return {found.error["message"] for found, _ in said}


@pytest.mark.parametrize("options", [{"peer_ask_interval": 60.0}])
def test_an_abort_is_settled_at_once(cell):
    """Not when the two hosts would ask each other anyway."""
    flying(cell)
    cell[SOURCE].send("live_migration_abort", UUID, MIGRATION)
    both_say(cell, "Cancelled", MigrationStatus.CANCELLED)
    stayed(cell)


@pytest.mark.parametrize("how", ["postcopy", "pause"])
def test_forced_to_its_end(cell, how):
    flying(cell)
    cell[SOURCE].send("live_migration_force_complete", UUID, MIGRATION, how)
    assert cell.outcome(SOURCE, OPERATION).state is OperationState.DONE
    arrived(cell)


def test_a_lost_finish_reply_makes_no_second_copy(cell):
    """Rule 3: the destination runs the guest, and the source's hypervisor would let its copy run on."""
    cell.boot()
    cell[SOURCE].host.finish_timeout = 8.0
    cell[SOURCE].host.faults.fail("migrate_finish", errors.PeerUnavailable(host=DESTINATION), times=1)
    cell.migrate()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    arrived(cell)
    assert cell.simulated.running_copies(UUID) == [DESTINATION]


def test_a_silent_destination_holds_the_copy_that_was_let_run_on(cell):
    """The window of rule 3: both run for the moment it takes to look; then the source's is held until it answers."""
    cell.boot()
    cell[SOURCE].host.finish_timeout = 0.3

    def lost(uuid: str) -> None:
        cell.net.cut.add(DESTINATION)
        raise errors.PeerUnavailable(host=DESTINATION)

    cell[SOURCE].host.faults.hook("migrate_finish", lost, times=1)
    cell.migrate()
    wait_for(
        lambda: cell[SOURCE].worker.core.moves.list(False) and cell[SOURCE].worker.core.moves.list(False)[0].held,
        what="the copy to be held",
    )
    assert cell[SOURCE].host.power_of(UUID) is PowerState.PAUSED
    cell.net.cut.clear()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    cell.quiet()
    assert cell.owners() == [DESTINATION]
    assert cell.simulated.running_copies(UUID) == [DESTINATION]
    assert cell.leftovers(SOURCE) == set()


def test_the_copy_that_was_let_run_on_is_held_before_the_destination_is_asked(cell, monkeypatch):
    """An answer that does not come takes seconds, and two copies would run meanwhile."""
    seen, ask = [], live_source.peers.ask

    def looking(core, *arguments, **named):
        if core.host == SOURCE:
            seen.append(cell[SOURCE].host.power_of(UUID))
        return ask(core, *arguments, **named)

    monkeypatch.setattr(live_source.peers, "ask", looking)
    cell.boot()
    cell[SOURCE].host.finish_timeout = 0.3

    def lost(uuid: str) -> None:
        cell.net.cut.add(DESTINATION)
        raise errors.PeerUnavailable(host=DESTINATION)

    cell[SOURCE].host.faults.hook("migrate_finish", lost, times=1)
    cell.migrate()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome" and len(seen) > 2, what="it to be asked")
    cell.net.cut.clear()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    assert PowerState.RUNNING not in seen
    cell.quiet()
    assert cell.simulated.running_copies(UUID) == [DESTINATION]


def test_the_copy_that_was_let_run_on_is_held_before_the_flight_has_ended(cell, monkeypatch):
    """That the flight failed is told later than that the copy runs on: what says so first counts."""
    cell.boot()
    cell[SOURCE].host.finish_timeout = 0.3
    driver, host = cell[SOURCE].driver, cell[SOURCE].host
    fly = driver.live_migration

    def lost(uuid: str) -> None:
        cell.net.cut.add(DESTINATION)
        raise errors.PeerUnavailable(host=DESTINATION)

    def late(*arguments):
        try:
            fly(*arguments)
        finally:
            wait_for(lambda: host.power_of(UUID) is PowerState.PAUSED, what="the copy to be held")

    host.faults.hook("migrate_finish", lost, times=1)
    monkeypatch.setattr(driver, "live_migration", late)
    cell.migrate()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the end of the flight")
    cell.net.cut.clear()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    cell.quiet()
    assert cell.simulated.running_copies(UUID) == [DESTINATION]


def test_the_flight_fails_and_the_guest_goes_on(cell):
    cell.boot()
    cell[DESTINATION].host.faults.fail("receive", errors.DiskFull(path="instances"), times=1)
    cell.migrate()
    (said,) = both_say(cell, "MigrationFailed", MigrationStatus.FAILED)
    assert "no space left" in said
    stayed(cell)


@pytest.mark.parametrize("error", [errors.NotSupported(what="reading its job"), errors.HypervisorBusy(reason="x")])
def test_a_destination_that_cannot_say_whether_it_came_decides_nothing(cell, error):
    """What was prepared is not put back under a guest that flies, or has landed."""
    cell.boot()
    cell[SOURCE].host.rate = 200_000_000.0
    cell[DESTINATION].host.faults.fail("get_info", error, times=8)
    cell.migrate()
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    arrived(cell)


def test_refused_and_nothing_changes(cell):
    instance = cell.boot()
    with pytest.raises(errors.InvalidCommand):
        cell.migrate(dest_host=SOURCE)
    with pytest.raises(errors.InvalidCommand):
        cell[DESTINATION].send("live_migration", UUID, cell.migration())
    cell[DESTINATION].host.cpu_model = "another"
    with pytest.raises(errors.Unschedulable, match="processor model"):
        cell[DESTINATION].ask("check_can_live_migrate_destination", instance, cell.migration())
    cell.migrate()
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    assert "processor model" in cell.outcome(SOURCE).error["message"]
    stayed(cell)


def test_a_full_destination_is_an_answer(cell):
    cell.boot()
    cell[DESTINATION].send("disable_host", "maintenance")
    cell.migrate()
    found = cell.outcome(SOURCE)
    assert found.state is OperationState.UNDONE
    assert found.error["class"] == "HostDisabled"
    stayed(cell)


@pytest.mark.parametrize("at", [SOURCE, DESTINATION])
def test_deleted_in_flight(cell, at):
    flying(cell)
    operation = cell[at].send("terminate_instance", UUID)
    assert cell[at].outcome(operation).state is OperationState.DONE
    cell.quiet()
    assert cell.owners() == []
    assert all(cell.leftovers(name) == set() for name in cell.machines)
    assert all(cell.used_mb(name) == 0 for name in cell.machines)


@pytest.mark.parametrize("step", ["await_guest-before_do", "commit-after_record"])
def test_the_destination_loses_power_with_the_guest_that_has_landed(cell, step):
    """The guest is the destination's, seen there or not: it is started from its disks when that host is back."""
    name, _, point = step.partition("-")
    cell.boot()
    destination = cell[DESTINATION]

    def landed() -> bool:
        flight = cell.simulated.flights.get(UUID)
        return flight is not None and flight.state == "completed"

    where = ("pre_live_migration", name, "do", point)
    destination.at[where] = lambda: wait_for(landed, what="the flight to land") and None
    destination.die_at = where
    cell.migrate()
    wait_for(destination.dead.is_set, what="the destination's worker to die")
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the source to know it")
    destination.host.power_failure()
    destination.host.power_restore()
    destination.restart()
    assert cell.outcome(SOURCE).state is OperationState.DONE
    arrived(cell)
    assert destination.host.running(UUID)
    assert destination.host.read_disk(UUID).endswith(WRITTEN)
