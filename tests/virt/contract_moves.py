"""The contract of moves between two hosts. See ``contract``."""

from __future__ import annotations

import dataclasses
import uuid

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors, objects
from compute_worker.objects import DiskInfo, Flavor, Instance, MigrateData, Migration
from compute_worker.states import PowerState, VmState
from compute_worker.virt.driver import ComputeDriver, Part, SpawnRequest
from tests.virt.contract import assert_nothing, booted, ours
from tests.virt.jobs import RecordingJob
from tests.virt.world import LIVE, RESIZE, World, moving, peer, run, undo


def active(instance: Instance) -> Instance:
    return msgspec.structs.replace(instance, vm_state=VmState.ACTIVE, power_state=PowerState.RUNNING)


def migration_of(world: World, instance: Instance, kind: str = "migration", **changes: object) -> Migration:
    values = {
        "uuid": str(uuid.uuid4()),
        "instance": instance.uuid,
        "migration_type": kind,
        "source_host": world.a,
        "dest_host": world.b,
    }
    return Migration(**{**values, **changes})  # type: ignore[arg-type]


class _Moves:
    """Skips where the driver does not support the family."""

    needs: str

    @pytest.fixture(autouse=True)
    def _supported(self, world: World) -> None:
        if self.needs not in world.supports:
            pytest.skip(f"this driver does not support {self.needs}")


