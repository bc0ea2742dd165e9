"""Images of guests that run under a real libvirt. Run inside a host of the lab."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.config import Compute, Images, Libvirt, Settings
from compute_worker.images.store import ORIGIN
from compute_worker.objects import ImageMeta, Instance
from compute_worker.virt.driver import ComputeDriver, Part, SnapshotRequest
from compute_worker.virt.libvirt.guest import Guest
from tests.lab.libvirt_world import LibvirtWorld
from tests.lab.settings import IMAGES_PATH, STATE_PATH
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.world import undo
from tests.waiting import wait_for

MIB = 1 << 20
GIB = 1 << 30


class SnapshotWorld(LibvirtWorld):
    """``backend``: raw or qcow2 disks."""

    def __init__(self, backend: str = "qcow2") -> None:
        super().__init__()
        self.backend = backend

    def settings(self, host: str) -> Settings:
        return Settings(
            compute=Compute(host=host, state_path=STATE_PATH),
            images=Images(file_path=IMAGES_PATH, remove_unused_base_images_after=0),
            libvirt=Libvirt(mem_stats_period=1, images_type=self.backend, snapshot_freeze_timeout=5.0),
        )


class Scene:
    """A guest that ticks and writes its counter to its disk."""

    def __init__(self, backend: str = "qcow2", **changes: Any) -> None:
        self.world = SnapshotWorld(backend)
        self.driver: ComputeDriver
        self.driver, self.instance = self.world.spawned(**changes)
        self.guest = Guest(self.world._host, self.uuid)
        self.made: list[str] = []
        self.job = RecordingJob()
        self.told: dict[str, Any] = {}

    @property
    def uuid(self) -> str:
        return self.instance.uuid

    @property
    def directory(self) -> Path:
        return self.world.instances / self.uuid

    def ticks(self) -> int:
        return self.world.memory(self.world.a, self.uuid)[1]

    def ticks_on(self) -> None:
        before = self.ticks()
        wait_for(lambda: self.ticks() > before + 1, 30, "the guest to go on")

    def wait_agent(self) -> None:
        def answers() -> bool:
            with self.guest.domain_for("looking") as dom:
                return "state='connected'" in dom.XMLDesc(0)

        wait_for(answers, 60, "the guest's agent")

    def request(self, number: int, **changes: Any) -> SnapshotRequest:
        image_id = f"snap{number}-{self.uuid}"
        if image_id not in self.made:
            self.made.append(image_id)
        image = ImageMeta(
            id=image_id, disk_format=changes.pop("disk_format", "qcow2"), properties={ORIGIN: image_id},
        )  # fmt: skip
        return SnapshotRequest(image=image, **changes)

    def parts(self, number: int = 1, **changes: Any) -> list[Part]:
        return self.driver.snapshot(self.instance, self.request(number, **changes))

    def snap(self, number: int = 1, **changes: Any) -> Path:
        """Made to its end; its file. ``told``: what each part told."""
        self.job = RecordingJob()
        for part in self.parts(number, **changes):
            self.told[part.name] = part.do(self.job)
        return Path(IMAGES_PATH, self.made[-1])

    def assert_idle(self, checkpoints: int = 0) -> None:
        """Nothing of a snapshot hangs on the guest; it is defined."""
        assert self.guest.is_persistent() and self.guest.backup_xml() is None
        assert len(self.guest.checkpoints()) == checkpoints
        assert not (self.directory / "snapshot.part").exists()
        assert not [name for name in os.listdir(IMAGES_PATH) if name.endswith(".part")]

    def assert_said(self, *words: str) -> None:
        assert any(all(word in why for word in words) for why in self.job.reasons), self.job.reasons

    def assert_thawed(self) -> None:
        assert self.guest.fs_thaw() == 0

    def close(self) -> None:
        for name in self.made:
            for file in (name, f".{name}.json", f".{name}.part"):
                Path(IMAGES_PATH, file).unlink(missing_ok=True)
        self.world.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def run(*words: object, status: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in status, done.stdout + done.stderr
    return done.stdout


def flat(image: Path, fmt: str, target: Path) -> Path:
    """The disk in an image, which is sound and stands alone."""
    if fmt == "qcow2":
        run("qemu-img", "check", "-q", "-f", "qcow2", image)
        assert "backing" not in run("qemu-img", "info", "--output=json", "-f", "qcow2", image)
    run("qemu-img", "convert", "-f", fmt, "-O", "raw", image, target)
    return target


def counter(disk: Path, *, clean: bool) -> int:
    """The guest's counter; ``clean``: the file system needs no replay of its journal."""
    state = run("dumpe2fs", "-h", disk)
    assert ("needs_recovery" not in state) is clean or not clean, state
    if not clean:
        run("e2fsck", "-p", "-E", "journal_only", disk, status=(0, 1))
    run("e2fsck", "-fn", disk)
    return int(run("debugfs", "-R", "cat counter", disk) or 0)


