"""What the source of a cold move promises beyond the contract, over libvirt's test driver and real files."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from compute_worker import errors, objects
from compute_worker.images import files
from compute_worker.objects import DiskInfo, Flavor, Instance, Migration
from compute_worker.virt.driver import Part, SpawnRequest
from compute_worker.virt.libvirt.disks.bases import PREFIX
from compute_worker.virt.libvirt.disks.cache import base_name
from tests.virt.contract import assert_nothing, booted
from tests.virt.contract_moves import active, migration_of
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.moveworld import MoveWorld
from tests.virt.world import moving, peer, run, undo

Make = Callable[..., MoveWorld]
SECRET = b"the host's own secret"


def begin(world: MoveWorld, change: Mapping[str, Any] | None = None, **changes: Any) -> tuple[Instance, Migration]:
    """A guest that runs on ``a`` and is to go to ``b``."""
    _, instance = booted(world, **changes)
    migration = migration_of(world, instance, **(change or {}))
    return moving(active(instance), migration), migration


def parts_of(world: MoveWorld, instance: Instance, migration: Migration, ask: Any = None) -> list[Part]:
    ask = ask or peer(world, instance, migration)
    return world.driver(world.a).migrate_disk_and_power_off(instance, migration, 5, 1, ask)


def arrive(
    world: MoveWorld, instance: Instance, migration: Migration, told: Mapping[str, Any], **flavor: int
) -> Instance:
    there = msgspec.structs.replace(
        instance, host=migration.dest_host, flavor=msgspec.structs.replace(instance.flavor, **flavor)
    )
    info = objects.decode(told["disk_info"], DiskInfo, "test")
    run(world.driver(migration.dest_host).finish_migration(there, migration, info), RecordingJob())
    return there


# --- refused while the guest runs ---------------------------------------------------------------------------------


def refused(world: MoveWorld, instance: Instance, migration: Migration, error: type[BaseException], ask: Any = None,
            match: str = ".") -> None:  # fmt: skip
    """Refused by the first part: the guest runs on, and nothing is at the destination after the undo."""
    parts = parts_of(world, instance, migration, ask)
    with pytest.raises(error, match=match):
        parts[0].do(RecordingJob())
    assert world.power(world.a, instance.uuid) == "running"
    undo(parts[:1], RecordingJob(), 2)
    assert world.power(world.a, instance.uuid) == "running"
    assert_nothing(world, world.b, instance.uuid)


def test_a_flavor_with_a_smaller_disk(move_world: Make) -> None:
    world = move_world()
    flavor = Flavor(vcpus=1, memory_mb=64, root_gb=1, ephemeral_gb=1, swap_mb=16)
    instance, migration = begin(world, {"new_flavor": msgspec.structs.replace(flavor, ephemeral_gb=0)},
                                block_device_info=objects.BlockDeviceInfo())  # fmt: skip
    refused(world, instance, migration, errors.FlavorDiskTooSmall, match="disk.local")


def test_a_destination_without_room(move_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = move_world()
    instance, migration = begin(world)

    def full(request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request["ask"] == "prepare":
            disks = request["disk_info"]["disks"]
            request = {**request, "disk_info": {"disks": [{**d, "allocated_bytes": 1 << 59} for d in disks]}}
        return peer(world, instance, migration)(request)

    refused(world, instance, migration, errors.DiskFull, full)


def test_no_transport_works(move_world: Make) -> None:
    world = move_world(transfer={"nbd_plaintext": False})
    refused(world, *begin(world), errors.MigrationFailed, match="no disk transport works")


def test_a_destination_that_does_not_answer(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)

    def silent(request: Mapping[str, Any]) -> Mapping[str, Any]:
        raise errors.PeerUnavailable(host=world.b)

    refused(world, instance, migration, errors.PeerUnavailable, silent)


@pytest.mark.parametrize(
    "name", ["../../../etc/shadow", PREFIX + "..", f"{PREFIX}{'0' * 40}_{'0' * 12}", "disk.info"]
)
def test_a_destination_that_wants_what_is_not_the_instance_s(move_world: Make, name: str) -> None:
    world = move_world()
    instance, migration = begin(world)

    def greedy(request: Mapping[str, Any]) -> Mapping[str, Any]:
        answer = peer(world, instance, migration)(request)
        return {"wanted": {name: "please"}} if request["ask"] == "prepare" else answer

    refused(world, instance, migration, errors.MigrationFailed, greedy, "none of the instance's files")


def test_a_guest_suspended_to_disk_keeps_its_memory(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    world.driver(world.a).suspend(instance, RecordingJob())
    parts = parts_of(world, instance, migration)
    with pytest.raises(errors.InvalidState):
        parts[0].do(RecordingJob())
    assert world.driver(world.a)._deeds.guest(instance.uuid).has_managed_save()


def test_a_copy_that_an_older_move_left_here_is_in_the_way(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    aside = world.path(world.a, instance.uuid, "_resize")
    aside.mkdir()
    refused(world, instance, migration, errors.DestinationDiskExists)
    assert aside.exists()


# --- set aside and taken back -------------------------------------------------------------------------------------


def test_a_guest_that_runs_is_not_set_aside(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    with pytest.raises(errors.InvalidState):
        parts_of(world, instance, migration)[2].do(RecordingJob())
    assert world.power(world.a, instance.uuid) == "running"


def test_what_is_set_aside_says_by_what(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    run(parts_of(world, instance, migration)[:3], RecordingJob())
    record = world.driver(world.a)._deeds.disks.directory.read_record(instance.uuid, "_resize")
    assert record is not None and (record.migration, record.host) == (migration.uuid, world.a)


def test_disks_are_on_the_disk_before_they_are_set_aside(move_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a copy that is gone on with after a power failure could be of two states."""
    world = move_world()
    instance, migration = begin(world)
    parts = parts_of(world, instance, migration)
    run(parts[:2], RecordingJob())
    order: list[str] = []
    fsync, rename = files.fsync, os.rename

    def recorded(path: Path) -> None:
        order.append(path.name)
        fsync(path)

    def renamed(old: Path, new: Path) -> None:
        order.append(f"-> {new.name}")
        rename(old, new)

    monkeypatch.setattr(files, "fsync", recorded)
    monkeypatch.setattr(os, "rename", renamed)
    parts[2].do(RecordingJob())
    moved = order.index(f"-> {instance.uuid}_resize")
    assert {"disk", "disk.eph0", "disk.swap"} <= set(order[:moved])
    assert "instances" in order[moved:]


