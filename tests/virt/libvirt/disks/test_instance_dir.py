from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import Disk, DiskInfo, ImageMeta
from compute_worker.virt.libvirt.disks.instance_dir import DELETED, RESIZE, Arrival, ImageUse, InstancesDirectory
from tests.virt.libvirt.disks.support import OTHER, UUID, instance

INFO = DiskInfo(disks=[Disk(name="disk", format="qcow2", virtual_size_bytes=1 << 30, backing="b1")], image="img")


@pytest.fixture
def here(tmp_path: Path) -> InstancesDirectory:
    made = InstancesDirectory(tmp_path / "state" / "instances")
    made.prepare()
    made.prepare()
    return made


def test_others_may_walk_through_but_not_list(here: InstancesDirectory) -> None:
    here.create(UUID)
    for path in (here.root, here.base, here.path(UUID)):
        assert path.stat().st_mode & 0o777 == 0o711
    assert here.locks.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "uuid", ["", "..", "../x", UUID.upper(), UUID + "_resize", UUID + "/..", UUID + "\n", "x" + UUID[1:], "_base"]
)
def test_only_uuids_reach_a_path(here: InstancesDirectory, uuid: str) -> None:
    for call in (here.path, here.create, here.remove, here.read_disk_info, here.remove_parts):
        with pytest.raises(errors.InvalidCommand):
            call(uuid)


@given(st.text(max_size=60))
def test_no_text_leaves_the_directory(text: str) -> None:
    with pytest.raises(errors.InvalidCommand):
        InstancesDirectory("/nowhere").path(text)


def test_records_come_back(here: InstancesDirectory) -> None:
    guest = instance(ImageMeta(id="img"), host="h1", generation=3)
    here.write_record(guest)
    assert here.list_records() == []
    assert here.read_disk_info(UUID) is None
    here.create(UUID)
    here.write_record(guest)
    here.write_disk_info(UUID, INFO)
    assert here.read_disk_info(UUID) == INFO
    assert here.list_records() == [guest]
    assert (here.path(UUID) / "instance.json").stat().st_mode & 0o777 == 0o600


def test_a_record_follows_the_directory_set_aside(here: InstancesDirectory) -> None:
    guest = instance(ImageMeta(id="img"))
    here.create(UUID)
    here.write_record(guest)
    here.move(UUID, "", RESIZE)
    here.move(UUID, "", RESIZE)
    assert here.list_records() == [guest]
    here.create(UUID)
    with pytest.raises(errors.DestinationDiskExists):
        here.move(UUID, RESIZE, "")


def test_an_unreadable_record_is_broken_and_stops_cleaning(here: InstancesDirectory) -> None:
    here.create(UUID)
    (here.path(UUID) / "disk.info").write_text('{"disks": [{"name": "../x"')
    (here.path(UUID) / "instance.json").write_text("")
    with pytest.raises(errors.Broken, match="not readable"):
        here.read_disk_info(UUID)
    with pytest.raises(errors.Broken):
        here.used_bases()
    assert here.list_records() == []


def test_names_in_a_record_are_checked_when_read(here: InstancesDirectory) -> None:
    here.create(UUID)
    (here.path(UUID) / "disk.info").write_text(
        '{"disks": [{"name": "../../etc/shadow", "format": "raw", "virtual_size_bytes": 1}]}'
    )
    with pytest.raises(errors.Broken, match="not readable"):
        here.read_disk_info(UUID)


def test_used_bases_of_running_and_set_aside_but_not_of_removed(here: InstancesDirectory) -> None:
    for suffix in ("", RESIZE, DELETED):
        here.path(UUID, suffix).mkdir()
        used = DiskInfo(disks=[Disk(name="disk", format="qcow2", virtual_size_bytes=1, backing=f"base{suffix}")])
        here.write_disk_info(UUID, used, suffix)
    here.create(OTHER)
    here.write_use(OTHER, ImageUse(bases=["wanted"]))
    assert here.used_bases() == {"base", "base_resize", "wanted"}