def test_a_guest_that_writes_goes_on_and_the_second_image_reads_little(scene: Scene, tmp_path: Path) -> None:
    scene.ticks()
    scene.wait_agent()
    dom = scene.guest.id()
    image = scene.snap(1)
    after = scene.ticks()
    scene.assert_said("backup: the guest is running", "1 file systems were held still")
    assert scene.guest.id() == dom and scene.world.power(scene.world.a, scene.uuid) == "running"
    scene.assert_idle(checkpoints=1)
    scene.assert_thawed()
    assert 0 < counter(flat(image, "qcow2", tmp_path / "one"), clean=True) <= after
    first = scene.told["upload"]["read_bytes"]
    scene.ticks_on()
    second = scene.snap(2)
    after = scene.ticks()
    scene.assert_said("only what was written since")
    assert scene.told["upload"]["read_bytes"] < min(first / 2, 4 * MIB), (first, scene.told)
    found = counter(flat(second, "qcow2", tmp_path / "two"), clean=True)
    assert counter(tmp_path / "one", clean=True) < found <= after
    scene.assert_idle(checkpoints=1)
    # The same point in time whichever way it is read: what the guest wrote before the first image is in the second.
    scene.driver.power_off(scene.instance, RecordingJob())
    full = scene.snap(3)
    run("qemu-img", "check", "-q", "-f", "qcow2", full)
    assert scene.told["upload"]["method"] == "cold"
    scene.driver.power_on(scene.instance, RecordingJob())
    scene.ticks_on()


def test_increments_over_guests_that_were_off(scene: Scene) -> None:
    """A bitmap outlives a shutdown; one that was not written when its qemu died is not believed."""
    scene.ticks()
    scene.snap(1)
    assert scene.driver.power_off(scene.instance, RecordingJob(), timeout=60, retry_interval=1)
    scene.driver.power_on(scene.instance, RecordingJob())
    scene.ticks()
    scene.snap(2)
    scene.assert_said("only what was written since")
    scene.world.guest_dies(scene.world.a, scene.uuid)
    wait_for(lambda: scene.world.power(scene.world.a, scene.uuid) == "shutdown", 30, "the guest's end")
    scene.driver.power_on(scene.instance, RecordingJob())
    scene.ticks()
    third = scene.snap(3)
    scene.assert_said("cannot say what was written since")
    run("qemu-img", "check", "-q", "-f", "qcow2", third)
    scene.assert_idle(checkpoints=1)


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_guest_that_is_off_comes_out_byte_by_byte(scene: Scene, disk_format: str) -> None:
    scene.ticks()
    scene.driver.power_off(scene.instance, RecordingJob(), timeout=60, retry_interval=1)
    image = scene.snap(1, disk_format=disk_format)
    said = run("qemu-img", "compare", "-f", "qcow2", "-F", disk_format, scene.directory / "disk", image)
    assert "identical" in said
    assert image.stat().st_blocks * 512 < 200 * MIB
    scene.assert_idle()
    assert scene.world.power(scene.world.a, scene.uuid) == "shutdown"


