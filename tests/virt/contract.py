"""The contract of :class:`compute_worker.virt.driver.ComputeDriver`, as tests that every driver must pass.

A driver's test module gives a fixture ``world`` (see :class:`tests.virt.world.World`) and subclasses the classes here
and in ``contract_moves``.
"""

from __future__ import annotations

import base64
import threading

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, ImageMeta, InjectedFile, Instance
from compute_worker.states import PowerState
from compute_worker.virt.driver import ComputeDriver, DriverEvent, EventKind, Leftover, Part, SpawnRequest
from tests.virt.jobs import RecordingJob
from tests.virt.world import World, info_of, run, undo
from tests.waiting import wait_for

SPAWN = ["fetch_images", "create_disks", "plug_vifs", "define", "start_paused"]
DESTROY = ["power_off", "undefine", "unplug_vifs", "delete_files"]
MOVES = st.sampled_from(["do", "do", "do", "again", "undo", "undo again", "undo next", "restart"])


def booted(world: World, host: str | None = None, **changes: object) -> tuple[ComputeDriver, Instance]:
    """An instance that runs."""
    host = host or world.a
    driver, instance = world.driver(host), world.new_instance(host, **changes)
    run(driver.spawn(instance, SpawnRequest()), RecordingJob())
    driver.unpause(instance)
    return driver, instance


def ours(driver: ComputeDriver, uuid: str) -> list[Leftover]:
    return [left for left in driver.list_leftovers() if left.uuid == uuid]


def assert_nothing(world: World, host: str, uuid: str) -> None:
    """Nothing of the instance is on ``host``, seen from outside and by the driver."""
    assert world.power(host, uuid) == "nostate"
    assert world.files(host, uuid) == set()
    assert world.plugged(host, uuid) == set()
    assert ours(world.driver(host), uuid) == []