def test_remove_is_complete_and_repeatable(here: InstancesDirectory) -> None:
    (here.create(UUID) / "disk").write_bytes(b"x")
    here.path(UUID, DELETED).mkdir()
    (here.path(UUID, DELETED) / "old").write_bytes(b"x")
    here.remove(UUID)
    here.remove(UUID)
    assert sorted(os.listdir(here.root)) == ["_base", "locks"]


def test_remove_of_one_suffix_leaves_the_other(here: InstancesDirectory) -> None:
    here.create(UUID)
    here.path(UUID, RESIZE).mkdir()
    here.remove(UUID, RESIZE)
    assert here.path(UUID).is_dir()
    assert not here.path(UUID, RESIZE).exists()


def test_remove_follows_no_link(here: InstancesDirectory, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    (here.create(UUID) / "link").symlink_to(outside)
    here.remove(UUID)
    here.path(UUID).symlink_to(outside)
    here.remove(UUID)
    here.path(UUID, DELETED).symlink_to(outside)
    here.remove(UUID)
    assert (outside / "precious").exists()
    assert sorted(os.listdir(here.root)) == ["_base", "locks"]


def test_a_linked_instance_directory_is_not_written_into(here: InstancesDirectory, tmp_path: Path) -> None:
    here.path(UUID).symlink_to(tmp_path)
    with pytest.raises(errors.Broken, match="symbolic link"):
        here.create(UUID)


def test_leftovers_are_listed_by_kind(here: InstancesDirectory) -> None:
    (here.create(UUID) / "disk.part").touch()
    here.path(UUID, RESIZE).mkdir()
    here.path(OTHER, DELETED).mkdir()
    (here.root / "not-ours").mkdir()
    assert [(item.uuid, item.kind) for item in here.list_leftovers()] == [
        (UUID, "directory"),
        (UUID, "part"),
        (UUID, "resize"),
        (OTHER, "del"),
    ]
    here.remove_parts(UUID)
    assert "part" not in {item.kind for item in here.list_leftovers()}


def test_measured_sees_what_is_allocated(here: InstancesDirectory) -> None:
    here.create(UUID)
    (here.path(UUID) / "disk").write_bytes(b"x" * 100_000)
    assert here.measured(UUID, INFO).disks[0].allocated_bytes >= 100_000
    assert here.measured(OTHER, INFO).disks[0].allocated_bytes == 0


def test_a_group_may_walk_through_and_nobody_else(tmp_path: Path) -> None:
    import grp

    group = grp.getgrgid(os.getgid())
    made = InstancesDirectory(tmp_path / "instances", group.gr_name)
    made.prepare()
    made.create(UUID)
    assert made.path(UUID).stat().st_mode & 0o777 == 0o710
    assert made.path(UUID).stat().st_gid == group.gr_gid


def test_what_came_by_a_migration_is_its_own(here: InstancesDirectory) -> None:
    here.create(UUID)
    assert here.arrival(UUID) is None
    arrival = Arrival(OTHER, attempt=2, machine="pc", bases={"swap_16": "0" * 64})
    here.write_arrival(UUID, arrival)
    assert here.arrival(UUID, OTHER) == here.arrival(UUID) == arrival
    assert here.arrival(UUID, UUID) is None
    here.move(UUID, "", RESIZE)
    assert here.arrival(UUID, OTHER) is None
    assert here.arrival(UUID, OTHER, RESIZE) == arrival


def test_only_a_directory_that_names_nothing_but_images_is_forgotten(here: InstancesDirectory) -> None:
    here.forget_use(UUID)
    path = here.create(UUID)
    here.forget_use(UUID)
    assert path.is_dir(), "somebody has just made it"
    here.write_use(UUID, ImageUse(bases=["swap_16"]))
    (path / "disk").touch()
    here.forget_use(UUID)
    assert (path / "disk").exists()
    (path / "disk").unlink()
    here.forget_use(UUID)
    assert not path.exists()