def test_a_death_between_undefining_and_renaming(move_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = move_world()
    instance, migration = begin(world)
    before = world.files(world.a, instance.uuid)
    parts = parts_of(world, instance, migration)
    run(parts[:2], RecordingJob())
    world.driver(world.a)._deeds.undefine(instance.uuid)
    undo(parts[:3], RecordingJob())
    assert (world.files(world.a, instance.uuid), world.power(world.a, instance.uuid)) == (before, "shutdown")
    world.driver(world.a)._deeds.undefine(instance.uuid)
    run(parts[2:3], RecordingJob())
    assert {name.split("/")[0] for name in world.files(world.a, instance.uuid)} == {f"{instance.uuid}_resize"}


@pytest.mark.parametrize("began", [False, True])
def test_a_death_while_the_copy_on_the_same_host_is_made(move_world: Make, began: bool) -> None:
    """Its directory is there, with no mark yet or with nothing else."""
    world = move_world()
    instance, migration = begin(world, {"dest_host": world.a})
    before = world.files(world.a, instance.uuid)
    parts = parts_of(world, instance, migration)
    run(parts[:3], RecordingJob())
    if began:
        world.driver(world.a).answer_peer(instance, migration, {"ask": "begin"})
    else:
        world.path(world.a, instance.uuid).mkdir()
    undo(parts[:4], RecordingJob())
    assert (world.files(world.a, instance.uuid), world.power(world.a, instance.uuid)) == (before, "shutdown")


def test_the_machine_type_comes_back_and_travels(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    driver = world.driver(world.a)
    defined = driver._deeds.guest(instance.uuid).domain(inactive=True)
    assert defined.os is not None
    driver.power_off(instance, RecordingJob())
    defined.os.machine = "xenpv"
    driver._host.define(defined.to_xml())
    driver._deeds.define(instance, RecordingJob())
    parts = parts_of(world, instance, migration)
    run(parts[:3], RecordingJob())
    undo(parts[:3], RecordingJob())
    assert driver._deeds.machine(instance.uuid) == "xenpv"
    there = arrive(world, instance, migration, run(parts, RecordingJob()))
    assert world.driver(world.b)._deeds.machine(there.uuid) == "xenpv"


def test_libvirt_that_refuses_the_definition_does_not_keep_the_files(
    move_world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = move_world()
    instance, migration = begin(world)
    parts, job = parts_of(world, instance, migration), RecordingJob()
    run(parts[:3], job)

    def refuse(*args: object) -> None:
        raise errors.GuestFailed(instance=instance.uuid, reason="no such emulator")

    with monkeypatch.context() as patch:
        patch.setattr(world.driver(world.a)._deeds, "define", refuse)
        undo(parts[:3], job)
    assert world.path(world.a, instance.uuid).is_dir()
    assert any("defined when it is started" in reason for reason in job.reasons)
    world.driver(world.a).power_on(instance, job)
    assert world.power(world.a, instance.uuid) == "running"


# --- what is sent -------------------------------------------------------------------------------------------------


def test_what_came_of_an_earlier_state_is_not_built_upon(move_world: Make) -> None:
    """Sent, taken back while the destination is silent, written to, sent again by the same move."""
    world = move_world()
    instance, migration = begin(world)
    world.write_disk(world.a, instance.uuid, b"first")
    run(parts_of(world, instance, migration), RecordingJob())

    def silent(request: Mapping[str, Any]) -> Mapping[str, Any]:
        raise errors.PeerUnavailable(host=world.b)

    job = RecordingJob()
    undo(parts_of(world, instance, migration, silent), job)
    assert any("does so by itself" in reason for reason in job.reasons)
    world.driver(world.a).power_on(instance, RecordingJob())
    world.write_disk(world.a, instance.uuid, b"second")
    told = run(parts_of(world, instance, migration), RecordingJob())
    arrive(world, instance, migration, told)
    assert world.read_disk(world.b, instance.uuid).endswith(b"second")


def test_a_transport_is_chosen_while_the_guest_runs(move_world: Make) -> None:
    """Asking whether it works is no reason to keep a guest off; a worker that begins in the middle asks again."""
    world = move_world()
    instance, migration = begin(world)
    asked: list[str] = []

    def ask(request: Mapping[str, Any]) -> Mapping[str, Any]:
        asked.append(request["ask"])
        return peer(world, instance, migration)(request)

    parts = parts_of(world, instance, migration, ask)
    run(parts[:3], RecordingJob())
    asked.clear()
    run(parts[3:5], RecordingJob())
    assert {"probe", "facts"}.isdisjoint(asked)
    world.restart(world.a)
    run(parts_of(world, instance, migration, ask)[5:], RecordingJob())
    assert {"probe", "facts"} <= set(asked)
    assert world.driver(world.a)._source._chosen == {}


def test_a_copy_that_changed_at_the_destination_is_noticed(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    parts = parts_of(world, instance, migration)
    run(parts[:-1], RecordingJob())
    os.truncate(world.path(world.b, instance.uuid) / "disk", 4096)
    with pytest.raises(errors.MigrationFailed, match="4096 bytes instead of"):
        parts[-1].do(RecordingJob())


def test_an_image_that_is_gone_comes_from_the_source(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    (world.root / "images" / "tiny").unlink()
    world.write_disk(world.a, instance.uuid, b"written")
    job = RecordingJob()
    told = run(parts_of(world, instance, migration), job)
    assert any("goes to node2 too: image tiny is not in store" in reason for reason in job.reasons)
    arrive(world, instance, migration, told)
    name = base_name(instance.image)
    bases = [world.path(host, "_base") / name for host in (world.a, world.b)]
    assert bases[0].read_bytes() == bases[1].read_bytes()
    assert world.read_disk(world.b, instance.uuid).endswith(b"written")
    assert not [file for file in world.files(world.b, instance.uuid) if PREFIX in file]


def test_undone_after_bases_were_sent_nothing_is_left(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    (world.root / "images" / "tiny").unlink()
    parts = parts_of(world, instance, migration)
    run(parts[:5], RecordingJob())
    undo(parts[:5], RecordingJob(), 2)
    assert_nothing(world, world.b, instance.uuid)


@pytest.mark.parametrize("backend", ["qcow2", "raw"])
def test_a_config_drive_travels_as_it_is(move_world: Make, backend: str) -> None:
    world = move_world(images_type=backend, there={"images_type": "qcow2"})
    instance, migration = begin(world, config_drive=True, user_data="#!/bin/sh")
    drive = (world.path(world.a, instance.uuid) / "disk.config").read_bytes()
    told = run(parts_of(world, instance, migration), RecordingJob())
    there = arrive(world, instance, migration, told, root_gb=2)
    assert (world.path(world.b, instance.uuid) / "disk.config").read_bytes() == drive
    info = world.driver(world.b).get_instance_disk_info(there)
    assert [(d.format, d.label) for d in info.disks if d.name == "disk.config"] == [("raw", "config-2")]


@pytest.mark.parametrize(("backend", "there"), [("qcow2", "qcow2"), ("raw", "raw"), ("raw", "qcow2")])
def test_a_header_that_a_guest_wrote_is_never_read(move_world: Make, backend: str, there: str) -> None:
    """CVE-2016-2140, CVE-2026-24708: a qcow2 header over the root disk, then a resize. It stays the guest's data."""
    world = move_world(images_type=backend, there={"images_type": there})
    instance, migration = begin(world, {"migration_type": "resize"})
    secret = world.root / "secret"
    secret.write_bytes(SECRET.ljust(4096))
    name = str(secret).encode()
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 72, len(name), 16, 1 << 30, 0, 2, 0x20000, 0x10000, 1, 0, 0)
    header = (head + name).ljust(512, b"\0")
    world.write_disk(world.a, instance.uuid, header, at=0)
    told = run(parts_of(world, instance, migration), RecordingJob())
    arrived = arrive(world, instance, migration, told, root_gb=2)
    assert world.read_disk(world.b, instance.uuid, at=0) == header
    info = world.driver(world.b).get_instance_disk_info(arrived)
    assert {d.name: (d.format, d.virtual_size_bytes) for d in info.disks}["disk"] == (there, 2 << 30)
    defined = world.driver(world.b)._deeds.guest(instance.uuid).domain(inactive=True)
    assert {d.driver_type for d in defined.devices.disks if d.device == "disk"} == {there}
    disk = world.path(world.b, instance.uuid) / "disk"
    with open(disk, "rb") as file:
        assert SECRET not in file.read(1 << 20)


def test_a_migration_of_a_guest_that_was_never_made(move_world: Make) -> None:
    world = move_world()
    instance = world.new_instance(world.a)
    migration = migration_of(world, instance)
    parts = parts_of(world, instance, migration)
    assert [part.name for part in parts] == ["precopy", "power_off", "set_aside", "send_disk", "verify_copy"]
    with pytest.raises(errors.GuestFailed):
        parts[0].do(RecordingJob())
    for part in parts[2:]:
        with pytest.raises(errors.GuestFailed):
            part.do(RecordingJob())
    undo(parts, RecordingJob())
    run(world.driver(world.a).spawn(instance, SpawnRequest()), RecordingJob())
