"""What the destination of a cold move promises beyond the contract, over libvirt's test driver and real files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from compute_worker import errors, objects
from compute_worker.objects import DiskInfo, Instance, Migration
from compute_worker.virt.driver import Part, SpawnRequest
from compute_worker.virt.libvirt.disks.cache import base_name
from tests.virt.contract import assert_nothing, booted
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.moveworld import MoveWorld
from tests.virt.libvirt.test_coldmove_source import begin, parts_of
from tests.virt.world import peer, run, undo

Make = Callable[..., MoveWorld]


def sent(world: MoveWorld, **changes: Any) -> tuple[Instance, Migration, DiskInfo]:
    """A guest of ``a`` whose disks have come to ``b``; the record is the destination's."""
    instance, migration = begin(world, changes)
    told = run(parts_of(world, instance, migration), RecordingJob())
    there = msgspec.structs.replace(instance, host=migration.dest_host)
    return there, migration, objects.decode(told["disk_info"], DiskInfo, "test")


def finish(world: MoveWorld, instance: Instance, migration: Migration, info: DiskInfo) -> list[Part]:
    return world.driver(migration.dest_host).finish_migration(instance, migration, info)


# --- what the source asks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        {"ask": "nosuch"},
        {},
        {"ask": "prepare"},
        {"ask": "prepare", "disk_info": {"disks": [{"name": "../x", "format": "raw", "virtual_size_bytes": 1}]}},
        {"ask": "prepare", "disk_info": {}, "machine": "pc' --x"},
        {"ask": "prepare", "disk_info": {}, "bases": [{"name": "/etc/passwd", "size_bytes": 1}]},
        {"ask": "sending", "disks": ["../../x"], "sending": "0" * 64},
        {"ask": "sending", "disks": ["disk"], "sending": "?"},
        {"ask": "open", "name": "../disk", "size": 1, "window": 4096},
        {"ask": "open", "name": "migration.json", "size": 1, "window": 4096},
    ],
)  # fmt: skip
def test_bad_requests_change_nothing(move_world: Make, request_: dict[str, Any]) -> None:
    world = move_world()
    instance, migration = begin(world)
    with pytest.raises((errors.InvalidCommand, errors.MigrationFailed)):
        peer(world, instance, migration)(request_)
    assert_nothing(world, world.b, instance.uuid)


def test_a_guest_in_libvirt_that_nobody_knows_is_not_replaced(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    other = world.driver(world.b)
    run(other.spawn(msgspec.structs.replace(instance, migration=None), SpawnRequest()), RecordingJob())
    other._deeds.disks.remove(instance.uuid)
    with pytest.raises(errors.DestinationDiskExists, match="a guest of that uuid in libvirt on host node2"):
        parts_of(world, instance, migration)[0].do(RecordingJob())
    assert world.power(world.b, instance.uuid) == "paused"


def test_messages_of_an_earlier_attempt_do_no_harm(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    second = msgspec.structs.replace(migration, attempt=2)
    run(parts_of(world, instance, migration)[:4], RecordingJob())
    disk = world.path(world.b, instance.uuid) / "disk"
    good = disk.read_bytes()
    disk.write_bytes(good[:-1] + b"?")
    run(parts_of(world, instance, second)[:4], RecordingJob())
    assert disk.read_bytes() == good, "what an earlier attempt sent is not built upon"
    for late in (
        {"ask": "prepare", "disk_info": {}}, {"ask": "sending", "disks": [], "sending": "0" * 64},
        {"ask": "open", "name": "disk.swap", "size": 1 << 20, "window": 1 << 20},
    ):  # fmt: skip
        with pytest.raises(errors.MigrationFailed, match="attempt 1 is over"):
            peer(world, instance, migration)(late)
    peer(world, instance, migration)({"ask": "remove"})
    assert disk.exists(), "nor does its late undo take away what this one sent"


def test_after_it_is_accepted_no_message_of_the_source_touches_it(move_world: Make) -> None:
    world = move_world()
    instance, migration, info = sent(world)
    parts = finish(world, instance, migration, info)
    run(parts, RecordingJob())
    before = {name: world.path(world.b, "") / name for name in world.files(world.b, instance.uuid)}
    ask = peer(world, instance, migration)
    ask({"ask": "remove"})
    ask({"ask": "remove", "name": "disk"})
    for late in (
        {"ask": "begin"}, {"ask": "sending", "disks": ["disk"], "sending": "0" * 64},
        {"ask": "open", "name": "disk", "size": 1 << 20, "window": 1 << 20}, {"ask": "place", "name": "disk"},
    ):  # fmt: skip
        with pytest.raises((errors.DestinationDiskExists, errors.MigrationFailed)):
            ask(late)
    assert set(before) == world.files(world.b, instance.uuid)
    assert world.power(world.b, instance.uuid) == "paused"


def create(path: Path, size: str, *options: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size], check=True, timeout=20)


# --- finish_migration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path, base: path.unlink(), "did not arrive"),
        (lambda path, base: (path.unlink(), path.symlink_to("/etc/passwd")), "did not arrive"),
        (lambda path, base: path.write_bytes(b"no disk at all" * 100), "is no qcow2"),
        (lambda path, base: create(path, "7G", "-u", "-F", "raw", "-b", f"../_base/{base}"), "has 7516192768 bytes"),
        (lambda path, base: create(path, "1G", "-u", "-F", "raw", "-b", "/etc/passwd"), "stands on /etc/passwd"),
        (lambda path, base: create(path, "1G"), "stands on None instead of"),
    ],
)
def test_a_disk_that_is_not_what_was_told(move_world: Make, spoil: Callable[..., object], problem: str) -> None:
    world = move_world()
    instance, migration, info = sent(world)
    spoil(world.path(world.b, instance.uuid) / "disk", info.disks[0].backing)
    parts = finish(world, instance, migration, info)
    with pytest.raises(errors.MigrationFailed, match=problem):
        parts[0].do(RecordingJob())
    undo(parts[:1], RecordingJob(), 2)
    assert_nothing(world, world.b, instance.uuid)


