"""How far a live migration is, and what may be done about it in each of its phases."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest

from compute_worker import errors
from compute_worker.moves import Side
from compute_worker.operations import service
from compute_worker.states import MigrationStatus, OperationState
from tests.manager.cell import DESTINATION, MIGRATION, OPERATION, SOURCE, UUID, Cell, new_uuid
from tests.manager.machine import make_instance, quiet_deaths
from tests.manager.test_live import arrived, stayed
from tests.waiting import wait_for

MEASURED = {
    "status", "iteration", "memory_total", "memory_processed", "memory_remaining", "memory_rate", "memory_dirty_rate",
    "disk_total", "disk_processed", "disk_remaining", "disk_rate", "expected_downtime", "elapsed",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.fixture
def cell(tmp_path):
    cell = Cell(tmp_path, max_concurrent_outbound=1, progress_interval=0.2)
    yield cell
    cell.close()


def status(cell: Cell, migration: str = MIGRATION, side: Side = Side.SOURCE) -> MigrationStatus:
    return cell[SOURCE].worker.core.moves.get(migration, side).status


def detail(cell: Cell, operation: str = OPERATION) -> dict:
    progress = cell[SOURCE].worker.operations.get(operation).progress
    return progress.detail if progress is not None else {}


def endless(cell: Cell, rate: float = 60_000_000.0) -> None:
    cell[SOURCE].host.link_rate, cell[SOURCE].host.dirty_rate = rate, 2 * rate


def queued(cell: Cell) -> str:
    """Behind another one that never ends: nothing of it has begun. Its operation."""
    other = make_instance(2)
    assert cell[SOURCE].do("build_and_run_instance", other).state is OperationState.DONE
    cell.boot()
    endless(cell)
    first = cell.migration(uuid=new_uuid(), instance=other.uuid, new_flavor=None, migration_type="live-migration")
    before = cell[SOURCE].send("live_migration", other.uuid, first)
    wait_for(lambda: cell[SOURCE].worker.operations.get(before).phase == "live_migration", what="the first to fly")
    cell.migrate()
    assert status(cell) is MigrationStatus.QUEUED
    return before


def preparing(cell: Cell) -> Callable[[], None]:
    """The destination is at it, and stands still there. Returns what lets it go on."""
    cell.boot()
    endless(cell)
    stall = cell[DESTINATION].host.faults.stall("create_disks", UUID)
    cell.migrate()
    assert stall.entered.wait(10)
    assert status(cell) is MigrationStatus.PREPARING and detail(cell)["status"] == "preparing"
    return stall.release


def running(cell: Cell) -> None:
    cell.boot()
    endless(cell)
    cell.migrate()
    wait_for(lambda: detail(cell).get("status") == "running", what="the guest to be on its way")
    assert status(cell) is MigrationStatus.RUNNING


def in_postcopy(cell: Cell) -> None:
    running(cell)
    cell[SOURCE].send("live_migration_force_complete", UUID, MIGRATION, "postcopy")
    wait_for(lambda: status(cell) is MigrationStatus.RUNNING_POSTCOPY, what="post-copy")
    assert detail(cell)["status"] == "running (post-copy)"


def abort(cell: Cell) -> None:
    cell[SOURCE].send("live_migration_abort", UUID, MIGRATION)


def force(cell: Cell, how: str = "pause") -> None:
    cell[SOURCE].send("live_migration_force_complete", UUID, MIGRATION, how)


# --- abort ------------------------------------------------------------------------------------------------------------


def test_aborted_while_it_is_queued(cell):
    before = queued(cell)
    abort(cell)
    assert cell.outcome(SOURCE).error["class"] == "Cancelled"
    assert status(cell) is MigrationStatus.CANCELLED
    assert cell.phase(DESTINATION) == "", "the destination heard of it"
    assert not cell[SOURCE].worker.operations.get(before).state.final, "the one before it was ended too"
    cell[SOURCE].send("cancel_operation", before)
    cell.quiet()
    assert cell[SOURCE].host.running(UUID)


def test_aborted_while_the_destination_prepares(cell):
    go_on = preparing(cell)
    abort(cell)
    go_on()
    assert cell.outcome(SOURCE).error["class"] == "Cancelled"
    stayed(cell)
    assert status(cell) is MigrationStatus.CANCELLED


def test_aborted_on_its_way(cell):
    running(cell)
    abort(cell)
    assert cell.outcome(SOURCE).error["class"] == "Cancelled"
    stayed(cell)
    assert status(cell) is MigrationStatus.CANCELLED


@pytest.mark.parametrize("how", [abort, force])
def test_in_postcopy_nothing_can_be_done_and_the_reason_is_told(cell, how):
    in_postcopy(cell)
    with pytest.raises(errors.InvalidState, match=r"running \(post-copy\): it runs at host node2 while its memory"):
        how(cell)
    cell[SOURCE].host.link_rate = None
    assert cell.outcome(SOURCE).state is OperationState.DONE
    arrived(cell)


@pytest.mark.parametrize("how", [abort, force])
def test_when_it_is_over_there_is_nothing_to_steer(cell, how):
    cell.boot()
    cell.migrate()
    arrived(cell)
    with pytest.raises(errors.InvalidState, match="is completed: it is over"):
        how(cell)


# --- force ------------------------------------------------------------------------------------------------------------


def test_forced_while_it_is_queued_it_is_forced_once_it_flies(cell):
    before = queued(cell)
    force(cell)
    cell[SOURCE].send("cancel_operation", before)
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    assert status(cell) is MigrationStatus.COMPLETED
    assert cell.simulated.running_copies(UUID) == [DESTINATION]


def test_forced_while_the_destination_prepares_it_is_forced_once_it_flies(cell):
    go_on = preparing(cell)
    force(cell)
    go_on()
    assert cell.outcome(SOURCE).state is OperationState.DONE, cell.outcome(SOURCE).error
    arrived(cell)


def test_a_force_that_the_hypervisor_cannot_do_is_told_and_another_may_come(cell, monkeypatch):
    running(cell)
    driver = cell[SOURCE].driver
    real = driver.live_migration_force_complete

    def without_postcopy(instance, postcopy):
        if postcopy:
            raise errors.NotSupported("it was begun without post-copy")
        real(instance, postcopy)

    monkeypatch.setattr(driver, "live_migration_force_complete", without_postcopy)
    force(cell, "postcopy")

    def told() -> bool:
        steps = cell[SOURCE].worker.operations.get(OPERATION).steps
        return "cannot be forced by postcopy: it was begun without post-copy" in (steps[-1].reason or "")

    wait_for(told, what="the reason")
    force(cell, "pause")
    assert cell.outcome(SOURCE).state is OperationState.DONE
    arrived(cell)


# --- progress ---------------------------------------------------------------------------------------------------------


def test_everything_that_is_measured_is_told(cell, monkeypatch):
    monkeypatch.setattr(service, "_QUIET", 0.0)
    running(cell)
    wait_for(lambda: detail(cell).get("iteration", 0) > 1, what="a second pass")
    now = cell[SOURCE].worker.operations.get(OPERATION).progress
    assert set(now.detail) >= MEASURED
    assert now.detail["memory_total"] == 128 << 20 and now.detail["memory_dirty_rate"] == 120_000_000.0
    assert now.total_bytes - now.done_bytes == now.detail["memory_remaining"] + now.detail["disk_remaining"]

    def told() -> list[str]:
        rows = [r for r in cell[SOURCE].notifications() if r.event_type == "instance.live_migration.progress"]
        return [row.payload["progress"]["detail"].get("status") for row in rows]

    wait_for(lambda: "running" in told(), what="a notification of it")
    figures = cell[SOURCE].worker.live_figures()
    assert [(i, d["status"]) for i, d in figures["migrations"]] == [(UUID, "running")]
    abort(cell)
    cell.quiet()


def test_the_measured_downtime_is_the_operations_result(cell):
    cell.boot()
    cell[SOURCE].host.link_rate, cell[SOURCE].host.dirty_rate = 400_000_000.0, 20_000_000.0
    cell.migrate()
    found = cell.outcome(SOURCE)
    assert found.state is OperationState.DONE, found.error
    assert 0 < found.result["downtime"] < 2 and found.result["elapsed"] > found.result["downtime"]
    assert found.result["memory_processed"] >= 128 << 20
    (end,) = [row.payload for row in cell[SOURCE].notifications() if row.event_type == "instance.live_migration.end"]
    assert end["result"] == found.result
    buckets, total = cell[SOURCE].worker.live_figures()["downtimes"]
    assert buckets[-1] == ("+Inf", 1.0) and total == pytest.approx(found.result["downtime"])
    assert cell[SOURCE].worker.live_figures()["migrations"] == []


# --- the policy -------------------------------------------------------------------------------------------------------


def test_a_busy_guest_gets_there_because_more_downtime_is_permitted(cell, caplog):
    """It writes faster than the link carries: only standing still for what is left ends it."""
    caplog.set_level(logging.INFO)
    cell.boot()
    # All of its memory takes 450 ms: in 500 it goes, in 300 it does not.
    cell[SOURCE].host.link_rate, cell[SOURCE].host.dirty_rate = 300_000_000.0, 400_000_000.0
    cell.migrate()
    found = cell.outcome(SOURCE)
    assert found.state is OperationState.DONE, found.error
    (step,) = [s for s in found.steps if s.name == "live_migration"]
    assert "downtime: it begins: a downtime of 50 ms is permitted" in step.reason
    assert "a downtime of 500 ms is permitted" in step.reason and "MiB, the one before" in step.reason
    lines = [r.getMessage() for r in caplog.records if "ms is permitted" in r.getMessage()]
    assert lines and all(line.startswith(f"operation {OPERATION}: live_migration of instance {UUID}") for line in lines)
    arrived(cell)


def test_what_takes_too_long_is_aborted_with_the_numbers(cell):
    driver = cell[SOURCE].driver
    live = dataclasses.replace(driver._settings.live_migration, completion_timeout=0.25)
    driver._settings = dataclasses.replace(driver._settings, live_migration=live)
    cell.boot()
    endless(cell)
    cell.migrate()
    found = cell.outcome(SOURCE)
    assert found.state is OperationState.UNDONE
    assert "completion_timeout 0 s for each of 2.0 GiB" in found.error["message"]
    assert "the guest writes" in found.error["message"]
    stayed(cell)
    assert status(cell) is MigrationStatus.FAILED
