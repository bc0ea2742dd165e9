"""Moves between simulated hosts: what goes wrong on the way, and that no guest is lost or runs twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest

from compute_worker import errors, objects
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration
from compute_worker.states import PowerState, VmState
from compute_worker.virt.driver import EventKind
from compute_worker.virt.simulated import Died
from compute_worker.virt.simulated.cell import TWO_RUNNING
from compute_worker.virt.simulated.faults import PARTIAL
from tests.virt.contract import assert_nothing, booted
from tests.virt.contract_moves import migration_of
from tests.virt.fakeworld import IMAGE, FakeWorld
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.world import moving, peer, run, undo
from tests.waiting import wait_for


@pytest.fixture
def world() -> Iterator[FakeWorld]:
    world = FakeWorld()
    yield world
    world.close()


class _Move:
    def begin(self, world: FakeWorld) -> tuple[Instance, Migration]:
        _, instance = booted(world)
        world.write_disk(world.a, instance.uuid, b"payload " * 1000)
        migration = migration_of(world, instance)
        running = msgspec.structs.replace(instance, vm_state=VmState.ACTIVE, power_state=PowerState.RUNNING)
        return moving(running, migration), migration


class TestColdMoveFaults(_Move):
    def test_destination_off(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        parts = world.driver(world.a).migrate_disk_and_power_off(
            instance, migration, 0, 1, peer(world, instance, migration)
        )
        world.hosts[world.b].power_failure()
        with pytest.raises(errors.PeerUnavailable):
            run(parts, RecordingJob())
        job = RecordingJob()
        undo(parts, job)
        assert "host beta does not answer: it removes its own copy of disk" in job.reasons
        world.driver(world.a).power_on(instance, RecordingJob())
        assert world.hosts[world.a].running(instance.uuid)

    def test_destination_goes_away_while_it_receives(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        beta = world.hosts[world.b]
        beta.faults.hook("receive", lambda _uuid: setattr(beta, "reachable", False))
        parts = world.driver(world.a).migrate_disk_and_power_off(
            instance, migration, 0, 1, peer(world, instance, migration)
        )
        with pytest.raises(errors.PeerUnavailable):
            run(parts, RecordingJob())
        beta.reachable = True
        run(parts, RecordingJob())
        assert beta.read_disk(instance.uuid, "disk.swap") == b"mkswap"

    def test_destination_full(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        beta = world.hosts[world.b]
        beta.disk_limit_bytes = 4000
        parts = world.driver(world.a).migrate_disk_and_power_off(
            instance, migration, 0, 1, peer(world, instance, migration)
        )
        with pytest.raises(errors.DiskFull):
            run(parts, RecordingJob())
        undo(parts, RecordingJob())
        assert_nothing(world, world.b, instance.uuid)

    def test_destination_stalls_and_the_move_is_cancelled(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        stall = world.hosts[world.b].faults.stall("receive")
        job = RecordingJob()
        parts = world.driver(world.a).migrate_disk_and_power_off(
            instance, migration, 0, 1, peer(world, instance, migration)
        )
        thread, raised = in_thread(run, parts, job)
        assert stall.entered.wait(10)
        job.cancel()
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.Cancelled]
        undo(parts, RecordingJob())
        assert_nothing(world, world.b, instance.uuid)

    def test_half_sent_disk_is_sent_again(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        world.hosts[world.a].rate = 50_000.0
        world.hosts[world.a].faults.fail("send_disk", errors.HypervisorBusy(reason="test"), when=PARTIAL)
        parts = world.driver(world.a).migrate_disk_and_power_off(
            instance, migration, 0, 1, peer(world, instance, migration)
        )
        with pytest.raises(errors.HypervisorBusy):
            run(parts, RecordingJob())
        assert f"{instance.uuid}/disk.part" in world.files(world.b, instance.uuid)
        told = run(parts, RecordingJob())
        info = objects.decode(told["disk_info"], DiskInfo, "test")
        there = msgspec.structs.replace(instance, host=world.b)
        run(world.driver(world.b).finish_migration(there, migration, info), RecordingJob())
        assert world.read_disk(world.b, instance.uuid) == IMAGE + b"payload " * 1000


class TestFlights(_Move):
    def prepare(self, world: FakeWorld) -> tuple[Instance, Migration, MigrateData]:
        instance, migration = self.begin(world)
        source, dest = world.driver(world.a), world.driver(world.b)
        data = dest.check_can_live_migrate_destination(instance, migration, source.get_available_resource(), False)
        data = source.check_can_live_migrate_source(instance, migration, data)
        run(dest.pre_live_migration(instance, migration, data, source.get_instance_disk_info(instance)), RecordingJob())
        return instance, migration, data

    def take_off(
        self, world: FakeWorld, rate: float
    ) -> tuple[Instance, Migration, MigrateData, RecordingJob, threading.Thread, list[BaseException]]:
        """A migration in the air that never ends by itself: the guest dirties as fast as it is copied."""
        instance, migration, data = self.prepare(world)
        alpha = world.hosts[world.a]
        alpha.rate, alpha.dirty_rate = rate, rate
        job = RecordingJob()
        thread, raised = in_thread(world.driver(world.a).live_migration, instance, migration, data, job)
        wait_for(
            lambda: (world.driver(world.a).get_job_statistics(instance.uuid).memory_processed or 0) > 0, what="flight"
        )
        return instance, migration, data, job, thread, raised

    def test_events_of_both_sides(self, world: FakeWorld) -> None:
        instance, migration, data = self.prepare(world)
        seen: dict[str, list[EventKind]] = {world.a: [], world.b: []}
        for name in seen:
            world.driver(name).register_event_listener(lambda e, n=name: seen[n].append(e.kind))  # type: ignore[misc]
        world.driver(world.a).live_migration(instance, migration, data, RecordingJob())
        wait_for(lambda: EventKind.MIGRATED_OUT in seen[world.a], what="the guest leaving")
        wait_for(lambda: EventKind.MIGRATED_IN in seen[world.b], what="the guest arriving")
        assert world.cell.violations == []

    def test_statistics_and_abort(self, world: FakeWorld) -> None:
        instance, _, _, _, thread, raised = self.take_off(world, 1e9)
        driver = world.driver(world.a)
        found = driver.get_job_statistics(instance.uuid)
        assert found.type == "unbounded" and found.memory_total == 64 << 20
        assert driver.get_info(instance.uuid).migrating
        driver.live_migration_abort(instance)
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.MigrationFailed]
        assert world.cell.running_copies(instance.uuid) == [world.a]
        assert world.power(world.b, instance.uuid) == "nostate"
        assert driver.get_job_statistics(instance.uuid).type == "cancelled"

    def test_cancelled_job_aborts(self, world: FakeWorld) -> None:
        instance, _, _, job, thread, raised = self.take_off(world, 1e9)
        job.cancel()
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.Cancelled]
        assert world.cell.running_copies(instance.uuid) == [world.a]
        assert not world.driver(world.a).get_info(instance.uuid).migrating

    def test_forced_by_pause(self, world: FakeWorld) -> None:
        instance, _, _, job, thread, raised = self.take_off(world, 1e9)
        world.driver(world.a).live_migration_force_complete(instance, postcopy=False)
        thread.join(10)
        assert raised == []
        assert world.cell.running_copies(instance.uuid) == [world.b]
        assert job.reports[-1][0] == "live_migration"
        assert world.cell.violations == []

    def test_forced_by_postcopy(self, world: FakeWorld) -> None:
        instance, _, _, _, thread, raised = self.take_off(world, 3e8)
        driver = world.driver(world.a)
        driver.live_migration_force_complete(instance, postcopy=True)
        wait_for(lambda: world.cell.running_copies(instance.uuid) == [world.b], what="post-copy")
        thread.join(10)
        assert raised == []
        found = driver.get_job_statistics(instance.uuid)
        assert found.postcopy and found.downtime is not None
        assert world.cell.violations == []

    def test_postcopy_cannot_be_aborted_and_can_fail(self, world: FakeWorld) -> None:
        instance, _, _, _, thread, raised = self.take_off(world, 1e7)
        driver = world.driver(world.a)
        driver.live_migration_force_complete(instance, postcopy=True)
        wait_for(lambda: world.cell.running_copies(instance.uuid) == [world.b], what="post-copy")
        with pytest.raises(errors.InvalidState):
            driver.live_migration_abort(instance)
        world.hosts[world.b].reachable = False
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.MigrationFailed]
        assert [world.power(h, instance.uuid) for h in (world.a, world.b)] == ["paused", "paused"]

    def test_destination_loses_power(self, world: FakeWorld) -> None:
        instance, _, _, _, thread, raised = self.take_off(world, 1e9)
        world.hosts[world.b].power_failure()
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.MigrationFailed]
        assert world.cell.running_copies(instance.uuid) == [world.a]

    def test_source_crashes(self, world: FakeWorld) -> None:
        instance, _, _, _, thread, raised = self.take_off(world, 1e9)
        world.hosts[world.a].guest_crash(instance.uuid)
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.MigrationFailed]
        assert world.power(world.b, instance.uuid) == "nostate"

    def test_worker_dies_and_the_next_attaches(self, world: FakeWorld) -> None:
        instance, migration, data, _, thread, raised = self.take_off(world, 1e9)
        driver = world.restart(world.a)
        thread.join(10)
        assert [type(exc) for exc in raised] == [Died]
        again, failed = in_thread(driver.live_migration, instance, migration, data, RecordingJob())
        world.hosts[world.a].dirty_rate = 0
        again.join(10)
        assert failed == []
        assert world.cell.running_copies(instance.uuid) == [world.b]
        assert world.hosts[world.b].effects[instance.uuid, "migrated_in"] == 1

    def test_finish_reply_lost_both_run(self, world: FakeWorld) -> None:
        instance, migration, data = self.prepare(world)
        alpha = world.hosts[world.a]
        alpha.finish_timeout = 0.05
        alpha.faults.fail("migrate_finish", ConnectionResetError("test"))
        with pytest.raises(errors.MigrationFailed, match="finish reply lost"):
            world.driver(world.a).live_migration(instance, migration, data, RecordingJob())
        assert sorted(world.cell.running_copies(instance.uuid)) == [world.a, world.b]
        assert [found.what for found in world.cell.violations] == [TWO_RUNNING]

    def test_finish_reply_lost_source_destroys_in_time(self, world: FakeWorld) -> None:
        instance, migration, data = self.prepare(world)
        alpha = world.hosts[world.a]
        alpha.finish_timeout = 5.0
        alpha.faults.fail("migrate_finish", ConnectionResetError("test"))
        driver = world.driver(world.a)
        thread, raised = in_thread(driver.live_migration, instance, migration, data, RecordingJob())
        wait_for(lambda: world.cell.running_copies(instance.uuid) == [world.b], what="the switch-over")
        info = driver.get_info(instance.uuid)
        assert (info.power_state, info.migrating) == (PowerState.PAUSED, True)
        driver.power_off(instance, RecordingJob())
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.MigrationFailed]
        assert world.cell.running_copies(instance.uuid) == [world.b]
        assert world.cell.violations == []