class SpawnContract:
    """Birth and death of a guest."""

    def test_part_names_are_the_journal_s(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        assert [p.name for p in driver.spawn(instance, SpawnRequest())] == SPAWN
        assert [p.name for p in driver.destroy(instance)] == DESTROY

    @pytest.mark.parametrize("times", [1, 2])
    def test_spawn_leaves_the_guest_paused(self, world: World, times: int) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        run(driver.spawn(instance, SpawnRequest()), RecordingJob(), times)
        assert world.power(world.a, instance.uuid) == "paused"
        assert world.boots(world.a, instance.uuid) == 1
        assert {f"{instance.uuid}/disk", f"{instance.uuid}/disk.info"} <= world.files(world.a, instance.uuid)
        assert len(world.plugged(world.a, instance.uuid)) == len(instance.vifs)
        info = driver.get_info(instance.uuid)
        assert (info.power_state, info.owner) == (PowerState.PAUSED, instance.host)

    def test_building_the_parts_touches_nothing(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        driver.spawn(instance, SpawnRequest())
        driver.destroy(instance)
        assert_nothing(world, world.a, instance.uuid)

    @pytest.mark.parametrize("times", [1, 2])
    @pytest.mark.parametrize("done", range(len(SPAWN) + 1))
    def test_undone_from_any_part_nothing_is_left(self, world: World, done: int, times: int) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        parts = driver.spawn(instance, SpawnRequest())
        run(parts[:done], RecordingJob())
        undo(parts[: done + 1], RecordingJob(), times)
        assert_nothing(world, world.a, instance.uuid)

    def test_cached_base_images_stay(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        parts = driver.spawn(instance, SpawnRequest())
        run(parts, RecordingJob())
        undo(parts, RecordingJob())
        assert world.base_image(instance)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(moves=st.lists(MOVES, max_size=14))
    def test_parts_in_any_order_a_crash_can_make(self, world: World, moves: list[str]) -> None:
        instance = world.new_instance(world.a)
        parts = world.driver(world.a).spawn(instance, SpawnRequest())
        done = 0
        for move in moves:
            parts, done = self._move(world, instance, parts, done, move)
            self._check_declared(world, instance, parts, done)
        undo(parts, RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    def _move(
        self, world: World, instance: Instance, parts: list[Part], done: int, move: str
    ) -> tuple[list[Part], int]:
        job = RecordingJob()
        if move == "restart":
            return world.restart(world.a).spawn(instance, SpawnRequest()), done
        if move == "do" and done < len(parts):
            parts[done].do(job)
            return parts, done + 1
        if move == "again" and done:
            parts[done - 1].do(job)
        elif move.startswith("undo") and move != "undo next" and done:
            for _ in range(2 if move.endswith("again") else 1):
                parts[done - 1].undo(job)
            return parts, done - 1
        elif move == "undo next" and done < len(parts):
            parts[done].undo(job)
        return parts, done

    def _check_declared(self, world: World, instance: Instance, parts: list[Part], done: int) -> None:
        names = {part.name for part in parts[:done]}
        power = world.power(world.a, instance.uuid)
        assert (power == "paused") == ("start_paused" in names)
        assert (power == "nostate") == ("define" not in names)
        plugged_by = "start_paused" if world.plugs_with_guest else "plug_vifs"
        assert bool(world.plugged(world.a, instance.uuid)) == (plugged_by in names)
        assert (f"{instance.uuid}/disk" in world.files(world.a, instance.uuid)) == ("create_disks" in names)

    @pytest.mark.parametrize("look", [1, 2, 3])
    def test_cancelled_inside_a_part_its_undo_cleans(self, world: World, look: int) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        parts, job = driver.spawn(instance, SpawnRequest()), RecordingJob(cancel_at=look)
        begun = 0
        with pytest.raises(errors.Cancelled):
            for part in parts:
                begun += 1
                part.do(job)
            job.check()
        undo(parts[:begun], RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    def test_config_drive_carries_files_and_password(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        content = base64.b64encode(b"hello").decode()
        request = SpawnRequest((InjectedFile(path="/etc/motd", content_base64=content),), "s3cret")
        assert "s3cret" not in repr(request)
        run(driver.spawn(instance, request), RecordingJob())
        assert f"{instance.uuid}/disk.config" in world.files(world.a, instance.uuid)

    def test_disk_info_names_every_disk(self, world: World) -> None:
        driver, instance = booted(world)
        disks = {disk.name: disk for disk in driver.get_instance_disk_info(instance).disks}
        assert {"disk", "disk.swap"} <= disks.keys()
        assert disks["disk"].virtual_size_bytes == instance.flavor.root_gb << 30
        assert disks["disk"].backing is not None

    @pytest.mark.parametrize("times", [1, 2])
    def test_destroy_of_a_running_guest(self, world: World, times: int) -> None:
        driver, instance = booted(world)
        run(driver.destroy(instance), RecordingJob(), times)
        assert_nothing(world, world.a, instance.uuid)

    def test_destroy_of_nothing_ends_well(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        run(driver.destroy(instance), RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    def test_destroy_only_goes_forward(self, world: World) -> None:
        driver, instance = booted(world)
        parts = driver.destroy(instance)
        run(parts, RecordingJob())
        undo(parts, RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    @pytest.mark.parametrize("state", ["paused", "shutdown", "suspended"])
    def test_destroy_in_other_states(self, world: World, state: str) -> None:
        driver, instance = booted(world)
        if state == "paused":
            driver.pause(instance)
        elif state == "shutdown":
            driver.power_off(instance, RecordingJob())
        else:
            driver.suspend(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == state
        run(driver.destroy(instance), RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    @pytest.mark.parametrize("done", range(len(SPAWN)))
    def test_destroy_of_a_guest_half_made(self, world: World, done: int) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        run(driver.spawn(instance, SpawnRequest())[:done], RecordingJob())
        run(driver.destroy(instance), RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    def test_two_spawn_at_once_from_one_image(self, world: World) -> None:
        driver = world.driver(world.a)
        instances = [world.new_instance(world.a) for _ in range(2)]
        failures: list[BaseException] = []

        def spawn(instance: Instance) -> None:
            try:
                run(driver.spawn(instance, SpawnRequest()), RecordingJob())
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=spawn, args=(instance,)) for instance in instances]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert [world.power(world.a, i.uuid) for i in instances] == ["paused", "paused"]


class RefusalContract:
    """What is refused before anything is touched, and what is found broken."""

    def _refused(
        self, world: World, error: type[errors.ComputeError], request: SpawnRequest, **changes: object
    ) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a, **changes)
        with pytest.raises(error):
            driver.check_spawn(instance, request)
        assert_nothing(world, world.a, instance.uuid)

    def test_good_request_passes(self, world: World) -> None:
        world.driver(world.a).check_spawn(world.new_instance(world.a), SpawnRequest())

    def test_unknown_file_system(self, world: World) -> None:
        info = BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1, guest_format="zfs9")])
        self._refused(world, errors.InvalidBDMFormat, SpawnRequest(), block_device_info=info)

    def test_volumes(self, world: World) -> None:
        info = BlockDeviceInfo(block_device_mapping=[{"connection_info": {}}])
        self._refused(world, errors.NotSupported, SpawnRequest(), block_device_info=info)

    def test_more_ephemeral_than_the_flavor(self, world: World) -> None:
        info = BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=900)])
        self._refused(world, errors.InvalidCommand, SpawnRequest(), block_device_info=info)

    def test_more_swap_than_the_flavor(self, world: World) -> None:
        self._refused(
            world, errors.InvalidCommand, SpawnRequest(), block_device_info=BlockDeviceInfo(swap_mb=1_000_000)
        )

    @pytest.mark.parametrize("content", ["not base64!", base64.b64encode(b"x" * 70_000).decode()[:65_536]])
    def test_injected_files(self, world: World, content: str) -> None:
        file = InjectedFile(path="/x", content_base64=content)
        self._refused(world, errors.InvalidCommand, SpawnRequest([file, file]))

    def test_unknown_image(self, world: World) -> None:
        instance = world.new_instance(world.a, image=ImageMeta(id="no-such-image"))
        parts = world.driver(world.a).spawn(instance, SpawnRequest())
        with pytest.raises(errors.ImageNotFound):
            parts[0].do(RecordingJob())
        parts[0].undo(RecordingJob())
        assert_nothing(world, world.a, instance.uuid)

    def test_checksum_that_does_not_hold(self, world: World) -> None:
        image = world.new_instance(world.a).image
        wrong = msgspec.structs.replace(image, checksum_algorithm="sha256", checksum="0" * 64)
        instance = world.new_instance(world.a, image=wrong)
        if world.base_image(instance):
            pytest.fail("the world's image must not be cached when this test begins")
        parts = world.driver(world.a).spawn(instance, SpawnRequest())
        with pytest.raises(errors.ImageChecksumMismatch):
            parts[0].do(RecordingJob())
        parts[0].undo(RecordingJob())
        assert not world.base_image(instance)

    def test_bytes_that_are_not_what_is_declared(self, world: World) -> None:
        image = world.new_instance(world.a).image
        other = "raw" if image.disk_format == "qcow2" else "qcow2"
        instance = world.new_instance(world.a, image=msgspec.structs.replace(image, disk_format=other))
        with pytest.raises(errors.ImageUnacceptable):
            world.driver(world.a).spawn(instance, SpawnRequest())[0].do(RecordingJob())
        assert not world.base_image(instance)


class LifecycleContract:
    """Each method does what it says, twice."""

    def test_unpause_lets_it_run(self, world: World) -> None:
        driver, instance = booted(world)
        driver.unpause(instance)
        assert world.power(world.a, instance.uuid) == "running"
        assert driver.get_info(instance.uuid).power_state is PowerState.RUNNING

    def test_unpause_of_nothing(self, world: World) -> None:
        with pytest.raises(errors.GuestFailed):
            world.driver(world.a).unpause(world.new_instance(world.a))

    def test_unpause_of_a_guest_that_is_off(self, world: World) -> None:
        driver, instance = booted(world)
        driver.power_off(instance, RecordingJob())
        with pytest.raises(errors.GuestFailed):
            driver.unpause(instance)
        assert world.power(world.a, instance.uuid) == "shutdown"

    def test_pause_keeps_memory(self, world: World) -> None:
        driver, instance = booted(world)
        token, before = world.memory(world.a, instance.uuid)
        for _ in range(2):
            driver.pause(instance)
            assert world.power(world.a, instance.uuid) == "paused"
        for _ in range(2):
            driver.unpause(instance)
            assert world.power(world.a, instance.uuid) == "running"
        again, after = world.memory(world.a, instance.uuid)
        assert (again, after >= before) == (token, True)

    def test_clean_power_off(self, world: World) -> None:
        driver, instance = booted(world)
        world.memory(world.a, instance.uuid)  # it is up
        assert driver.power_off(instance, RecordingJob(), timeout=30, retry_interval=1) is True
        assert world.power(world.a, instance.uuid) == "shutdown"
        driver.power_off(instance, RecordingJob(), timeout=30, retry_interval=1)
        assert world.power(world.a, instance.uuid) == "shutdown"

    def test_power_off_at_once(self, world: World) -> None:
        driver, instance = booted(world)
        assert driver.power_off(instance, RecordingJob()) is False
        assert world.power(world.a, instance.uuid) == "shutdown"

    def test_paused_guest_can_be_powered_off(self, world: World) -> None:
        driver, instance = booted(world)
        driver.pause(instance)
        driver.power_off(instance, RecordingJob(), timeout=1, retry_interval=0.2)
        assert world.power(world.a, instance.uuid) == "shutdown"

    def test_power_on(self, world: World) -> None:
        driver, instance = booted(world)
        driver.power_off(instance, RecordingJob())
        for _ in range(2):
            driver.power_on(instance, RecordingJob())
            assert world.power(world.a, instance.uuid) == "running"
        assert world.boots(world.a, instance.uuid) == 2

    def test_power_on_after_a_crash(self, world: World) -> None:
        driver, instance = booted(world)
        world.guest_dies(world.a, instance.uuid)
        wait_for(lambda: driver.get_info(instance.uuid).power_state not in (PowerState.RUNNING,), what="the crash")
        driver.power_on(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "running"

    @pytest.mark.parametrize("timeout", [0, 30])
    def test_off_and_on_is_a_new_boot(self, world: World, timeout: float) -> None:
        driver, instance = booted(world)
        token, _ = world.memory(world.a, instance.uuid)
        driver.power_off(instance, RecordingJob(), timeout=timeout)
        driver.power_on(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "running"
        assert world.memory(world.a, instance.uuid)[0] != token

    def test_suspend_and_resume_keep_memory(self, world: World) -> None:
        driver, instance = booted(world)
        token, before = world.memory(world.a, instance.uuid)
        for _ in range(2):
            driver.suspend(instance, RecordingJob())
            assert world.power(world.a, instance.uuid) == "suspended"
        assert driver.get_info(instance.uuid).power_state is PowerState.SUSPENDED
        for _ in range(2):
            driver.resume(instance, RecordingJob())
            assert world.power(world.a, instance.uuid) == "running"
        again, after = world.memory(world.a, instance.uuid)
        assert (again, after >= before) == (token, True)
        assert world.boots(world.a, instance.uuid) == 1

    def test_resume_without_saved_memory_boots(self, world: World) -> None:
        driver, instance = booted(world)
        driver.power_off(instance, RecordingJob())
        driver.resume(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "running"

    def test_suspend_of_a_guest_that_is_off(self, world: World) -> None:
        driver, instance = booted(world)
        driver.power_off(instance, RecordingJob())
        with pytest.raises(errors.GuestFailed):
            driver.suspend(instance, RecordingJob())

    def test_guests_outlive_the_worker(self, world: World) -> None:
        _, instance = booted(world)
        before = world.memory(world.a, instance.uuid)
        driver = world.restart(world.a)
        assert driver.get_info(instance.uuid).power_state is PowerState.RUNNING
        assert world.memory(world.a, instance.uuid)[0] == before[0]
        driver.power_off(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "shutdown"


class FactsContract:
    """What a driver tells."""

    def test_get_info_of_nothing(self, world: World) -> None:
        uuid = world.new_instance(world.a).uuid
        with pytest.raises(errors.InstanceNotFound):
            world.driver(world.a).get_info(uuid)
        assert info_of(world.driver(world.a), uuid) is None

    def test_list_instances(self, world: World) -> None:
        driver, instance = booted(world)
        info = info_of(driver, instance.uuid)
        assert info == driver.get_info(instance.uuid)
        assert info is not None and info.owner == instance.host

    def test_record_round_trip(self, world: World) -> None:
        driver, instance = booted(world)
        changed = msgspec.structs.replace(instance, generation=7, fault="seen", metadata={"a": "b"})
        for _ in range(2):
            driver.save_record(changed)
        records = [r for r in world.restart(world.a).list_records() if r.uuid == instance.uuid]
        assert records == [changed]
        assert world.driver(world.a).get_info(instance.uuid).generation == 7

    def test_record_of_an_instance_that_is_not_here(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        driver.save_record(instance)
        assert_nothing(world, world.a, instance.uuid)
        assert instance.uuid not in [r.uuid for r in driver.list_records()]

    def test_leftovers(self, world: World) -> None:
        driver, instance = booted(world)
        assert {left.kind for left in ours(driver, instance.uuid)} == {"domain", "directory"}

    def test_console_output(self, world: World) -> None:
        driver, instance = booted(world)
        output = wait_for(lambda: driver.get_console_output(instance, 4096), 60, "console output")
        assert isinstance(output, bytes)
        assert len(driver.get_console_output(instance, 3)) == 3
        assert driver.get_console_output(instance, 0) == b""

    def test_console_of_nothing(self, world: World) -> None:
        with pytest.raises(errors.InstanceNotFound):
            world.driver(world.a).get_console_output(world.new_instance(world.a), 10)

    def test_diagnostics(self, world: World) -> None:
        driver, instance = booted(world)
        found = driver.get_diagnostics(instance)
        assert (found.state, found.vcpus) == (PowerState.RUNNING, instance.flavor.vcpus)
        assert found.driver
        driver.power_off(instance, RecordingJob())
        assert driver.get_diagnostics(instance).state is PowerState.SHUTDOWN

    def test_resources(self, world: World) -> None:
        found = world.driver(world.a).get_available_resource()
        assert found.vcpus >= 1 and found.memory_mb > 0
        assert 0 < found.disk_free_gb <= found.disk_gb
        assert found.boot_id and found.boot_id == world.restart(world.a).get_available_resource().boot_id

    def test_events(self, world: World) -> None:
        driver, instance = world.driver(world.a), world.new_instance(world.a)
        seen: list[DriverEvent] = []
        threads: set[int] = set()

        def listen(event: DriverEvent) -> None:
            threads.add(threading.get_ident())
            if event.uuid == instance.uuid:
                seen.append(event)
                driver.get_info(event.uuid)  # a listener holds no lock: it may ask

        def came(kind: EventKind) -> None:
            wait_for(lambda: kind in [event.kind for event in seen], what=f"event {kind}")
            seen.clear()

        driver.register_event_listener(listen)
        run(driver.spawn(instance, SpawnRequest()), RecordingJob())
        came(EventKind.STARTED)
        driver.unpause(instance)
        came(EventKind.RESUMED)
        driver.pause(instance)
        came(EventKind.PAUSED)
        driver.unpause(instance)
        driver.suspend(instance, RecordingJob())
        came(EventKind.SUSPENDED)
        driver.resume(instance, RecordingJob())
        driver.power_off(instance, RecordingJob(), timeout=30, retry_interval=1)
        came(EventKind.STOPPED)
        driver.power_on(instance, RecordingJob())
        world.guest_dies(world.a, instance.uuid)
        came(EventKind.CRASHED)
        assert threading.get_ident() not in threads

    def test_image_cache_keeps_what_is_used(self, world: World) -> None:
        driver, instance = booted(world)
        driver.manage_image_cache(set())
        assert world.base_image(instance)
        assert driver.manage_image_cache({instance.image.id}) == []
