"""Checks, preparation and cleaning of live migrations over libvirt's test driver, with real files and real qemu-img."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from compute_worker import errors, objects
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration
from compute_worker.virt.driver import Part
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.livemigration_checks import host_cpu_xml, pack, unpack
from tests.virt.contract import assert_nothing, booted
from tests.virt.contract_moves import active, migration_of
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.moveworld import MoveWorld
from tests.virt.world import moving, run, undo

Make = Callable[..., MoveWorld]
PARTS = ["make_directory", "fetch_images", "create_disks", "plug_vifs", "open_target"]


@pytest.fixture(autouse=True)
def _xml_of_the_test_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no migratable XML."""
    xml = Guest.xml
    monkeypatch.setattr(Guest, "xml", lambda self, **flags: xml(self, inactive=flags.get("inactive", False)))


def begin(world: MoveWorld, **changes: Any) -> tuple[Instance, Migration]:
    _, instance = booted(world, **changes)  # type: ignore[arg-type]
    migration = migration_of(world, instance, "live-migration")  # type: ignore[arg-type]
    return moving(active(instance), migration), migration


def checked(world: MoveWorld, instance: Instance, migration: Migration, over_commit: bool = False) -> MigrateData:
    source, dest = world.driver(world.a), world.driver(world.b)
    data = dest.check_can_live_migrate_destination(instance, migration, source.get_available_resource(), over_commit)
    return source.check_can_live_migrate_source(instance, migration, data)


def prepare(
    world: MoveWorld, instance: Instance, migration: Migration, data: MigrateData, **changes: Any
) -> list[Part]:
    info = world.driver(world.a).get_instance_disk_info(instance)
    return world.driver(world.b).pre_live_migration(
        instance, migration, data, msgspec.structs.replace(info, **changes)
    )


def prepared(world: MoveWorld, **changes: Any) -> tuple[Instance, Migration, MigrateData]:
    instance, migration = begin(world, **changes)
    told = run(prepare(world, instance, migration, checked(world, instance, migration)), RecordingJob())
    return instance, migration, objects.decode(told["migrate_data"], MigrateData, "test")


# --- checks -------------------------------------------------------------------------------------------------------


def test_what_the_checks_tell(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world, config_drive=True)
    data = checked(world, instance, migration)
    assert [disk.name for disk in data.disks] == ["disk", "disk.eph0", "disk.swap"]
    assert {base.name for base in data.bases} == {disk.backing for disk in data.disks}
    made_here = [base for base in data.bases if base.name.startswith(("ephemeral_", "swap_"))]
    assert len(made_here) == 2 and all(base.digest for base in made_here)
    assert data.files.keys() == {"disk.config"}
    assert data.block_migration and not data.shared_instance_path and not data.native_tls
    assert_nothing(world, world.b, instance.uuid)  # type: ignore[arg-type]
    assert not list(world.path(world.b, instance.uuid).parent.glob("probe-*"))


def test_one_directory_is_noticed(move_world: Make) -> None:
    world = move_world(shared=True)
    instance, migration = begin(world)
    before = world.files(world.a, instance.uuid)
    data = checked(world, instance, migration)
    assert data.shared_instance_path and not data.block_migration and data.disks == []
    parts = prepare(world, instance, migration, data)
    told = run(parts, RecordingJob(), 2)
    assert told["migrate_data"]["disks"] == []
    undo(parts, RecordingJob(), 2)
    world.driver(world.b).rollback_live_migration_at_destination(instance, migration, data)
    assert world.files(world.a, instance.uuid) == before
    assert not list(world.path(world.a, instance.uuid).parent.glob("probe-*"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hypervisor_type": "Xen"}, "hypervisor"),
        ({"machine_arch": "vax"}, "architecture"),
        ({"hypervisor_version": 1 << 40}, "is older than the source's"),
        ({"cpu_info": {"domain_type": "kvm"}}, "type of guests"),
    ],
)
def test_hosts_that_differ(move_world: Make, changes: dict[str, Any], problem: str) -> None:
    world = move_world()
    instance, migration = begin(world)
    other = dataclasses.replace(world.driver(world.a).get_available_resource(), **changes)
    with pytest.raises(errors.Unschedulable, match=problem) as raised:
        world.driver(world.b).check_can_live_migrate_destination(instance, migration, other, False)
    assert raised.value.reschedulable


