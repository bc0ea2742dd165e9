"""The simulated host: faults, time, deaths, and an oracle that sees what must not be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from compute_worker import errors, objects
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration
from compute_worker.states import PowerState, VmState
from compute_worker.virt.driver import DriverEvent, EventKind, Leftover, SpawnRequest
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated import Died, SimulatedHost
from compute_worker.virt.simulated.cell import TWO_RUNNING, TWO_WRITERS
from compute_worker.virt.simulated.faults import AFTER, PARTIAL
from tests.virt.contract import assert_nothing, booted
from tests.virt.contract_moves import migration_of
from tests.virt.fakeworld import IMAGE, FakeWorld
from tests.virt.jobs import RecordingJob
from tests.virt.world import moving, run, undo
from tests.waiting import wait_for


@pytest.fixture
def world() -> Iterator[FakeWorld]:
    world = FakeWorld()
    yield world
    world.close()


@pytest.fixture
def host(world: FakeWorld) -> SimulatedHost:
    return world.hosts[world.a]


def in_thread(target: object, *args: object) -> tuple[threading.Thread, list[BaseException]]:
    """Run ``target`` aside; what it raised is in the list."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            target(*args)  # type: ignore[operator]
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, raised


class TestFaults:
    def test_fail_once(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.faults.fail("pause", errors.HypervisorBusy(reason="test"))
        with pytest.raises(errors.HypervisorBusy):
            driver.pause(instance)
        assert world.power(world.a, instance.uuid) == "running"
        driver.pause(instance)
        assert world.power(world.a, instance.uuid) == "paused"

    def test_fail_for_one_instance(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, first = booted(world)
        _, second = booted(world)
        host.faults.fail("pause", errors.HypervisorBusy(reason="test"), times=None, uuid=first.uuid)
        driver.pause(second)
        for _ in range(3):
            with pytest.raises(errors.HypervisorBusy):
                driver.pause(first)
        host.faults.clear()
        driver.pause(first)

    def test_answer_lost(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.faults.fail("pause", errors.HypervisorUnavailable(reason="test"), when=AFTER)
        with pytest.raises(errors.HypervisorUnavailable):
            driver.pause(instance)
        assert world.power(world.a, instance.uuid) == "paused"

    @pytest.mark.parametrize("call", ["fetch_images", "create_disks"])
    def test_half_done_is_found_and_finished(self, world: FakeWorld, host: SimulatedHost, call: str) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        host.faults.fail(call, errors.HypervisorBusy(reason="test"), when=PARTIAL)
        parts = driver.spawn(instance, SpawnRequest())
        with pytest.raises(errors.HypervisorBusy):
            run(parts, RecordingJob())
        halves = [name for name in (*host.files(instance.uuid), *host.base) if name.endswith(".part")]
        assert len(halves) == 1
        run(parts, RecordingJob())
        assert world.power(world.a, instance.uuid) == "paused"
        assert not [name for name in (*host.files(instance.uuid), *host.base) if name.endswith(".part")]

    @pytest.mark.parametrize("call", ["fetch_images", "create_disks"])
    def test_half_done_is_found_and_undone(self, world: FakeWorld, host: SimulatedHost, call: str) -> None:
        instance = world.new_instance(world.a)
        host.faults.fail(call, errors.HypervisorBusy(reason="test"), when=PARTIAL)
        parts = world.driver(world.a).spawn(instance, SpawnRequest())
        with pytest.raises(errors.HypervisorBusy):
            run(parts, RecordingJob())
        undo(world.restart(world.a).spawn(instance, SpawnRequest()), RecordingJob())
        assert_nothing(world, world.a, instance.uuid)
        assert not [name for name in host.base if name.endswith(".part")]

    def test_half_deleted_directory(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.faults.fail("delete_files", errors.HypervisorBusy(reason="test"), when=PARTIAL)
        with pytest.raises(errors.HypervisorBusy):
            run(driver.destroy(instance), RecordingJob())
        assert [left.kind for left in driver.list_leftovers()] == ["del"]
        run(driver.destroy(instance), RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    @pytest.mark.parametrize("room", [0, 100, len(IMAGE) + 5])
    def test_disk_full(self, world: FakeWorld, host: SimulatedHost, room: int) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        host.disk_limit_bytes = room
        parts = driver.spawn(instance, SpawnRequest())
        with pytest.raises(errors.DiskFull):
            run(parts, RecordingJob())
        undo(parts, RecordingJob())
        assert_nothing(world, world.a, instance.uuid)
        host.disk_limit_bytes = None
        run(parts, RecordingJob())

    def test_stall_ends_by_cancellation(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance, job = world.driver(world.a), world.new_instance(world.a), RecordingJob()
        stall = host.faults.stall("create_disks")
        thread, raised = in_thread(run, driver.spawn(instance, SpawnRequest()), job)
        assert stall.entered.wait(10)
        job.cancel()
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.Cancelled]

    def test_stall_ends_by_release(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        stall = host.faults.stall("define")
        thread, raised = in_thread(run, driver.spawn(instance, SpawnRequest()), RecordingJob())
        assert stall.entered.wait(10)
        assert world.power(world.a, instance.uuid) == "nostate"
        host.faults.clear()
        stall.release()
        thread.join(10)
        assert raised == []
        assert world.power(world.a, instance.uuid) == "paused"

    def test_latency(self, world: FakeWorld, host: SimulatedHost) -> None:
        host.latency = 0.02
        begun = time.monotonic()
        booted(world)
        assert time.monotonic() - begun >= 6 * 0.02


class TestDeath:
    def test_a_dead_worker_does_nothing_more(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        assert isinstance(driver, FakeDriver)
        driver.die()
        for call in (lambda: driver.pause(instance), lambda: driver.get_info(instance.uuid), driver.list_records):
            with pytest.raises(Died):
                call()
        assert world.power(world.a, instance.uuid) == "running"
        assert not issubclass(Died, Exception)

    def test_dies_inside_a_call_that_hangs(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        assert isinstance(driver, FakeDriver)
        stall = host.faults.stall("define")
        thread, raised = in_thread(run, driver.spawn(instance, SpawnRequest()), RecordingJob())
        assert stall.entered.wait(10)
        driver.die()
        stall.release()
        thread.join(10)
        assert [type(exc) for exc in raised] == [Died]
        assert world.power(world.a, instance.uuid) == "nostate"

    @pytest.mark.parametrize("when", ["before", "after", "partial"])
    def test_dies_at_a_point(self, world: FakeWorld, host: SimulatedHost, when: str) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        assert isinstance(driver, FakeDriver)

        def strike(_uuid: str) -> None:
            driver.die()
            raise Died("test")

        host.faults.hook("create_disks", strike, when=when)
        with pytest.raises(Died):
            run(driver.spawn(instance, SpawnRequest()), RecordingJob())
        run(world.restart(world.a).spawn(instance, SpawnRequest()), RecordingJob())
        assert world.boots(world.a, instance.uuid) == 1

    def test_no_event_reaches_a_dead_worker(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        assert isinstance(driver, FakeDriver)
        old: list[DriverEvent] = []
        new: list[DriverEvent] = []
        driver.register_event_listener(old.append)
        wait_for(lambda: old, what="the first event")
        driver.die()
        count = len(old)
        world.restart(world.a).register_event_listener(new.append)
        host.guest_crash(instance.uuid)
        wait_for(lambda: EventKind.CRASHED in [e.kind for e in new], what="the crash at the new worker")
        assert len(old) == count


class TestFate:
    def test_hypervisor_down_and_up(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        seen: list[EventKind] = []
        driver.register_event_listener(lambda event: seen.append(event.kind))
        host.hypervisor_down()
        assert not driver.available
        for call in (lambda: driver.get_info(instance.uuid), lambda: driver.power_off(instance, RecordingJob())):
            with pytest.raises(errors.HypervisorUnavailable):
                call()
        assert host.running(instance.uuid)
        driver.save_record(instance)  # files need no hypervisor
        host.hypervisor_restart()
        assert driver.available
        wait_for(lambda: seen == [EventKind.CONNECTED, EventKind.DISCONNECTED, EventKind.CONNECTED], what="events")
        driver.pause(instance)

    def test_hypervisor_goes_while_a_guest_shuts_down(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.deaf.add(instance.uuid)
        entered = threading.Event()
        host.faults.hook("shutdown", lambda _uuid: entered.set())
        thread, raised = in_thread(driver.power_off, instance, RecordingJob(), 60.0, 30.0)
        assert entered.wait(10)
        host.hypervisor_down()
        thread.join(10)
        assert [type(exc) for exc in raised] == [errors.HypervisorUnavailable]

    def test_power_failure(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.guest_write(instance.uuid, b"kept")
        boot_id = driver.get_available_resource().boot_id
        host.power_failure()
        with pytest.raises(Died):
            driver.get_info(instance.uuid)
        host.power_restore()
        driver = world.restart(world.a)
        assert driver.get_available_resource().boot_id != boot_id
        assert driver.get_info(instance.uuid).power_state is PowerState.SHUTDOWN
        driver.power_on(instance, RecordingJob())
        assert host.read_disk(instance.uuid).endswith(b"kept")

    def test_suspended_guest_survives_a_power_failure(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        token, _ = host.guest_memory(instance.uuid)
        driver.suspend(instance, RecordingJob())
        host.power_failure()
        host.power_restore()
        world.restart(world.a).resume(instance, RecordingJob())
        assert host.guest_memory(instance.uuid)[0] == token

    def test_deaf_guest_loses_its_plug(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.deaf.add(instance.uuid)
        job = RecordingJob()
        assert driver.power_off(instance, job, timeout=0.2, retry_interval=0.05) is False
        assert world.power(world.a, instance.uuid) == "shutdown"
        assert host.effects[instance.uuid, "shutdown"] == 0 and host.effects[instance.uuid, "kill"] == 1
        assert job.reasons == ["it did not shut itself down in 0.2 s"]

    def test_guest_that_takes_its_time(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.shutdown_seconds = 0.1
        assert driver.power_off(instance, RecordingJob(), timeout=20, retry_interval=0.02) is True
        assert host.effects[instance.uuid, "shutdown"] == 1
        assert b"Power down" in driver.get_console_output(instance, 4096)

    def test_shutdown_is_cancellable(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        host.deaf.add(instance.uuid)
        with pytest.raises(errors.Cancelled):
            driver.power_off(instance, RecordingJob(cancel_at=3), timeout=60, retry_interval=1)
        assert host.running(instance.uuid)

    def test_memory_ticks_only_while_it_runs(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        _, first = host.guest_memory(instance.uuid)
        wait_for(lambda: host.guest_memory(instance.uuid)[1] > first, what="a tick")
        driver.pause(instance)
        domain = host.domain(instance.uuid)
        assert domain is not None and domain.memory is not None
        assert domain.memory.since is None and domain.memory.ticks == host.guest_memory(instance.uuid)[1]


class TestOracle:
    def test_two_running_copies(self, world: FakeWorld) -> None:
        _, instance = booted(world)
        run(parts := world.driver(world.b).spawn(instance, SpawnRequest()), RecordingJob())
        assert world.cell.violations == [] and len(parts) == 5
        world.driver(world.b).unpause(instance)
        found = world.cell.violations[0]
        assert (found.what, found.uuid, found.hosts) == (TWO_RUNNING, instance.uuid, ("alpha", "beta"))
        assert sorted(world.cell.running_copies(instance.uuid)) == ["alpha", "beta"]

    def test_disk_written_by_two(self, world: FakeWorld, host: SimulatedHost) -> None:
        _, instance = booted(world)
        host.guest_write(instance.uuid, b"alone")
        booted(world, world.b, uuid=instance.uuid)
        host.guest_write(instance.uuid, b"not alone")
        assert [found.what for found in world.cell.violations] == [TWO_RUNNING, TWO_WRITERS]

    def test_a_guest_that_is_off_cannot_write(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = booted(world)
        driver.pause(instance)
        with pytest.raises(AssertionError):
            host.guest_write(instance.uuid, b"x")

    def test_effects_are_counted_once(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        run(driver.spawn(instance, SpawnRequest()), RecordingJob(), 3)
        run(driver.destroy(instance), RecordingJob(), 3)
        effects = {what: n for (uuid, what), n in host.effects.items() if uuid == instance.uuid}
        assert effects == {
            "plug": 1, "define": 1, "boot": 1, "kill": 1, "undefine": 1, "unplug": 1, "delete": 1
        }  # fmt: skip
        assert host.effects["tiny", "download"] == 1

    def test_leftovers(self, world: FakeWorld, host: SimulatedHost) -> None:
        _, instance = booted(world)
        assert host.leftovers() == [
            Leftover(instance.uuid, "domain", f"alpha:{instance.uuid}"),
            Leftover(instance.uuid, "directory", f"alpha:instances/{instance.uuid}"),
        ]


class TestSlowWork:
    def test_download_reports_and_is_shared(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver = world.driver(world.a)
        host.rate = len(IMAGE) / 0.2
        jobs = [RecordingJob() for _ in range(3)]
        runs = [
            in_thread(run, driver.spawn(world.new_instance(world.a), SpawnRequest())[:1], job) for job in jobs
        ]
        for thread, _ in runs:
            thread.join(20)
        assert [raised for _, raised in runs] == [[], [], []]
        assert host.effects["tiny", "download"] == 1
        reports = next(job.reports for job in jobs if job.reports)
        done = [report[1] for report in reports]
        assert len(done) >= 5 and done == sorted(done) and reports[-1] == ("fetch_images", len(IMAGE), len(IMAGE))

    def test_cancelled_download_leaves_a_part_that_undo_removes(self, world: FakeWorld, host: SimulatedHost) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        host.rate = len(IMAGE) / 0.5
        part = driver.spawn(instance, SpawnRequest())[0]
        with pytest.raises(errors.Cancelled):
            part.do(RecordingJob(cancel_at=4))
        assert [name[-5:] for name in host.base] == [".part"]
        part.undo(RecordingJob())
        assert host.base == {}


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
        parts = world.driver(world.a).migrate_disk_and_power_off(instance, migration, 0, 1)
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
        parts = world.driver(world.a).migrate_disk_and_power_off(instance, migration, 0, 1)
        with pytest.raises(errors.PeerUnavailable):
            run(parts, RecordingJob())
        beta.reachable = True
        run(parts, RecordingJob())
        assert beta.read_disk(instance.uuid, "disk.swap") == b"mkswap"

    def test_destination_full(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        beta = world.hosts[world.b]
        beta.disk_limit_bytes = 4000
        parts = world.driver(world.a).migrate_disk_and_power_off(instance, migration, 0, 1)
        with pytest.raises(errors.DiskFull):
            run(parts, RecordingJob())
        undo(parts, RecordingJob())
        assert_nothing(world, world.b, instance.uuid)

    def test_destination_stalls_and_the_move_is_cancelled(self, world: FakeWorld) -> None:
        instance, migration = self.begin(world)
        stall = world.hosts[world.b].faults.stall("receive")
        job = RecordingJob()
        parts = world.driver(world.a).migrate_disk_and_power_off(instance, migration, 0, 1)
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
        parts = world.driver(world.a).migrate_disk_and_power_off(instance, migration, 0, 1)
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
        run(
            dest.pre_live_migration(instance, migration, data, source.get_instance_disk_info(instance)), RecordingJob()
        )
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
