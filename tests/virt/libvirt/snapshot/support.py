"""An instance with a real disk and a guest that does what the test says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from compute_worker.config import Compute, Images, Libvirt, Settings
from compute_worker.images.store import ORIGIN
from compute_worker.objects import Disk, DiskInfo, Flavor, ImageMeta, Instance
from compute_worker.virt.driver import Part, SnapshotRequest
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.snapshot_parts import Snapshots
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.snapshot.fakeguest import FakeGuest, qemu
from tests.virt.world import run, undo

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
MIB = 1 << 20
SIZE = 64 * MIB + 512
BASE = "5ba5e00000000000000000000000000000000000"


class _Deeds(Deeds):
    def guest(self, uuid: str) -> Any:
        return self.fake

    fake: FakeGuest


class Bench:
    """``fmt``: of the root disk; a qcow2 stands on a base."""

    def __init__(self, root: Path, fmt: str = "qcow2", **options: Any) -> None:
        self.settings = Settings(
            compute=Compute(host="node1", state_path=str(root)),
            images=Images(file_path=str(root / "images")),
            libvirt=Libvirt(**options),
        )
        (root / "images").mkdir(parents=True)
        self.images = root / "images"
        self.instance = Instance(
            uuid=UUID, name="test", host="node1", flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1),
            image=ImageMeta(id="base"),
        )  # fmt: skip
        self.deeds = _Deeds(self.settings, cast(Any, SimpleNamespace(name="node1")), DiskBuilder(self.settings))
        self.deeds.disks.prepare()
        self.directory = self.deeds.disks.directory.create(UUID)
        self.disk = self.directory / "disk"
        backing = self._make(fmt)
        self.deeds.disks.directory.write_disk_info(
            UUID,
            DiskInfo(disks=[Disk(name="disk", format=fmt, virtual_size_bytes=SIZE, backing=backing,
                                 backing_format="raw" if backing else None)]),
        )  # fmt: skip
        self.guest = self.deeds.fake = FakeGuest(UUID, self.disk, fmt)
        self.fmt = fmt
        self.job = RecordingJob()
        self.before = set(os.listdir(self.directory))

    def _make(self, fmt: str) -> str | None:
        base = self.deeds.disks.directory.base / BASE if fmt == "qcow2" else self.disk
        with open(base, "wb") as out:
            out.write(b"boot" * 1024)
            out.seek(10 * MIB)
            out.write(os.urandom(3 * MIB))
            out.truncate(20 * MIB if fmt == "qcow2" else SIZE)
        if fmt == "raw":
            return None
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"../_base/{BASE}", self.disk, SIZE]
        subprocess.run([str(word) for word in words], check=True, timeout=20)
        return BASE

    def request(self, number: int = 1, **changes: Any) -> SnapshotRequest:
        image_id = changes.pop("image_id", f"snap{number}")
        image = ImageMeta(
            id=image_id, disk_format=changes.pop("disk_format", "qcow2"), store=changes.pop("store", None),
            properties={ORIGIN: changes.pop("origin", f"operation{number}")},
        )  # fmt: skip
        return SnapshotRequest(image=image, **changes)

    def parts(self, number: int = 1, **changes: Any) -> list[Part]:
        """By a driver that knows nothing of before."""
        return Snapshots(self.deeds).parts(self.instance, self.request(number, **changes))

    def snap(self, number: int = 1, **changes: Any) -> Path:
        self.job = RecordingJob()
        told = run(self.parts(number, **changes), self.job)
        assert told["image"]["id"] == f"snap{number}"
        return self.images / f"snap{number}"

    def undo(self, done: int, number: int = 1, **changes: Any) -> None:
        undo(self.parts(number, **changes)[:done], RecordingJob(), 2)

    def flat(self, path: Path | None = None, fmt: str = "") -> bytes:
        """What a guest reads of a disk or an image, which is sound and stands alone where it is an image."""
        source = path or self.disk
        fmt = fmt or self.fmt
        if path is not None and fmt == "qcow2":
            qemu("qemu-img", "check", "-q", "-f", "qcow2", path)
            assert "backing" not in qemu("qemu-img", "info", "--output=json", "-f", "qcow2", path)
        target = self.images.parent / "flat"
        qemu("qemu-img", "convert", "-f", fmt, "-O", "raw", source, target)
        return target.read_bytes()

    def said(self, words: str) -> bool:
        return any(words in why for why in self.job.reasons)

    def assert_clean(self, *images: str, checkpoints: int = 0) -> None:
        """Nothing of a snapshot hangs on the guest, and the store has these images whole and nothing else."""
        guest = self.guest
        assert guest.backup is None and not guest.frozen and len(guest.marks) == checkpoints
        assert len(guest._bitmaps()) == checkpoints
        assert set(os.listdir(self.directory)) - self.before <= ({"snapshots.json"} if images else set())
        assert {name for name in os.listdir(self.images)} == {*images, *(f".{name}.json" for name in images)}