class ColdMoveContract(_Moves):
    """Cold migration, resize, confirm, revert."""

    needs = RESIZE

    def _begin(self, world: World, **changes: object) -> tuple[Instance, Migration, list[Part]]:
        driver, instance = booted(world)
        if world.guest_writes_disk:
            world.write_disk(world.a, instance.uuid, b"written by the guest")
        migration = migration_of(world, instance, **changes)
        instance = moving(active(instance), migration)
        return (
            instance,
            migration,
            driver.migrate_disk_and_power_off(instance, migration, 30, 1, peer(world, instance, migration)),
        )

    def _arrive(
        self, world: World, instance: Instance, migration: Migration, told: dict[str, object], times: int = 1
    ) -> tuple[Instance, list[Part]]:
        disk_info = objects.decode(told["disk_info"], DiskInfo, "test")
        there = msgspec.structs.replace(instance, host=migration.dest_host)
        parts = world.driver(migration.dest_host).finish_migration(there, migration, disk_info)
        run(parts, RecordingJob(), times)
        return there, parts

    @pytest.mark.parametrize("times", [1, 2])
    def test_whole_move_and_confirm(self, world: World, times: int) -> None:
        instance, migration, parts = self._begin(world)
        told = run(parts, RecordingJob(), times)
        assert world.power(world.a, instance.uuid) in ("nostate", "shutdown")
        there, _ = self._arrive(world, instance, migration, told, times)
        assert world.power(world.b, instance.uuid) == "paused"
        world.driver(world.b).unpause(there)
        assert world.power(world.b, instance.uuid) == "running"
        if world.guest_writes_disk:
            assert world.read_disk(world.b, instance.uuid).endswith(b"written by the guest")
        assert world.driver(world.b).get_info(instance.uuid).owner == world.b
        assert {left.kind for left in ours(world.driver(world.a), instance.uuid)} <= {"resize", "domain"}
        for _ in range(times):
            world.driver(world.a).confirm_migration(instance, migration, RecordingJob())
        assert {f for f in world.files(world.a, instance.uuid)} == set()
        assert world.power(world.b, instance.uuid) == "running"

    def test_part_names_do_not_depend_on_how_far_it_is(self, world: World) -> None:
        instance, migration, parts = self._begin(world)
        names = [part.name for part in parts]
        for index in range(len(names)):
            parts[index].do(RecordingJob())
            parts = world.restart(world.a).migrate_disk_and_power_off(
                instance, migration, 30, 1, peer(world, instance, migration)
            )
            assert [part.name for part in parts] == names

    def test_guest_that_was_off_stays_off(self, world: World) -> None:
        instance, migration, parts = self._begin(world)
        instance = msgspec.structs.replace(instance, vm_state=VmState.STOPPED, power_state=PowerState.SHUTDOWN)
        told = run(parts, RecordingJob())
        self._arrive(world, instance, migration, told)
        assert world.power(world.b, instance.uuid) == "shutdown"

    def test_resize_grows_the_disk(self, world: World) -> None:
        instance, migration, parts = self._begin(world, migration_type="resize")
        told = run(parts, RecordingJob())
        flavor = msgspec.structs.replace(instance.flavor, root_gb=instance.flavor.root_gb + 1)
        there, _ = self._arrive(world, msgspec.structs.replace(instance, flavor=flavor), migration, told)
        disks = {d.name: d for d in world.driver(world.b).get_instance_disk_info(there).disks}
        assert disks["disk"].virtual_size_bytes == flavor.root_gb << 30

    def test_resize_never_shrinks_a_disk(self, world: World) -> None:
        driver = world.driver(world.a)
        instance = world.new_instance(world.a)
        large = msgspec.structs.replace(instance.flavor, root_gb=instance.flavor.root_gb + 1)
        instance = active(msgspec.structs.replace(instance, flavor=large))
        run(driver.spawn(instance, SpawnRequest()), RecordingJob())
        migration = migration_of(world, instance, "resize")
        instance = moving(instance, migration)
        told = run(
            driver.migrate_disk_and_power_off(instance, migration, 0, 1, peer(world, instance, migration)),
            RecordingJob(),
        )
        small: Flavor = msgspec.structs.replace(large, root_gb=large.root_gb - 1)
        with pytest.raises(errors.Broken):
            self._arrive(world, msgspec.structs.replace(instance, flavor=small), migration, told)

    @pytest.mark.parametrize("times", [1, 2])
    @pytest.mark.parametrize("done", [1, 2, 3, 4, 5, 99])
    def test_undone_at_the_source_it_is_as_before(self, world: World, done: int, times: int) -> None:
        instance, _, parts = self._begin(world)
        before = world.files(world.a, instance.uuid)
        run(parts[:done], RecordingJob())
        undo(parts[: done + 1], RecordingJob(), times)
        assert_nothing(world, world.b, instance.uuid)
        assert world.files(world.a, instance.uuid) == before
        shut = "power_off" in [part.name for part in parts[:done]]
        assert world.power(world.a, instance.uuid) == ("shutdown" if shut else "running")
        world.driver(world.a).power_on(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "running"
        if world.guest_writes_disk:
            assert world.read_disk(world.a, instance.uuid).endswith(b"written by the guest")

    @pytest.mark.parametrize("done", range(7))
    def test_undone_at_the_destination_nothing_is_left(self, world: World, done: int) -> None:
        instance, migration, parts = self._begin(world)
        told = run(parts, RecordingJob())
        disk_info = objects.decode(told["disk_info"], DiskInfo, "test")
        there = msgspec.structs.replace(instance, host=world.b)
        arriving = world.driver(world.b).finish_migration(there, migration, disk_info)
        run(arriving[:done], RecordingJob())
        undo(arriving[: max(1, done + 1)], RecordingJob(), 2)
        assert_nothing(world, world.b, instance.uuid)
        undo(parts, RecordingJob())
        world.driver(world.a).power_on(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "running"

    def test_a_disk_that_did_not_arrive_is_noticed(self, world: World) -> None:
        instance, migration, parts = self._begin(world)
        told = run(parts, RecordingJob())
        info = objects.decode(told["disk_info"], DiskInfo, "test")
        more = msgspec.structs.replace(info.disks[0], name="disk.eph7")
        there = msgspec.structs.replace(instance, host=world.b)
        lying = msgspec.structs.replace(info, disks=[*info.disks, more])
        with pytest.raises(errors.MigrationFailed):
            run(world.driver(world.b).finish_migration(there, migration, lying), RecordingJob())

    def test_a_directory_of_somebody_else_is_not_overwritten(self, world: World) -> None:
        driver, instance = booted(world)
        there = msgspec.structs.replace(instance, host=world.b)
        run(world.driver(world.b).spawn(there, SpawnRequest()), RecordingJob())
        migration = migration_of(world, instance)
        with pytest.raises(errors.DestinationDiskExists):
            run(
                driver.migrate_disk_and_power_off(
                    moving(instance, migration), migration, 0, 1, peer(world, instance, migration)
                ),
                RecordingJob(),
            )
        assert world.power(world.b, instance.uuid) == "paused"

    @pytest.mark.parametrize("times", [1, 2])
    def test_revert(self, world: World, times: int) -> None:
        instance, migration, parts = self._begin(world)
        there, _ = self._arrive(world, instance, migration, run(parts, RecordingJob()))
        source, dest = world.driver(world.a), world.driver(world.b)
        dest.unpause(there)
        run(dest.set_aside(there, migration), RecordingJob(), times)
        assert world.power(world.b, instance.uuid) == "nostate"
        assert all(f.startswith(f"{instance.uuid}_resize") for f in world.files(world.b, instance.uuid))
        assert world.files(world.b, instance.uuid)
        back = source.finish_revert_migration(instance, migration)
        run(back, RecordingJob(), times)
        assert world.power(world.a, instance.uuid) == "paused"
        source.unpause(instance)
        dest.confirm_migration(there, migration, RecordingJob())
        assert_nothing(world, world.b, instance.uuid)
        assert world.power(world.a, instance.uuid) == "running"
        if world.guest_writes_disk:
            assert world.read_disk(world.a, instance.uuid).endswith(b"written by the guest")

    @pytest.mark.parametrize("same_host", [False, True])
    def test_set_aside_undone_is_as_it_was(self, world: World, same_host: bool) -> None:
        dest_host = world.a if same_host else world.b
        instance, migration, parts = self._begin(world, dest_host=dest_host)
        there, _ = self._arrive(world, instance, migration, run(parts, RecordingJob()))
        driver = world.driver(dest_host)
        driver.unpause(there)
        before = world.files(dest_host, instance.uuid)
        aside = driver.set_aside(there, migration)
        run(aside, RecordingJob())
        undo(aside, RecordingJob(), 2)
        assert world.files(dest_host, instance.uuid) == before
        assert world.power(dest_host, instance.uuid) == "shutdown"
        driver.power_on(there, RecordingJob())
        assert world.power(dest_host, instance.uuid) == "running"

    @pytest.mark.parametrize("done", range(5))
    def test_revert_undone_is_set_aside_again(self, world: World, done: int) -> None:
        instance, migration, parts = self._begin(world)
        run(parts, RecordingJob())
        aside = world.files(world.a, instance.uuid)
        back = world.driver(world.a).finish_revert_migration(instance, migration)
        run(back[:done], RecordingJob())
        undo(back[:done], RecordingJob(), 2)
        assert world.files(world.a, instance.uuid) == aside
        assert world.power(world.a, instance.uuid) == "nostate"

    def test_on_the_same_host(self, world: World) -> None:
        instance, migration, parts = self._begin(world, dest_host=world.a, migration_type="resize")
        told = run(parts, RecordingJob(), 2)
        there, _ = self._arrive(world, instance, migration, told, 2)
        driver = world.driver(world.a)
        driver.unpause(there)
        assert {left.kind for left in ours(driver, instance.uuid)} == {"domain", "directory", "resize"}
        run(driver.set_aside(there, migration), RecordingJob())
        run(driver.finish_revert_migration(instance, migration), RecordingJob(), 2)
        driver.unpause(instance)
        driver.confirm_migration(instance, migration, RecordingJob())
        assert {left.kind for left in ours(driver, instance.uuid)} == {"domain", "directory"}
        assert world.power(world.a, instance.uuid) == "running"

    def test_on_the_same_host_undone(self, world: World) -> None:
        instance, _, parts = self._begin(world, dest_host=world.a)
        before = world.files(world.a, instance.uuid)
        run(parts, RecordingJob())
        undo(parts, RecordingJob(), 2)
        assert world.files(world.a, instance.uuid) == before

    def test_cancelled_while_sending(self, world: World) -> None:
        instance, _, parts = self._begin(world)
        sending = next(i for i, part in enumerate(parts) if part.name.startswith("send_"))
        run(parts[:sending], RecordingJob())
        with pytest.raises(errors.Cancelled):
            parts[sending].do(RecordingJob(cancel_at=1))
        undo(parts[: sending + 1], RecordingJob())
        assert_nothing(world, world.b, instance.uuid)
        world.driver(world.a).power_on(instance, RecordingJob())
        assert world.power(world.a, instance.uuid) == "running"

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(moves=st.lists(st.sampled_from(["do", "do", "again", "undo", "restart"]), max_size=14))
    def test_parts_in_any_order_a_crash_can_make(self, world: World, moves: list[str]) -> None:
        instance, migration, parts = self._begin(world)
        before, done = world.files(world.a, instance.uuid), 0
        for move in moves:
            if move == "do" and done < len(parts):
                parts[done].do(RecordingJob())
                done += 1
            elif move == "again" and done:
                parts[done - 1].do(RecordingJob())
            elif move == "undo" and done:
                done -= 1
                parts[done].undo(RecordingJob())
            elif move == "restart":
                parts = world.restart(world.a).migrate_disk_and_power_off(
                    instance, migration, 30, 1, peer(world, instance, migration)
                )
        undo(parts, RecordingJob())
        assert world.files(world.a, instance.uuid) == before
        assert_nothing(world, world.b, instance.uuid)


class LiveMoveContract(_Moves):
    """Live migration, abort, rollback."""

    needs = LIVE

    def _prepare(
        self, world: World
    ) -> tuple[ComputeDriver, ComputeDriver, Instance, Migration, MigrateData, list[Part]]:
        source, instance = booted(world)
        dest = world.driver(world.b)
        migration = migration_of(world, instance, "live-migration")
        instance = moving(active(instance), migration)
        data = dest.check_can_live_migrate_destination(instance, migration, source.get_available_resource(), False)
        data = source.check_can_live_migrate_source(instance, migration, data)
        parts = dest.pre_live_migration(instance, migration, data, source.get_instance_disk_info(instance))
        return source, dest, instance, migration, data, parts

    @pytest.mark.parametrize("times", [1, 2])
    def test_whole_move(self, world: World, times: int) -> None:
        source, dest, instance, migration, data, parts = self._prepare(world)
        if world.guest_writes_disk:
            world.write_disk(world.a, instance.uuid, b"before")
        told = run(parts, RecordingJob(), times)
        data = objects.decode(told["migrate_data"], MigrateData, "test")
        before = world.memory(world.a, instance.uuid)
        for _ in range(times):
            source.live_migration(instance, migration, data, RecordingJob())
        assert world.power(world.b, instance.uuid) == "running"
        assert world.power(world.a, instance.uuid) != "running"
        after = world.memory(world.b, instance.uuid)
        assert (after[0], after[1] >= before[1]) == (before[0], True)
        assert source.get_job_statistics(instance.uuid).type == "completed"
        there = msgspec.structs.replace(instance, host=world.b)
        for _ in range(times):
            dest.post_live_migration_at_destination(there, migration)
            source.post_live_migration(instance, migration, data)
        assert_nothing(world, world.a, instance.uuid)
        assert dest.get_info(instance.uuid).owner == world.b
        assert [r.host for r in dest.list_records() if r.uuid == instance.uuid] == [world.b]
        if world.guest_writes_disk:
            assert world.read_disk(world.b, instance.uuid).endswith(b"before")
        dest.power_off(there, RecordingJob())
        assert world.power(world.b, instance.uuid) == "shutdown", "its definition was not made persistent"
        dest.power_on(there, RecordingJob())
        assert world.power(world.b, instance.uuid) == "running"

    def test_paused_guest_arrives_paused(self, world: World) -> None:
        source, _, instance, migration, data, parts = self._prepare(world)
        source.pause(instance)
        run(parts, RecordingJob())
        source.live_migration(instance, migration, data, RecordingJob())
        assert world.power(world.b, instance.uuid) == "paused"

    @pytest.mark.parametrize("done", range(5))
    def test_preparation_undone_leaves_nothing(self, world: World, done: int) -> None:
        _, _, instance, _, _, parts = self._prepare(world)
        run(parts[:done], RecordingJob())
        undo(parts[: done + 1], RecordingJob(), 2)
        assert_nothing(world, world.b, instance.uuid)
        assert world.power(world.a, instance.uuid) == "running"

    def test_the_checks_change_nothing(self, world: World) -> None:
        _, _, instance, _, data, _ = self._prepare(world)
        assert_nothing(world, world.b, instance.uuid)
        assert {disk.name for disk in data.disks} >= {"disk"}

    def test_destination_refuses_another_processor(self, world: World) -> None:
        source, dest, instance, migration, _, _ = self._prepare(world)
        other = dataclasses.replace(source.get_available_resource(), machine_arch="vax")
        with pytest.raises(errors.Refused):
            dest.check_can_live_migrate_destination(instance, migration, other, False)

    def test_destination_refuses_what_does_not_fit(self, world: World) -> None:
        source, dest, instance, migration, _, _ = self._prepare(world)
        flavor = msgspec.structs.replace(instance.flavor, memory_mb=1 << 24)
        large = msgspec.structs.replace(instance, flavor=flavor)
        with pytest.raises(errors.Refused):
            dest.check_can_live_migrate_destination(large, migration, source.get_available_resource(), False)

    def test_source_refuses_a_guest_that_is_off(self, world: World) -> None:
        source, _, instance, migration, data, _ = self._prepare(world)
        source.power_off(instance, RecordingJob())
        with pytest.raises(errors.Refused):
            source.check_can_live_migrate_source(instance, migration, data)

    def test_failure_leaves_the_guest_running_here(self, world: World) -> None:
        source, dest, instance, migration, data, _ = self._prepare(world)
        token, _ = world.memory(world.a, instance.uuid)
        with pytest.raises(errors.MigrationFailed):  # nothing was prepared at the destination
            source.live_migration(instance, migration, data, RecordingJob())
        for _ in range(2):
            source.rollback_live_migration_at_source(instance, migration)
            dest.rollback_live_migration_at_destination(instance, migration, data)
        assert world.power(world.a, instance.uuid) == "running"
        assert world.memory(world.a, instance.uuid)[0] == token
        assert_nothing(world, world.b, instance.uuid)

    def test_rollback_at_destination_removes_what_was_prepared(self, world: World) -> None:
        _, dest, instance, migration, _, parts = self._prepare(world)
        run(parts, RecordingJob())
        for _ in range(2):
            dest.rollback_live_migration_at_destination(instance, migration, None)
        assert_nothing(world, world.b, instance.uuid)

    def test_rollback_at_destination_never_kills_the_guest(self, world: World) -> None:
        source, dest, instance, migration, data, parts = self._prepare(world)
        run(parts, RecordingJob())
        source.live_migration(instance, migration, data, RecordingJob())
        with pytest.raises(errors.InvalidState):
            dest.rollback_live_migration_at_destination(instance, migration, data)
        assert world.power(world.b, instance.uuid) == "running"

    def test_cancelled_before_it_begins(self, world: World) -> None:
        source, dest, instance, migration, data, parts = self._prepare(world)
        run(parts, RecordingJob())
        with pytest.raises(errors.Cancelled):
            source.live_migration(instance, migration, data, RecordingJob(cancel_at=1))
        source.rollback_live_migration_at_source(instance, migration)
        dest.rollback_live_migration_at_destination(instance, migration, data)
        assert world.power(world.a, instance.uuid) == "running"
        assert_nothing(world, world.b, instance.uuid)

    def test_abort_of_nothing_ends_well(self, world: World) -> None:
        driver, instance = booted(world)
        driver.live_migration_abort(instance)
        assert driver.get_job_statistics(instance.uuid).type == "none"
        assert world.power(world.a, instance.uuid) == "running"

    def test_force_complete_of_nothing(self, world: World) -> None:
        driver, instance = booted(world)
        with pytest.raises(errors.InvalidState):
            driver.live_migration_force_complete(instance, postcopy=False)
