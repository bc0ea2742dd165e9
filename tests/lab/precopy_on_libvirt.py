"""Disks of a guest that runs under a real libvirt, sent before it is shut down. Run inside a host of the lab."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.config import Compute, Settings, Transfer
from compute_worker.objects import DiskInfo, Instance, Migration
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.transfer.base import Shipment
from compute_worker.virt.libvirt.transfer.precopy import Precopy
from compute_worker.virt.libvirt.transfer.receiver import Receiver
from tests.lab.libvirt_world import LibvirtWorld
from tests.lab.settings import STATE_PATH
from tests.virt.jobs import RecordingJob, in_thread
from tests.waiting import wait_for

OPTIONS: dict[str, Any] = {
    "transport": "nbd", "nbd_plaintext": True, "tls_dir": "", "address": "127.0.0.1", "listen_address": "127.0.0.1",
    "window_mb": 4,
}  # fmt: skip


class Scene:
    """A guest that runs, and a directory beside it that takes the part of another host."""

    def __init__(self, world: LibvirtWorld, **options: Any) -> None:
        self.world = world
        self.driver, self.instance = world.spawned()
        self._fill()
        self.info: DiskInfo = self.driver.get_instance_disk_info(self.instance)
        self.here = InstancesDirectory(world.instances)
        self.there = InstancesDirectory(Path(STATE_PATH, "there"))
        self.there.prepare()
        for base in self.here.base.iterdir():
            shutil.copy(base, self.there.base)
        source = Settings(compute=Compute(state_path=STATE_PATH), transfer=Transfer(**{**OPTIONS, **options}))
        self.receiver = Receiver(source, self.there)
        self.precopy = Precopy(source, self.here, QemuImg(30, 2048))
        self.guest = Guest(world._host, self.instance.uuid)
        self.migration = Migration(
            uuid="4f5b8f01-93b6-4d55-8a0e-0c7e1b8c2a8a", instance=self.instance.uuid, source_host="node1",
            dest_host="localhost",
        )  # fmt: skip
        self.job = RecordingJob()

    def _fill(self) -> None:
        """Something worth sending, where the guest does not look."""
        self.world.memory(self.world.a, self.instance.uuid)
        self.driver.power_off(self.instance, RecordingJob())
        disk = self.world.instances / self.instance.uuid / "disk.eph0"
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 900M 64M", str(disk)], check=True, timeout=30)
        self.driver.power_on(self.instance, RecordingJob())

    def peer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        instance: Instance = self.instance
        return json.loads(json.dumps(self.receiver.answer(instance, self.migration, json.loads(json.dumps(request)))))

    def run(self) -> dict[str, Any]:
        return self.precopy.run(self.guest, self.migration, self.info, self.peer, self.job)

    def ticks(self) -> int:
        return self.world.memory(self.world.a, self.instance.uuid)[1]

    def ticks_on(self) -> None:
        before = self.ticks()
        wait_for(lambda: self.ticks() > before + 1, 20, "the guest to go on")

    def close(self) -> None:
        self.receiver.stop_all()
        shutil.rmtree(self.there.root)


@pytest.fixture
def scene() -> Iterator[Scene]:
    world = LibvirtWorld()
    made = Scene(world)
    yield made
    made.close()
    world.close()


def bitmaps(path: Path) -> list[str]:
    words = ["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", str(path)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=20).stdout)
    return [one["name"] for one in found["format-specific"]["data"].get("bitmaps", ())]


def test_a_guest_goes_on_while_its_disks_are_sent(scene: Scene) -> None:
    scene.ticks()
    told = scene.run()
    names = [disk.name for disk in scene.info.disks if disk.format == "qcow2"]
    assert list(told["disks"]) == names and len(names) > 1, told
    scene.ticks_on()
    assert scene.guest.backup_xml() is None and scene.guest.checkpoints() == [told["disks"]["disk"]]
    assert scene.driver.power_off(scene.instance, RecordingJob(), timeout=60, retry_interval=1)
    scene.guest.undefine()
    uuid = scene.instance.uuid
    scene.here.move(uuid, "", "_resize")
    aside = scene.here.path(uuid, "_resize")
    for disk in scene.info.disks:
        if disk.format == "qcow2":
            shipment = Shipment(uuid, scene.migration, disk.name, aside / disk.name, disk.format)
            assert scene.precopy.send_rest(shipment, disk, scene.peer, scene.job)[0], scene.job.reasons
            words = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2"]
            subprocess.run([*words, str(shipment.source), str(scene.there.path(uuid) / disk.name)], check=True)
    sent = {name: total or 0 for name, _, total in scene.job.reports}
    assert sent["precopy_disk.eph0"] >= 64 << 20
    assert sent["send_disk"] > 0 and sum(sent[f"send_{name}"] for name in names) < 8 << 20, sent
    scene.precopy.abandon(scene.guest, scene.info)
    for name in names:
        assert bitmaps(aside / name) == bitmaps(scene.there.path(uuid) / name) == []
    assert not (aside / "precopy.part").exists()


def test_abandoned_and_the_guest_is_as_it_was(scene: Scene) -> None:
    scene.ticks()
    for _ in range(2):
        assert (told := scene.run())["disks"], told
        scene.precopy.abandon(scene.guest, scene.info)
        assert scene.guest.checkpoints() == []
        assert not (scene.here.path(scene.instance.uuid) / "precopy.part").exists()
    scene.ticks_on()
    assert scene.driver.power_off(scene.instance, RecordingJob(), timeout=60, retry_interval=1)
    assert bitmaps(scene.here.path(scene.instance.uuid) / "disk") == []


def test_a_silent_destination_stops_us_and_not_the_guest(scene: Scene) -> None:
    scene.ticks()
    asked, answer = threading.Event(), threading.Event()

    def peer(request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request["ask"] == "overlay":
            asked.set()
            assert answer.wait(60)
        return scene.peer(request)

    thread, raised = in_thread(scene.precopy.run, scene.guest, scene.migration, scene.info, peer, scene.job)
    assert asked.wait(20) and scene.guest.backup_xml() is not None
    scene.ticks_on()
    scene.job.cancel()
    answer.set()
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)
    assert scene.guest.backup_xml() is None and scene.guest.checkpoints() == []
    scene.ticks_on()


def test_a_guest_whose_plug_is_pulled(scene: Scene) -> None:
    """Its bitmap was never written: nothing of it may be believed."""
    scene.ticks()
    assert (told := scene.run())["disks"], told
    scene.world.guest_dies(scene.world.a, scene.instance.uuid)
    wait_for(lambda: scene.world.power(scene.world.a, scene.instance.uuid) == "shutdown", 10, "the guest's end")
    disk = scene.info.disks[0]
    path = scene.here.path(scene.instance.uuid) / disk.name
    shipment = Shipment(scene.instance.uuid, scene.migration, disk.name, path, disk.format)
    there, reason = scene.precopy.send_rest(shipment, disk, scene.peer, scene.job)
    assert not there and reason
    scene.precopy.abandon(scene.guest, scene.info)
    assert bitmaps(path) == [] and scene.guest.checkpoints() == []