@pytest.mark.parametrize("over_commit", [False, True])
def test_disks_must_fit(move_world: Make, over_commit: bool) -> None:
    """By what they may grow to, or by what they occupy now."""
    world = move_world()
    instance, migration = begin(world)
    source = world.driver(world.a)
    data = world.driver(world.b).check_can_live_migrate_destination(
        instance, migration, source.get_available_resource(), over_commit
    )
    tight = msgspec.structs.replace(data, disk_available_bytes=1 << 30)
    if over_commit:
        assert source.check_can_live_migrate_source(instance, migration, tight).disks
    else:
        with pytest.raises(errors.InsufficientResources, match="without disk_over_commit"):
            source.check_can_live_migrate_source(instance, migration, tight)


def test_processors_are_compared_as_libvirt_does() -> None:
    from compute_worker.virt.driver import HostResources

    source = HostResources(
        vcpus=1, memory_mb=1, disk_gb=1, disk_free_gb=1, hypervisor_type="QEMU", hypervisor_version=1,
        hypervisor_hostname="h", cpu_model="Skylake", machine_arch="x86_64",
        cpu_info={"vendor": "Intel", "topology": {"cores": 2}, "features": ["avx512<f>"]},
    )  # fmt: skip
    assert host_cpu_xml(source) == (
        '<cpu><arch>x86_64</arch><model>Skylake</model><vendor>Intel</vendor><topology cores="2" />'
        '<feature name="avx512&lt;f&gt;" /></cpu>'
    )


@pytest.mark.parametrize("size", [0, 5, 70_000])
def test_small_files_travel_in_the_message(tmp_path: Any, size: int) -> None:
    path = tmp_path / "disk.config"
    path.write_bytes(os.urandom(size))
    assert unpack(pack(path), size) == path.read_bytes()
    for wrong in (size + 1, max(0, size - 1)):
        if wrong != size:
            with pytest.raises(errors.InvalidCommand):
                unpack(pack(path), wrong)


@pytest.mark.parametrize("text", ["", "%%%", "AAAA"])
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidCommand):
        unpack(text, 10)


def test_a_file_too_large_for_a_message(tmp_path: Any) -> None:
    path = tmp_path / "disk.config"
    path.write_bytes(os.urandom(400_000))
    with pytest.raises(errors.NotSupported, match=r"disk\.config"):
        pack(path)


# --- preparation --------------------------------------------------------------------------------------------------


def test_disks_are_made_as_they_are_at_the_source(move_world: Make) -> None:
    world = move_world()
    instance, _, data = prepared(world, config_drive=True)
    here, there = world.path(world.a, instance.uuid), world.path(world.b, instance.uuid)
    for name in ("disk", "disk.eph0", "disk.swap"):
        said = [
            subprocess.check_output(["qemu-img", "info", "-U", "-f", "qcow2", path / name], text=True).splitlines()
            for path in (here, there)
        ]
        for what in ("virtual size", "backing file:"):
            lines = [[line for line in one if line.startswith(what)] for one in said]
            assert len(lines[0]) == 1
            assert [line.partition(" (actual")[0] for line in lines[0]] == [
                line.partition(" (actual")[0] for line in lines[1]
            ]
    assert (there / "disk.config").read_bytes() == (here / "disk.config").read_bytes()
    assert (there / "console.log").exists()
    assert data.instance_path == str(there) and data.base_path == str(there.parent / "_base")
    assert not data.files and not data.bases and not data.full_copy


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("done", range(len(PARTS) + 1))
def test_undone_nothing_is_left(move_world: Make, done: int, times: int) -> None:
    world = move_world()
    instance, migration = begin(world, config_drive=True)
    parts = prepare(world, instance, migration, checked(world, instance, migration))
    assert [part.name for part in parts] == PARTS
    run(parts[:done], RecordingJob(), times)
    undo(parts[: done + 1], RecordingJob(), times)
    assert_nothing(world, world.b, instance.uuid)  # type: ignore[arg-type]