def test_a_raw_disk_of_another_size(move_world: Make) -> None:
    world = move_world(images_type="raw")
    instance, migration, info = sent(world)
    os.truncate(world.path(world.b, instance.uuid) / "disk", 1 << 20)
    with pytest.raises(errors.MigrationFailed, match="1048576 bytes instead of"):
        finish(world, instance, migration, info)[0].do(RecordingJob())


def test_nothing_that_another_migration_brought_is_taken_or_removed(move_world: Make) -> None:
    world = move_world()
    instance, migration, info = sent(world)
    other = msgspec.structs.replace(migration, uuid=instance.vifs[0].id)
    parts = finish(world, instance, other, info)
    with pytest.raises(errors.MigrationFailed, match="did not come by it"):
        parts[0].do(RecordingJob())
    undo(parts[:1], RecordingJob())
    run(world.driver(world.b).set_aside(instance, other), RecordingJob())
    assert (world.path(world.b, instance.uuid) / "disk").exists()
    with pytest.raises(errors.MigrationFailed, match="no disk"):
        finish(world, instance, migration, DiskInfo())[0].do(RecordingJob())


def test_a_shrinking_flavor_is_refused_before_anything_changes(move_world: Make) -> None:
    world = move_world()
    instance, migration, info = sent(world)
    flavor = msgspec.structs.replace(instance.flavor, ephemeral_gb=0, root_gb=5)
    small = msgspec.structs.replace(instance, flavor=flavor, block_device_info=objects.BlockDeviceInfo())
    parts = finish(world, small, migration, info)
    with pytest.raises(errors.FlavorDiskTooSmall, match=r"disk\.eph0"):
        parts[0].do(RecordingJob())
    assert not (world.path(world.b, instance.uuid) / "disk.info").exists()


def test_records_say_what_came_and_whose_it_is(move_world: Make) -> None:
    world = move_world()
    instance, migration, info = sent(world)
    driver = world.driver(world.b)
    assert [(r.host, r.migration) for r in driver.list_records()] == [(world.a, migration.uuid)], "not ours yet"
    run(finish(world, instance, migration, info), RecordingJob())
    assert [(r.host, r.migration) for r in driver.list_records()] == [(world.b, migration.uuid)]
    found = driver.get_info(instance.uuid)
    assert (found.owner, found.migration) == (world.b, migration.uuid)
    assert {left.kind for left in driver.list_leftovers()} == {"directory", "domain"}


def test_images_can_be_there_before_any_disk(move_world: Make) -> None:
    """What a prepared destination does while the guest runs: no directory of the instance is made."""
    world = move_world()
    instance, migration = begin(world)
    there = msgspec.structs.replace(instance, host=world.b)
    fetch = next(p for p in finish(world, there, migration, DiskInfo()) if p.name == "fetch_images")
    for _ in range(2):
        fetch.do(RecordingJob())
    assert (world.path(world.b, "_base") / base_name(instance.image)).exists()
    fetch.undo(RecordingJob())
    assert_nothing(world, world.b, instance.uuid)


