"""Confirm, revert and delete of cold moves, beyond the contract."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.coldmove_verdict import is_copy
from compute_worker.virt.libvirt.disks.cache import base_name
from tests.virt.contract import assert_nothing
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.moveworld import MoveWorld
from tests.virt.libvirt.test_coldmove_source import arrive, begin, parts_of
from tests.virt.world import peer, run

Make = Callable[..., MoveWorld]


def test_a_copy_is_told_from_the_original_at_every_moment(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world, {"dest_host": world.a})
    directory = world.driver(world.a)._deeds.disks.directory
    parts = parts_of(world, instance, migration)
    seen = []
    for part in parts:
        part.do(RecordingJob())
        seen.append((part.name, is_copy(directory, instance.uuid, migration)))
    assert [name for name, copy in seen if copy] == ["send_disk", "send_disk.eph0", "send_disk.swap", "verify_copy"]
    other = msgspec.structs.replace(migration, uuid=instance.vifs[0].id)
    assert not is_copy(directory, instance.uuid, other)


def test_confirm_leaves_a_copy_of_another_migration(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    run(parts_of(world, instance, migration), RecordingJob())
    late = msgspec.structs.replace(migration, uuid=instance.vifs[0].id)
    job = RecordingJob()
    world.driver(world.a).confirm_migration(instance, late, job)
    assert world.path(world.a, instance.uuid, "_resize").is_dir()
    assert f"of migration {migration.uuid}" in job.reasons[-1]
    (world.path(world.a, instance.uuid, "_resize") / "instance.json").write_text("garbage")
    world.driver(world.a).confirm_migration(instance, migration, job)
    assert world.files(world.a, instance.uuid) == set()


def test_a_revert_brings_back_a_base_that_is_gone(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    run(parts_of(world, instance, migration), RecordingJob())
    base = world.path(world.a, "_base") / base_name(instance.image)
    assert world.driver(world.a).manage_image_cache(set()) == [], "what is set aside needs its bases"
    base.unlink()
    run(world.driver(world.a).finish_revert_migration(instance, migration), RecordingJob())
    assert base.exists() and world.power(world.a, instance.uuid) == "paused"


def test_a_revert_with_something_in_the_way(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    run(parts_of(world, instance, migration), RecordingJob())
    world.path(world.a, instance.uuid).mkdir()
    with pytest.raises(errors.GuestFailed, match="is in the way"):
        run(world.driver(world.a).finish_revert_migration(instance, migration), RecordingJob())


@pytest.mark.parametrize("stage", ["while copying", "resized", "reverting"])
def test_a_delete_leaves_nothing_on_either_host(move_world: Make, stage: str) -> None:
    """CVE-2015-3241, CVE-2015-3280, CVE-2016-7498."""
    world = move_world()
    instance, migration = begin(world)
    parts = parts_of(world, instance, migration)
    if stage == "while copying":
        run(parts[:4], RecordingJob())
        ask = peer(world, instance, migration)
        ask({"ask": "open", "name": "disk.swap", "size": 1 << 20, "window": 1 << 20})
        assert world.listening(world.b)
    else:
        there = arrive(world, instance, migration, run(parts, RecordingJob()))
        if stage == "reverting":
            run(world.driver(world.b).set_aside(there, migration), RecordingJob())
    for host in (world.a, world.b):
        run(world.driver(host).destroy(instance), RecordingJob(), 2)
        assert_nothing(world, host, instance.uuid)
        assert not world.listening(host)