def test_a_worker_that_died_makes_the_same(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    data = checked(world, instance, migration)
    run(prepare(world, instance, migration, data)[:2], RecordingJob())
    world.restart(world.b)
    parts = prepare(world, instance, migration, data)
    told = run(parts[1:], RecordingJob())
    assert [disk["name"] for disk in told["migrate_data"]["disks"]] == ["disk", "disk.eph0", "disk.swap"]


def test_a_directory_of_somebody_else_stays(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    data = checked(world, instance, migration)
    theirs = world.path(world.b, instance.uuid)
    theirs.mkdir()
    (theirs / "disk").write_text("precious")
    parts = prepare(world, instance, migration, data)
    with pytest.raises(errors.DestinationDiskExists):
        parts[0].do(RecordingJob())
    undo(parts, RecordingJob())
    world.driver(world.b).rollback_live_migration_at_destination(instance, migration, data)
    assert (theirs / "disk").read_text() == "precious"


def test_another_migration_s_directory_stays(move_world: Make) -> None:
    world = move_world()
    instance, migration, data = prepared(world)
    other = migration_of(world, instance, "live-migration")  # type: ignore[arg-type]
    with pytest.raises(errors.DestinationDiskExists):
        prepare(world, instance, other, data)[0].do(RecordingJob())
    world.driver(world.b).rollback_live_migration_at_destination(instance, other, data)
    assert world.files(world.b, instance.uuid)
    world.driver(world.b).rollback_live_migration_at_destination(instance, migration, data)
    assert_nothing(world, world.b, instance.uuid)  # type: ignore[arg-type]


def test_an_ephemeral_base_with_other_bytes_is_not_stood_upon(move_world: Make) -> None:
    """CVE-2013-7130: what lies at the destination under the base's name may be anybody's."""
    world = move_world()
    instance, migration = begin(world)
    data = checked(world, instance, migration)
    name = next(disk.backing for disk in data.disks if disk.name == "disk.eph0")
    run(prepare(world, instance, migration, data)[:2], RecordingJob())
    base = world.path(world.b, instance.uuid).parent / "_base" / str(name)
    with open(base, "r+b") as file:
        file.seek(300 << 20)
        file.write(b"of another tenant")
    job = RecordingJob()
    told = run(prepare(world, instance, migration, data), job)
    found = objects.decode(told["migrate_data"], MigrateData, "test")
    assert found.full_copy and [disk.backing for disk in found.disks] == [None, None, None]
    assert any("other bytes" in reason and "whole disks travel" in reason for reason in job.reasons)


def test_what_the_source_says_twice_must_be_the_same(move_world: Make) -> None:
    world = move_world()
    instance, migration = begin(world)
    data = checked(world, instance, migration)
    info = world.driver(world.a).get_instance_disk_info(instance)
    larger = [msgspec.structs.replace(disk, virtual_size_bytes=disk.virtual_size_bytes * 2) for disk in info.disks]
    more = [*info.disks, msgspec.structs.replace(info.disks[0], name="disk.eph7")]
    named = [msgspec.structs.replace(info.disks[0], name="instance.json")]
    for disks in (larger, more, named, []):
        parts = world.driver(world.b).pre_live_migration(instance, migration, data, DiskInfo(disks=disks))
        with pytest.raises((errors.MigrationFailed, errors.InvalidCommand)):
            run(parts[:3], RecordingJob())
        undo(parts, RecordingJob())
        assert_nothing(world, world.b, instance.uuid)  # type: ignore[arg-type]


def test_a_machine_type_that_is_not_known_here(move_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = move_world()
    instance, migration = begin(world)
    data = msgspec.structs.replace(checked(world, instance, migration), machine="pc-q35-99.0")
    facts = dataclasses.replace(world.driver(world.b)._host.facts(), machine_types=("pc-q35-7.2",))
    monkeypatch.setattr(world.driver(world.b)._host, "facts", lambda: facts)
    with pytest.raises(errors.Unschedulable, match=r"pc-q35-99\.0"):
        prepare(world, instance, migration, data)[0].do(RecordingJob())
    assert_nothing(world, world.b, instance.uuid)  # type: ignore[arg-type]


def test_a_processor_that_cannot_be_had_here(move_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    world = move_world()
    instance, migration = begin(world)
    data = msgspec.structs.replace(checked(world, instance, migration), cpu_xml="<cpu><model>x</model></cpu>")
    monkeypatch.setattr(world.driver(world.b)._host, "compare_guest_cpu", lambda xml, machine: (False, "no avx"))
    with pytest.raises(errors.Unschedulable, match="no avx"):
        prepare(world, instance, migration, data)[0].do(RecordingJob())


# --- afterwards ---------------------------------------------------------------------------------------------------


def arrive(world: MoveWorld, instance: Instance) -> None:
    """As libvirt leaves a guest that came: it runs, with a definition."""
    world.driver(world.b)._deeds.define(instance, RecordingJob())
    world.driver(world.b)._deeds.guest(instance.uuid).launch()


@pytest.mark.parametrize("times", [1, 2])
def test_a_guest_that_came_is_ours(move_world: Make, times: int) -> None:
    world = move_world()
    instance, migration, _ = prepared(world)
    arrive(world, instance)
    dest = world.driver(world.b)
    there = msgspec.structs.replace(instance, host=world.b)
    for _ in range(times):
        dest.post_live_migration_at_destination(there, migration)
    assert dest.get_info(instance.uuid).owner == world.b
    left = {name.rpartition("/")[2] for name in world.files(world.b, instance.uuid)}
    assert not {name for name in left if name.endswith(".part") or name == "migration.json"}
    with pytest.raises(errors.InvalidState):
        dest.rollback_live_migration_at_destination(instance, migration, None)
    assert world.power(world.b, instance.uuid) == "running"


def test_the_disks_of_a_guest_that_came_are_not_put_back(move_world: Make) -> None:
    """Whoever undoes what was prepared: the guest runs on it."""
    world = move_world()
    instance, migration, data = prepared(world)
    arrive(world, instance)
    before = world.files(world.b, instance.uuid)
    with pytest.raises(errors.HypervisorBusy, match="runs here"):
        undo(prepare(world, instance, migration, data)[:1], RecordingJob())
    assert world.files(world.b, instance.uuid) == before


def test_a_guest_that_did_not_come(move_world: Make) -> None:
    world = move_world()
    instance, migration, _ = prepared(world)
    with pytest.raises(errors.GuestFailed, match="no such guest"):
        world.driver(world.b).post_live_migration_at_destination(instance, migration)


def test_the_source_lets_go(move_world: Make) -> None:
    world = move_world()
    instance, migration, data = prepared(world)
    source = world.driver(world.a)
    with pytest.raises(errors.InvalidState):
        source.post_live_migration(instance, migration, data)
    source.power_off(instance, RecordingJob())
    for _ in range(2):
        source.post_live_migration(instance, migration, data)
    assert_nothing(world, world.a, instance.uuid)  # type: ignore[arg-type]


@pytest.mark.parametrize("told", [True, False])
def test_a_directory_that_both_see_is_never_removed(move_world: Make, told: bool) -> None:
    """Also where the word that it is shared was lost, but the destination has taken it over."""
    world = move_world(shared=True)
    instance, migration = begin(world)
    data = checked(world, instance, migration)
    source = world.driver(world.a)
    source.power_off(instance, RecordingJob())
    world.driver(world.b).save_record(msgspec.structs.replace(instance, host=world.b))
    source.post_live_migration(instance, migration, data if told else MigrateData(migration=migration.uuid))
    assert f"{instance.uuid}/disk" in world.files(world.b, instance.uuid)
    assert world.power(world.a, instance.uuid) == "nostate"
