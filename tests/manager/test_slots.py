"""Who waits for a host that is silent keeps nobody else from working."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.states import OperationState
from tests.manager.cell import DESTINATION, OPERATION, SOURCE, THIRD, UUID, Cell, new_uuid
from tests.manager.machine import make_instance, quiet_deaths
from tests.waiting import wait_for

DONE = OperationState.DONE


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path, (SOURCE, DESTINATION, THIRD), max_concurrent_deletes=1, max_concurrent_outbound=1)
    yield cell
    cell.close()


def another(cell: Cell):
    """One more instance on the source."""
    other = make_instance(2)
    assert cell[SOURCE].do("build_and_run_instance", other).state is DONE
    return cell[SOURCE].instance(other.uuid)


def counts(cell: Cell) -> dict[str, int]:
    return cell[SOURCE].worker.operations.counts()[1]


def test_a_delete_that_waits_for_what_it_preempted_holds_no_slot(cell):
    """The source has handed over, and its destination is silent: what was preempted cannot end, and need not hinder."""
    cell.boot()
    other = another(cell)
    point = ("resize_instance", "hand_over", "do", "after_record")
    cell[SOURCE].at[point] = lambda: cell.net.cut.add(DESTINATION)
    cell.resize()
    wait_for(lambda: cell.phase(SOURCE) == "await_outcome", what="the source to wait")
    waiting = cell[SOURCE].send("terminate_instance", UUID)
    wait_for(lambda: "cancelled" in (cell[SOURCE].worker.operations.get(waiting).waiting_for or ""), what="it to wait")
    assert cell[SOURCE].do("terminate_instance", other.uuid).state is DONE
    assert cell.phase(SOURCE, waiting) == "await_operations"
    cell.net.cut.clear()
    assert cell[SOURCE].outcome(waiting).state is DONE
    cell.quiet()
    for name in (SOURCE, DESTINATION):
        assert cell.leftovers(name) == set(), name
        assert cell.used_mb(name) == 0, name
    wait_for(lambda: counts(cell) == {}, what="every slot to be free")


@pytest.mark.parametrize("message", ["check_can_live_migrate_destination", "pre_live_migration"])
def test_a_live_migration_to_a_silent_host_holds_no_slot(cell, message):
    """It goes on when the host answers, and then there is room for it: one guest at a time flies away."""
    cell.boot()
    other = another(cell)

    silent, send = [True], cell.net.send

    def deliver(source, host, method, args, options):
        if method == message and host == DESTINATION and silent:
            raise errors.PeerUnavailable(host=host)
        return send(source, host, method, args, options)

    cell.net.send = deliver
    cell.migrate()
    wait_for(lambda: "does not answer" in (cell[SOURCE].worker.operations.get(OPERATION).waiting_for or ""),
             what="the first to wait")  # fmt: skip
    wait_for(lambda: counts(cell) == {}, what="its slot to be free")

    cell[SOURCE].host.rate, cell[SOURCE].host.dirty_rate = 200_000_000.0, 400_000_000.0
    second = cell.migration(uuid=new_uuid(), instance=other.uuid, dest_host=THIRD, new_flavor=None,
                            migration_type="live-migration")  # fmt: skip
    flying = cell[SOURCE].send("live_migration", other.uuid, second)
    wait_for(lambda: cell.simulated.flights.get(other.uuid), what="the second to take off")
    silent.clear()
    wait_for(lambda: "turn" in (cell[SOURCE].worker.operations.get(OPERATION).waiting_for or ""), what="it to queue")
    assert counts(cell) == {"outbound": 1} and UUID not in cell.simulated.flights
    cell[SOURCE].host.dirty_rate = 0.0
    assert cell[SOURCE].outcome(flying).state is DONE
    assert cell.outcome(SOURCE).state is DONE, cell.outcome(SOURCE).error
    cell.quiet()
    assert cell.owners() == [DESTINATION]
    wait_for(lambda: counts(cell) == {}, what="every slot to be free")


def test_one_that_is_cancelled_while_it_queues_is_undone(cell):
    cell.boot()
    cell.net.cut.add(DESTINATION)
    cell.migrate()
    wait_for(lambda: "does not answer" in (cell[SOURCE].worker.operations.get(OPERATION).waiting_for or ""),
             what="it to wait")  # fmt: skip
    cell[SOURCE].send("cancel_operation", OPERATION)
    assert cell.outcome(SOURCE).state is OperationState.UNDONE
    cell.net.cut.clear()
    cell.quiet()
    assert cell.owners() == [SOURCE] and cell[SOURCE].host.running(UUID)
    wait_for(lambda: counts(cell) == {}, what="every slot to be free")
