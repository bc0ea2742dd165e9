"""Cold moves between two hosts that see one instances directory: nothing travels, and nobody's files are taken for
another's."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from compute_worker import objects
from compute_worker.objects import DiskInfo, Instance, Migration
from compute_worker.virt.driver import Part
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.moveworld import MoveWorld
from tests.virt.libvirt.test_coldmove_source import begin, parts_of
from tests.virt.world import run, undo


@pytest.fixture
def world(move_world: Callable[..., MoveWorld]) -> MoveWorld:
    return move_world(shared=True)


def directories(world: MoveWorld, uuid: str) -> set[str]:
    return {name.split("/")[0].removeprefix(uuid) for name in world.files(world.a, uuid)}


def sent(world: MoveWorld) -> tuple[Instance, Instance, Migration, list[Part], list[Part]]:
    """Record at the source and at the destination, the move, its parts, and the destination's."""
    instance, migration = begin(world)
    world.write_disk(world.a, instance.uuid, b"written")
    parts, job = parts_of(world, instance, migration), RecordingJob()
    told = run(parts, job, 2)
    assert any("by shared: host node2 sees the same" in reason for reason in job.reasons)
    there = msgspec.structs.replace(instance, host=world.b)
    info = objects.decode(told["disk_info"], DiskInfo, "test")
    assert info.shared
    return instance, there, migration, parts, world.driver(world.b).finish_migration(there, migration, info)


def test_whole_move_and_confirm(world: MoveWorld) -> None:
    instance, there, migration, _, arriving = sent(world)
    run(arriving, RecordingJob(), 2)
    assert not world.driver(world.b).get_instance_disk_info(there).shared, "that is of the move, not of the disks"
    world.driver(world.b).unpause(there)
    assert directories(world, instance.uuid) == {"", "_resize"}
    for _ in range(2):
        world.driver(world.a).confirm_migration(instance, migration, RecordingJob())
    assert directories(world, instance.uuid) == {""}
    assert world.read_disk(world.b, instance.uuid).endswith(b"written")
    assert (world.power(world.a, instance.uuid), world.power(world.b, instance.uuid)) == ("nostate", "running")
    assert [record.host for record in world.driver(world.a).list_records()] == [world.b]


@pytest.mark.parametrize("done", [1, 2, 3, 99])
def test_undone_at_the_source_it_is_as_before(world: MoveWorld, done: int) -> None:
    instance, migration = begin(world)
    before = world.files(world.a, instance.uuid)
    parts = parts_of(world, instance, migration)
    run(parts[:done], RecordingJob())
    undo(parts[: done + 1], RecordingJob(), 2)
    assert world.files(world.a, instance.uuid) == before
    world.driver(world.a).power_on(instance, RecordingJob())
    assert (world.power(world.a, instance.uuid), world.power(world.b, instance.uuid)) == ("running", "nostate")


@pytest.mark.parametrize("done", range(7))
def test_the_destination_says_no(world: MoveWorld, done: int) -> None:
    instance, _, _, parts, arriving = sent(world)
    run(arriving[:done], RecordingJob())
    undo(arriving[: max(1, done + 1)], RecordingJob(), 2)
    assert directories(world, instance.uuid) == {"_resize"}, "the source's copy is the source's"
    undo(parts, RecordingJob())
    undo(arriving[:1], RecordingJob())
    world.driver(world.a).power_on(instance, RecordingJob())
    assert world.power(world.a, instance.uuid) == "running"
    assert world.read_disk(world.a, instance.uuid).endswith(b"written")


def test_revert(world: MoveWorld) -> None:
    instance, there, migration, _, arriving = sent(world)
    run(arriving, RecordingJob())
    world.driver(world.b).unpause(there)
    world.write_disk(world.b, instance.uuid, b"written there")
    aside = world.driver(world.b).set_aside(there, migration)
    run(aside, RecordingJob(), 2)
    assert directories(world, instance.uuid) == {"_resize", "_del"}
    undo(aside, RecordingJob())
    assert directories(world, instance.uuid) == {"", "_resize"}
    run(aside, RecordingJob())
    run(world.driver(world.a).finish_revert_migration(instance, migration), RecordingJob(), 2)
    for _ in range(2):
        world.driver(world.b).confirm_migration(there, migration, RecordingJob())
    assert directories(world, instance.uuid) == {""}
    assert world.read_disk(world.a, instance.uuid).endswith(b"written")
    assert (world.power(world.a, instance.uuid), world.power(world.b, instance.uuid)) == ("paused", "nostate")
