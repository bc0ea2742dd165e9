"""SIGKILL at every step of making and removing disks, and at random moments; then again, or back."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from compute_worker.objects import Disk, DiskInfo, ImageMeta, InjectedFile
from compute_worker.virt.driver import NullJob, SpawnRequest
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.cache import base_name
from tests.images.support import qcow2, qemu_img
from tests.virt.libvirt.disks.support import UUID, builder, instance, tree

IMAGE = ImageMeta(id="cow", disk_format="qcow2", kernel_id="vmlinuz")
REQUEST = SpawnRequest(injected_files=[InjectedFile(path="/etc/motd", content_base64="aGk=")])
GUEST = instance(IMAGE, {"root_gb": 1, "ephemeral_gb": 1, "swap_mb": 8})
BASES = {base_name(IMAGE), base_name(ImageMeta(id="vmlinuz", disk_format="aki")), "ephemeral_1_ext4", "swap_8"}
FILES = {"disk", "disk.local", "disk.swap", "disk.config", "kernel", "disk.info", "images.json"}
STEPS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.chmod", "os.rmdir", "os.utime",
                   "subprocess.Popen", "fcntl.flock"})  # fmt: skip

pytestmark = pytest.mark.early


def make(host: DiskBuilder) -> None:
    host.prepare_images(GUEST, NullJob())
    host.create_disks(GUEST, REQUEST, NullJob())


def undo(host: DiskBuilder) -> None:
    host.remove(UUID)
    host.undo_prepare_images(GUEST)


def in_child(work: Callable[[], None], kill_at: int = 0, kill_after: float = 0) -> bool:
    """Run `work` in a process of its own, killed before its `kill_at`-th step or after `kill_after` seconds; whether
    it came to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            steps = 0

            def see(event: str, args: tuple[Any, ...]) -> None:
                nonlocal steps
                if event not in STEPS:
                    return
                reading = event == "open" and isinstance(args[2], int) and not args[2] & (os.O_WRONLY | os.O_RDWR)
                steps += not reading
                if kill_at and steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(see)
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    if kill_after:
        time.sleep(kill_after)  # the moment of death itself
        os.kill(child, signal.SIGKILL)
    _, result = os.waitpid(child, 0)
    assert os.WIFSIGNALED(result) or os.WEXITSTATUS(result) == 0
    return not os.WIFSIGNALED(result)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """In memory where possible: killing processes does not lose what was written, so fsync need not cost time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


@pytest.fixture
def host(root: Path) -> Callable[[str], DiskBuilder]:
    images = root / "images"
    images.mkdir()
    qcow2(images / "cow", 1, b"root disk content")
    (images / "vmlinuz").write_bytes(b"kernel " * 1000)

    def made(name: str) -> DiskBuilder:
        (root / name).mkdir()
        return builder(root / name, images={"file_path": str(images)})

    return made


def facts(info: DiskInfo | None) -> list[Disk]:
    assert info is not None
    return [msgspec.structs.replace(disk, allocated_bytes=0) for disk in info.disks]


def check_whole(host: DiskBuilder, expected: list[Disk]) -> None:
    directory = host.directory.path(UUID)
    assert tree(host.directory.root) == {UUID, *(f"{UUID}/{name}" for name in FILES), *(f"_base/{x}" for x in BASES)}
    assert facts(host.disk_info(UUID)) == expected
    assert (directory / "kernel").read_bytes() == b"kernel " * 1000
    assert (host.directory.base / base_name(IMAGE)).read_bytes() == b"root disk content".ljust(1 << 20, b"\0")
    assert (directory / "disk.config").read_bytes()[32_768 + 40 :].startswith(b"config-2")
    for name in ("disk", "disk.local", "disk.swap"):
        assert (directory / name).read_bytes()[:4] == b"QFI\xfb"
    with open(host.directory.base / "ephemeral_1_ext4", "rb") as made:
        made.seek(1024 + 56)
        assert made.read(2) == b"\x53\xef"


def check_clean(host: DiskBuilder) -> None:
    assert tree(host.directory.root) <= {f"_base/{name}" for name in BASES}


def expected_disks(host: Callable[[str], DiskBuilder]) -> list[Disk]:
    reference = host("reference")
    make(reference)
    return facts(reference.disk_info(UUID))


def test_death_at_every_step_then_again(host: Callable[[str], DiskBuilder]) -> None:
    """Over a hundred deaths, each with a whole recovery of 0.2 s: this takes as long as it takes."""
    expected, step, ended = expected_disks(host), 0, False
    while not ended:
        step += 1
        here = host(f"s{step}")
        ended = in_child(lambda here=here: make(here), kill_at=step)  # type: ignore[misc]
        make(here)
        check_whole(here, expected)
        shutil.rmtree(here.directory.root.parent)
    assert step > 40


def test_death_at_every_step_then_back(host: Callable[[str], DiskBuilder]) -> None:
    step, ended = 0, False
    while not ended:
        step += 1
        here = host(f"s{step}")
        ended = in_child(lambda here=here: make(here), kill_at=step)  # type: ignore[misc]
        undo(here)
        check_clean(here)
        shutil.rmtree(here.directory.root.parent)
    assert step > 40


def test_death_at_every_step_of_going_back(host: Callable[[str], DiskBuilder]) -> None:
    here, step, ended = host("s"), 0, False
    while not ended:
        step += 1
        make(here)
        ended = in_child(lambda: undo(here), kill_at=step)
        undo(here)
        check_clean(here)
    assert step > 5


def test_death_at_random_moments_again_and_again(host: Callable[[str], DiskBuilder]) -> None:
    """Also inside qemu-img, mkfs and xorriso, which the steps above do not see."""
    expected, moments = expected_disks(host), random.Random(20)
    for number in range(12):
        here = host(f"r{number}")
        for _ in range(3):
            in_child(lambda here=here: make(here), kill_after=moments.uniform(0.005, 0.25))  # type: ignore[misc]
        make(here)
        check_whole(here, expected)
        checked = qemu_img("check", "--output=json", "-f", "qcow2", here.directory.path(UUID) / "disk")
        assert '"check-errors": 0' in checked


def test_a_guest_never_loses_what_it_wrote(host: Callable[[str], DiskBuilder]) -> None:
    here = host("s")
    make(here)
    disk = here.directory.path(UUID) / "disk"
    qemu_io = ["-f", "qcow2", "-c", "write -P 0x61 0 512", disk]
    subprocess.run(["qemu-io", *map(str, qemu_io)], check=True, capture_output=True)
    before = disk.read_bytes()
    in_child(lambda: make(here), kill_at=3)
    make(here)
    here.undo_prepare_images(GUEST)
    assert disk.read_bytes() == before
