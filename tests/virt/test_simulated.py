"""The simulated host: faults, time, deaths, and an oracle that sees what must not be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from compute_worker import errors
from compute_worker.states import PowerState
from compute_worker.virt.driver import DriverEvent, EventKind, Leftover, SpawnRequest
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated import Died, SimulatedHost
from compute_worker.virt.simulated.cell import TWO_RUNNING, TWO_WRITERS
from compute_worker.virt.simulated.faults import AFTER, PARTIAL
from tests.virt.contract import assert_nothing, booted
from tests.virt.fakeworld import IMAGE, FakeWorld
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.world import run, undo
from tests.waiting import wait_for


@pytest.fixture
def world() -> Iterator[FakeWorld]:
    world = FakeWorld()
    yield world
    world.close()


@pytest.fixture
def host(world: FakeWorld) -> SimulatedHost:
    return world.hosts[world.a]


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