def test_a_directory_that_only_names_images_is_in_nobody_s_way(move_world: Make) -> None:
    """Images may have been fetched as for a spawn."""
    world = move_world()
    instance, migration = begin(world)
    there = msgspec.structs.replace(instance, host=world.b)
    fetch = world.driver(world.b).spawn(there, SpawnRequest())[0]
    fetch.do(RecordingJob())
    assert world.files(world.b, instance.uuid) == {instance.uuid, f"{instance.uuid}/images.json"}
    told = run(parts_of(world, instance, migration), RecordingJob())
    parts = finish(world, there, migration, objects.decode(told["disk_info"], DiskInfo, "test"))
    run(parts, RecordingJob())
    undo(parts, RecordingJob())
    fetch.undo(RecordingJob())
    assert_nothing(world, world.b, instance.uuid)


def test_an_image_that_cannot_be_had_early_is_no_error(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    (world.root / "images" / "tiny").unlink()
    job = RecordingJob()
    fetch = next(p for p in finish(world, instance, migration, DiskInfo()) if p.name == "fetch_images")
    fetch.do(job)
    assert "it will be asked of the host that the instance is on" in job.reasons[-1]


def test_early_images_on_the_same_host_leave_the_running_guest_alone(move_world: Make) -> None:
    world = move_world()
    driver, instance = booted(world)
    before = {p: p.stat().st_mtime_ns for p in world.path(world.a, instance.uuid).iterdir()}
    migration = Migration(uuid=instance.vifs[0].id, instance=instance.uuid, source_host=world.a, dest_host=world.a)
    fetch = next(p for p in driver.finish_migration(instance, migration, DiskInfo()) if p.name == "fetch_images")
    fetch.do(RecordingJob())
    fetch.undo(RecordingJob())
    assert before == {p: p.stat().st_mtime_ns for p in world.path(world.a, instance.uuid).iterdir()}


# --- revert on one host -------------------------------------------------------------------------------------------


def test_on_one_host_what_is_set_aside_late_is_not_the_original(move_world: Make) -> None:
    """``set_aside`` comes once more when the source has long restored its copy."""
    world = move_world()
    there, migration, info = sent(world, dest_host=world.a)
    driver = world.driver(world.a)
    run(finish(world, there, migration, info), RecordingJob())
    aside = driver.set_aside(there, migration)
    run(aside, RecordingJob(), 2)
    run(driver.finish_revert_migration(there, migration), RecordingJob())
    before = world.files(world.a, there.uuid)
    run(aside, RecordingJob())
    assert (world.files(world.a, there.uuid), world.power(world.a, there.uuid)) == (before, "paused")
    driver.confirm_migration(there, migration, RecordingJob())
    assert {name.split("/")[0] for name in world.files(world.a, there.uuid)} == {there.uuid}


# --- disks of a running guest -------------------------------------------------------------------------------------


def test_a_filled_overlay_of_another_point_in_time_is_stale(move_world: Make) -> None:
    """It was finished, the guest was taken back and has run since: its disk is sent again from the beginning."""
    world = move_world()
    instance, migration = begin(world)
    ask = peer(world, instance, migration)
    run(parts_of(world, instance, migration)[:1], RecordingJob())
    asked = {"ask": "overlay", "name": "disk", "size": 1 << 30, "window": 1 << 20, "token": "precopy-0123456789abcdef",
             "cluster": 1 << 16, "backing": base_name(instance.image), "backing_format": "raw"}  # fmt: skip
    state = {"ask": "sending", "disks": [], "sending": "0" * 64}
    assert ask(asked)["complete"] is False
    assert ask(state)["overlays"] == [], "it is not whole yet"
    ask({"ask": "finish", "name": "disk", "size": None})
    assert ask(state)["overlays"] == ["disk"]
    assert ask(asked)["complete"] is True
    later = {**asked, "token": "precopy-fedcba9876543210"}
    assert ask(later)["complete"] is False
    assert ask(state)["overlays"] == []
    ask({"ask": "finish", "name": "disk", "size": None})
    ask({"ask": "remove", "name": "disk"})
    assert ask(state)["overlays"] == []
    world.driver(world.b)._receiver.stop_all()
