"""What only real guests of the libvirt driver show. Run inside a host of the lab by ``test_libvirt_driver``."""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.objects import ImageMeta, InjectedFile, Vif
from compute_worker.virt.driver import SpawnRequest
from tests.lab import oracle
from tests.lab.libvirt_world import BOOT, LibvirtWorld
from tests.virt.jobs import RecordingJob
from tests.virt.world import run, undo
from tests.waiting import wait_for


@pytest.fixture
def world() -> Iterator[LibvirtWorld]:
    world = LibvirtWorld()
    yield world
    world.close()


def test_the_guest_sees_what_was_asked_for(world: LibvirtWorld) -> None:
    """Kernel and ramdisk, root, ephemeral and swap disks, config drive, interface, command line."""
    driver, instance = world.driver(world.a), world.new_instance(world.a, hostname="web-1", kernel_cmdline="quiet x=y")
    file = InjectedFile(path="/etc/motd", content_base64=base64.b64encode(b"hello").decode())
    driver.check_spawn(instance, SpawnRequest((file,), "s3cret"))
    run(driver.spawn(instance, SpawnRequest((file,), "s3cret")), RecordingJob())
    driver.unpause(instance)
    world.memory(world.a, instance.uuid)
    console = driver.get_console_output(instance, 1 << 20).decode(errors="replace")
    assert "LAB: cmdline root=/dev/vda console=ttyS0 quiet x=y" in console
    disks = oracle.seen_disks(console)
    assert (disks["vda"]["label"], disks["vda"]["size"]) == ("LABDATA", str(1 << 30))
    assert (disks["vdb"]["label"], disks["vdb"]["fs"]) == ("ephemeral0", "ext4")
    assert (disks["vdc"]["fs"], disks["vdc"]["size"]) == ("swap", str(16 << 20))
    assert oracle.seen_nics(console) == [instance.vifs[0].mac]
    drive = oracle.seen_config_drive(console)
    assert drive["uuid"] == instance.uuid and '"hostname": "web-1"' in drive["meta_data"]
    assert "openstack/content/0000 size=5" in console
    found = wait_for(lambda: (d := driver.get_diagnostics(instance)).memory_used_mb and d, 30, "the balloon's report")
    assert found and found.cpu_time_ns and 0 < found.memory_used_mb < 96
    assert [disk["name"] for disk in found.disks][:3] == ["vda", "vdb", "vdc"]
    assert driver.get_job_statistics(instance.uuid).type == "none"
    info = driver.get_instance_disk_info(instance)
    assert all(disk.allocated_bytes > 0 for disk in info.disks)


def test_a_guest_that_boots_from_its_disk_with_an_interface_that_leads_nowhere(world: LibvirtWorld) -> None:
    vif = Vif(id=str(uuid.uuid4()), mac="52:54:00:00:0a:01")
    driver, instance = world.spawned(image=ImageMeta(id=BOOT, disk_format="qcow2"), vifs=[vif])
    world.memory(world.a, instance.uuid)
    console = driver.get_console_output(instance, 1 << 20).decode(errors="replace")
    assert "disk=/dev/vda2" in console
    assert oracle.seen_nics(console) == [vif.mac]
    tap = Path("/sys/class/net", f"tap{vif.id[:11]}")
    assert tap.exists() and not (tap / "master").exists()
    assert driver.power_off(instance, RecordingJob(), timeout=60, retry_interval=1) is True
    assert not tap.exists()


def test_a_missing_bridge_is_named_and_nothing_is_left(world: LibvirtWorld) -> None:
    vif = Vif(id=str(uuid.uuid4()), mac="52:54:00:00:0a:02", bridge="nosuch0")
    driver, instance = world.driver(world.a), world.new_instance(world.a, vifs=[vif])
    parts = driver.spawn(instance, SpawnRequest())
    run(parts[:2], RecordingJob())
    with pytest.raises(errors.GuestFailed, match="wants bridge nosuch0, which does not exist on this host"):
        parts[2].do(RecordingJob())
    undo(parts[:3], RecordingJob())
    assert world.files(world.a, instance.uuid) == set()


def test_a_tap_name_that_is_taken_fails_with_libvirt_s_words(world: LibvirtWorld) -> None:
    assert "br0" in os.listdir("/sys/class/net")
    vif = Vif(id=str(uuid.uuid4()), mac="52:54:00:00:0a:03", bridge="br0", devname="br0")
    driver, instance = world.driver(world.a), world.new_instance(world.a, vifs=[vif])
    parts = driver.spawn(instance, SpawnRequest())
    run(parts[:4], RecordingJob())
    with pytest.raises(errors.GuestFailed, match="br0"):
        parts[4].do(RecordingJob())
    undo(parts, RecordingJob())
    assert world.files(world.a, instance.uuid) == set()


def test_a_disk_that_went_away_is_named(world: LibvirtWorld) -> None:
    driver, instance = world.spawned()
    driver.power_off(instance, RecordingJob())
    (world.instances / instance.uuid / "disk.swap").unlink()
    with pytest.raises(errors.GuestFailed, match=r"disk\.swap"):
        driver.power_on(instance, RecordingJob())