def test_a_paused_guest_stays_paused(scene: Scene, tmp_path: Path) -> None:
    scene.ticks()
    scene.driver.pause(scene.instance)
    image = scene.snap(1)
    assert scene.told["upload"]["method"] == "backup"
    assert scene.world.power(scene.world.a, scene.uuid) == "paused"
    assert counter(flat(image, "qcow2", tmp_path / "one"), clean=False) > 0
    scene.driver.unpause(scene.instance)
    scene.ticks_on()


def test_not_live_the_guest_goes_on_from_its_memory(scene: Scene, tmp_path: Path) -> None:
    token, _ = scene.world.memory(scene.world.a, scene.uuid)
    image = scene.snap(1, live=False)
    assert scene.told["upload"]["method"] == "saved"
    assert scene.world.memory(scene.world.a, scene.uuid)[0] == token
    scene.ticks_on()
    assert counter(flat(image, "qcow2", tmp_path / "one"), clean=False) <= scene.ticks()
    scene.assert_idle()


def test_a_guest_without_an_agent(tmp_path: Path) -> None:
    scene = Scene(kernel_cmdline="quiet lab.noga")
    try:
        scene.ticks()
        image = scene.snap(1)
        scene.assert_said("as after a power failure")
        assert 0 < counter(flat(image, "qcow2", tmp_path / "one"), clean=False) <= scene.ticks()
        scene.assert_idle(checkpoints=1)
    finally:
        scene.close()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed(scene: Scene, tmp_path: Path, compression: str) -> None:
    scene.ticks()
    scene.wait_agent()
    image = scene.snap(1, compression=compression)
    said = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", image))
    assert said["format-specific"]["data"]["compression-type"] == compression
    assert 0 < counter(flat(image, "qcow2", tmp_path / "one"), clean=True) <= scene.ticks()
    scene.assert_idle(checkpoints=1)


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_raw_disks_and_a_header_that_the_guest_wrote(tmp_path: Path, disk_format: str) -> None:
    """CVE-2015-7548: the guest makes its raw disk look like a qcow2 over a file of the host. Nobody follows it."""
    scene = Scene("raw")
    secret = tmp_path / "secret"
    try:
        scene.ticks()
        live = scene.snap(1)
        scene.assert_said("backup")
        counter(flat(live, "qcow2", tmp_path / "live"), clean=False)
        scene.assert_idle()
        scene.driver.power_off(scene.instance, RecordingJob(), timeout=60, retry_interval=1)
        secret.write_bytes(b"the host's secret" * 8192)
        evil = tmp_path / "evil"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, evil, "1G")
        with open(scene.directory / "disk", "r+b") as disk:
            disk.write(evil.read_bytes())
        image = scene.snap(2, disk_format=disk_format)
        run("qemu-img", "convert", "-f", disk_format, "-O", "raw", image, tmp_path / "flat")
        words = ["qemu-img", "compare", "-f", "raw", "-F", "raw", scene.directory / "disk", tmp_path / "flat"]
        assert "identical" in run(*words)
        for path in (image, tmp_path / "flat"):
            assert b"the host's secret" not in path.read_bytes()
    finally:
        scene.close()


def test_a_worker_that_died_after_the_freeze_goes_on_with_it(scene: Scene, tmp_path: Path) -> None:
    scene.ticks()
    for part in scene.parts(1)[:2]:
        part.do(scene.job)
    assert scene.guest.backup_xml() is not None
    frozen_at = scene.ticks()
    scene.ticks_on()
    scene.driver = scene.world.restart(scene.world.a)
    image = scene.snap(1)
    assert 0 < counter(flat(image, "qcow2", tmp_path / "one"), clean=False) <= frozen_at + 1
    scene.assert_idle(checkpoints=1)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_undone_by_a_successor(scene: Scene, done: int) -> None:
    scene.ticks()
    scene.wait_agent()
    for part in scene.parts(1)[:done]:
        part.do(scene.job)
    scene.driver = scene.world.restart(scene.world.a)
    undo(scene.parts(1)[:done], RecordingJob(), 2)
    scene.assert_idle()
    scene.assert_thawed()
    assert not [name for name in os.listdir(IMAGES_PATH) if scene.made[-1] in name]
    scene.ticks_on()


def test_a_successor_thaws_what_was_frozen(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the freeze and the point in time."""
    scene.ticks()
    scene.wait_agent()
    create, freeze = scene.parts(1)[:2]
    create.do(scene.job)

    def dies(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as broken:
        broken.setattr(Guest, "backup_begin", dies)
        broken.setattr(Guest, "fs_thaw", dies)
        with pytest.raises(SystemExit):
            freeze.do(scene.job)
    scene.driver = scene.world.restart(scene.world.a)
    undo(scene.parts(1)[:2], RecordingJob())
    scene.assert_thawed()
    scene.assert_idle()
    scene.ticks_on()


def test_cancelled_while_it_is_read(scene: Scene) -> None:
    scene.ticks()
    parts = scene.parts(1)
    for part in parts[:2]:
        part.do(scene.job)
    reached = threading.Event()
    report = scene.job.report

    def see(phase: str, *words: Any, **detail: Any) -> None:
        report(phase, *words, **detail)
        if phase == "upload" and words and words[0]:
            reached.set()
            scene.job.cancel()

    scene.job.report = see  # type: ignore[method-assign]
    thread, raised = in_thread(parts[2].do, scene.job)
    assert reached.wait(30)
    thread.join(20)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled), raised
    undo(parts[:3], RecordingJob())
    scene.assert_idle()
    scene.ticks_on()


def test_a_guest_that_dies_while_it_is_read(scene: Scene) -> None:
    scene.ticks()
    parts = scene.parts(1)
    for part in parts[:2]:
        part.do(scene.job)
    scene.world.guest_dies(scene.world.a, scene.uuid)
    wait_for(lambda: scene.world.power(scene.world.a, scene.uuid) == "shutdown", 30, "the guest's end")
    told = parts[2].do(scene.job)
    assert told is not None and told["method"] == "cold"
    parts[3].do(scene.job)
    run("qemu-img", "check", "-q", "-f", "qcow2", Path(IMAGES_PATH, scene.made[-1]))
    scene.assert_idle()


def test_delete_with_a_checkpoint(scene: Scene) -> None:
    scene.ticks()
    scene.snap(1)
    assert len(scene.guest.checkpoints()) == 1
    for part in scene.driver.destroy(scene.instance):
        part.do(RecordingJob())
    assert scene.world.power(scene.world.a, scene.uuid) == "nostate" and not scene.directory.exists()


def test_an_image_that_changed_is_not_built_on(scene: Scene) -> None:
    scene.ticks()
    image = scene.snap(1)
    shutil.copy(image, image.with_name("other"))
    os.replace(image.with_name("other"), image)
    scene.snap(2)
    scene.assert_said("not in this store any more as it was")


def test_a_guest_boots_from_what_was_snapshotted(scene: Scene) -> None:
    ticks = scene.ticks()
    scene.wait_agent()
    image = scene.snap(1)
    header = struct.unpack(">I", image.read_bytes()[:4])[0]
    assert header == 0x514649FB
    meta = ImageMeta(
        id=image.name, disk_format="qcow2", kernel_id=scene.instance.image.kernel_id,
        ramdisk_id=scene.instance.image.ramdisk_id, os_type="linux",
    )  # fmt: skip
    other: Instance
    _, other = scene.world.spawned(image=meta)
    scene.world.memory(scene.world.a, other.uuid)
    console = scene.world.console(scene.world.a, other.uuid)
    assert re.search(r"LAB: BOOT OK boots=2", console), console[-2000:]
    assert scene.world.memory(scene.world.a, other.uuid)[1] > ticks - 5
