"""Warm resize: real qcow2 files, real bitmaps, real qemu-nbd on both sides; the hypervisor's part is played."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import Disk, DiskInfo
from compute_worker.states import PowerState
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from compute_worker.virt.libvirt.transfer import extents, plan
from compute_worker.virt.libvirt.transfer.base import Shipment
from compute_worker.virt.libvirt.transfer.over_nbd import NbdTransport
from compute_worker.virt.libvirt.transfer.precopy import Precopy
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.libvirt.transfer.fakeguest import FakeGuest, qemu_io
from tests.virt.libvirt.transfer.support import MIB, UUID, Pair, noise, processes
from tests.waiting import wait_for

BASE = "base-of-the-image"


class Warm:
    """A guest with one overlay on host ``a``, and a host ``b`` that has the same base."""

    def __init__(self, root: Path, size: int = 16 * MIB, backed: bool = True, **options: Any) -> None:
        self.pair = Pair(root, **{"nbd_plaintext": True, **options})
        here, there = self.pair.here, self.pair.there
        content = noise(4 * MIB, seed=1)
        for directory in (here, there):
            (directory.base / BASE).write_bytes(content)
        self.path = here.create(UUID) / "disk"
        over = ["-F", "raw", "-b", f"../_base/{BASE}"] if backed else []
        words = ["qemu-img", "create", "-q", "-f", "qcow2", *over, str(self.path), str(size)]
        subprocess.run(words, check=True, timeout=20)
        self.disk = Disk(
            name="disk", format="qcow2", virtual_size_bytes=size, backing=BASE if backed else None,
            backing_format="raw" if backed else None,
        )  # fmt: skip
        self.info = DiskInfo(disks=[self.disk, Disk(name="disk.config", format="raw", virtual_size_bytes=4096)])
        self.guest: Any = FakeGuest(UUID, {"vda": self.path})
        self.precopy = self.again()
        self.job = RecordingJob()

    def again(self, **options: Any) -> Precopy:
        """A worker that begins anew, maybe with other options."""
        source = self.pair.source
        source = dataclasses.replace(source, transfer=dataclasses.replace(source.transfer, **options))
        return Precopy(source, self.pair.here, QemuImg(30, 2048))

    def run(self) -> dict[str, Any]:
        return self.precopy.run(self.guest, self.pair.migration, self.info, self.pair.peer, self.job)

    def abandon(self) -> None:
        self.precopy.abandon(self.guest, self.info)

    def off(self) -> Shipment:
        """The guest shut down, and its files are set aside."""
        self.guest.power = PowerState.SHUTDOWN
        self.pair.here.move(UUID, "", "_resize")
        aside = self.pair.here.path(UUID, "_resize") / "disk"
        self.guest.files["vda"] = aside
        return Shipment(UUID, self.pair.migration, "disk", aside, "qcow2")

    def rest(self, shipment: Shipment) -> tuple[bool, str]:
        return self.precopy.send_rest(shipment, self.disk, self.pair.peer, self.job)

    def sent(self, phase: str) -> int:
        """Bytes that a phase was about."""
        return max((total or 0 for name, _, total in self.job.reports if name == phase), default=0)


@pytest.fixture
def warm() -> Iterator[Callable[..., Warm]]:
    """Makes one; below a short path, since a hypervisor has to bind a socket there."""
    made: list[Warm] = []
    roots: list[Path] = []

    def make(**options: Any) -> Warm:
        roots.append(Path(tempfile.mkdtemp(prefix="pc", dir="/tmp")))
        made.append(Warm(roots[-1], **options))
        return made[-1]

    yield make
    for one in made:
        one.guest.abort_job()
        one.pair.receiver.stop_all()
    for root in roots:
        shutil.rmtree(root)


def bitmaps(path: Path) -> list[str]:
    words = ["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", str(path)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=20).stdout)
    return [one["name"] for one in found["format-specific"]["data"].get("bitmaps", ())]


def held(path: Path) -> list[tuple[int, int]]:
    """What the overlay itself holds, data or zeros."""
    words = ["qemu-img", "map", "--output=json", "-f", "qcow2", str(path)]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=20).stdout)
    top = [x for x in found if x["depth"] == 0 and x["present"]]
    return list(extents.merge((x["start"], x["start"] + x["length"]) for x in top))


def assert_same_disk(one: Path, other: Path) -> None:
    """As a guest reads them, and as layers over their base."""
    for path in (one, other):
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True, timeout=20)
    words = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", str(one), str(other)]
    assert subprocess.run(words, timeout=30, check=False).returncode == 0, "the disks differ"
    assert held(one) == held(other)


def test_only_what_was_written_since_goes_when_the_guest_is_off(warm: Callable[..., Warm]) -> None:
    one = warm(compare="full")
    one.guest.writes("write -P 1 0 2M", "write -P 2 9M 3M", "write -z 5M 1M")
    told = one.run()
    assert told == {"disks": {"disk": one.guest.checkpoint[0]}, "reason": "sent when the guest is off: disk.config"}
    assert one.sent("precopy_disk") == 6 * MIB and one.guest.backup is None
    one.guest.writes("write -P 3 1M 128k", "write -P 4 14M 64k", "discard 9M 1M")
    shipment = one.off()
    assert one.rest(shipment)[0]
    assert_same_disk(shipment.source, one.pair.arrived())
    assert one.sent("send_disk") == MIB + 192 * 1024
    assert {"disk", "instance.json"} < set(os.listdir(one.pair.there.path(UUID)))
    one.abandon()
    assert bitmaps(shipment.source) == bitmaps(one.pair.arrived()) == [] == one.guest.checkpoint
    assert os.listdir(shipment.source.parent) == ["disk"]
    assert not processes("qemu-nbd", str(one.pair.here.root.parent.parent))


def test_the_copy_stands_on_the_base_there(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.writes("write -P 1 8M 64k")
    one.run()
    one.rest(one.off())
    words = ["qemu-img", "info", "--output=json", "-f", "qcow2", str(one.pair.arrived())]
    found = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=20).stdout)
    assert (found["backing-filename"], found["backing-filename-format"]) == (f"../_base/{BASE}", "raw")
    assert found["virtual-size"] == 16 * MIB


def test_an_idle_guest_has_nothing_left_to_send(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.writes("write -P 1 0 4M")
    one.run()
    shipment = one.off()
    for _ in range(2):
        assert one.rest(shipment)[0]
    assert one.sent("send_disk") == 0
    assert_same_disk(shipment.source, one.pair.arrived())


@pytest.mark.parametrize("size", [16 * MIB, 3 * MIB + 512, 512])
@pytest.mark.parametrize("backed", [True, False])
def test_sizes_and_disks_without_a_base(warm: Callable[..., Warm], size: int, backed: bool) -> None:
    one = warm(size=size, backed=backed)
    one.guest.writes(f"write -P 1 {size - 512} 512", "write -P 2 0 512")
    assert one.run()["disks"]
    one.guest.writes(f"write -P 3 {size - 512} 512")
    if size > MIB:
        one.guest.writes("discard 0 64k")
    shipment = one.off()
    assert one.rest(shipment)[0], one.job.reasons
    assert_same_disk(shipment.source, one.pair.arrived())


def test_what_the_file_did_not_show_is_sent_afterwards(warm: Callable[..., Warm]) -> None:
    """qemu may have allocated clusters in memory that `qemu-img map` cannot see yet and no bitmap has."""
    one = warm()
    one.guest.writes("write -P 1 0 1M", "write -P 2 8M 1M")
    one.run()
    directory = one.pair.here.path(UUID)
    seen = plan.read(directory, "disk")
    assert seen is not None and seen.data == [(0, MIB), (8 * MIB, 9 * MIB)]
    plan_file = plan.path_of(directory, "disk")
    one.abandon()
    one.pair.peer({"ask": "remove"})
    layers = one.precopy._qemu_img.layers

    def blind(path: Path, fmt: str, job: Any) -> list[dict[str, Any]]:
        return [piece for piece in layers(path, fmt, job) if piece["start"] < 8 * MIB]

    one.precopy._qemu_img.layers = blind  # type: ignore[method-assign]
    one.run()
    assert plan_file.exists()
    shipment = one.off()
    assert one.rest(shipment)[0]
    assert one.sent("send_disk") == MIB
    assert_same_disk(shipment.source, one.pair.arrived())


def test_a_bitmap_that_cannot_be_believed(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.writes("write -P 1 0 2M")
    one.run()
    qemu_io(one.path, "write -P 5 1M 64k", crash=True)
    shipment = one.off()
    there, reason = one.rest(shipment)
    assert not there and "inconsistent" in reason
    assert bitmaps(shipment.source) == []
    assert not one.pair.arrived("disk.part").exists()
    NbdTransport(one.pair.source).send(shipment, one.pair.peer, one.job)
    assert_same_disk(shipment.source, one.pair.arrived())


def test_a_guest_that_was_brought_back_and_wrote_without_us(warm: Callable[..., Warm]) -> None:
    """The move was undone and made again: what was sent before must not be built upon."""
    one = warm()
    one.guest.writes("write -P 1 0 2M")
    one.run()
    one.abandon()
    one.guest.writes("write -P 2 0 1M")
    one.run()
    shipment = one.off()
    assert one.rest(shipment)[0]
    assert_same_disk(shipment.source, one.pair.arrived())


def test_a_plan_without_what_was_sent(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.writes("write -P 1 0 2M")
    one.run()
    one.pair.peer({"ask": "remove"})
    shipment = one.off()
    assert one.rest(shipment) == (False, "what was sent while the guest ran is not all there")
    assert bitmaps(shipment.source) == []


def test_no_plan(warm: Callable[..., Warm]) -> None:
    one = warm()
    assert one.rest(one.off()) == (False, "nothing was sent while the guest ran")


def test_a_worker_that_died_goes_on_with_the_same_point_in_time(warm: Callable[..., Warm]) -> None:
    one = warm(bandwidth_mb=4)
    one.guest.writes("write -P 1 0 12M")

    class Died(BaseException):
        pass

    def peer(request: Any) -> Any:
        if request["ask"] == "windows" and request["done"]:
            one.pair.peer(request)
            raise Died
        return one.pair.peer(request)

    dying = one.again()
    dying.abandon = lambda *args: None  # type: ignore[method-assign]
    with pytest.raises(Died):
        dying.run(one.guest, one.pair.migration, one.info, peer, one.job)
    token, one.precopy = one.guest.checkpoint, one.again(bandwidth_mb=0)
    one.job.reports.clear()
    assert one.run()["disks"] == {"disk": token[0]}
    first = next(done for name, done, _ in one.job.reports if name == "precopy_disk")
    assert first and first >= MIB, "it began anew"
    shipment = one.off()
    assert one.rest(shipment)[0]
    assert_same_disk(shipment.source, one.pair.arrived())


@pytest.mark.parametrize("when", ["run", "rest"])
def test_the_destination_dies(warm: Callable[..., Warm], when: str) -> None:
    one = warm(bandwidth_mb=8)
    one.guest.writes("write -P 1 0 8M")
    shipment = None
    if when == "rest":
        one.run()
        one.guest.writes("write -P 2 0 8M")
        shipment = one.off()
    thread, raised = in_thread(one.run) if shipment is None else in_thread(one.rest, shipment)
    phase = "precopy_disk" if when == "run" else "send_disk"
    wait_for(lambda: any(n == phase and done for n, done, _ in list(one.job.reports)), what="bytes")
    for pid in processes("qemu-nbd", "--export-name=disk", str(one.pair.there.root)):
        os.kill(pid, signal.SIGKILL)
    thread.join(20)
    assert not thread.is_alive() and raised == []
    shipment = shipment or one.off()
    assert one.rest(shipment)[0], one.job.reasons
    assert_same_disk(shipment.source, one.pair.arrived())


def test_cancelled_leaves_the_guest_as_it_was(warm: Callable[..., Warm]) -> None:
    one = warm(bandwidth_mb=2)
    one.guest.writes("write -P 1 0 12M")
    thread, raised = in_thread(one.run)
    wait_for(lambda: any(done for _, done, _ in list(one.job.reports)), what="bytes")
    one.job.cancel()
    thread.join(5)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)
    assert (one.guest.backup, one.guest.checkpoint, bitmaps(one.path)) == (None, [], [])
    assert os.listdir(one.path.parent) == ["disk"]


def test_abandoned_twice_and_when_off(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.writes("write -P 1 0 1M")
    one.run()
    one.off()
    for _ in range(2):
        one.abandon()
    aside = one.pair.here.path(UUID, "_resize")
    assert (bitmaps(aside / "disk"), one.guest.checkpoint, os.listdir(aside)) == ([], [], ["disk"])


def test_bitmaps_of_others_stay(warm: Callable[..., Warm]) -> None:
    one = warm()
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(one.path), "backup-of-somebody"], check=True)
    one.guest.power = PowerState.SHUTDOWN
    one.abandon()
    assert bitmaps(one.path) == ["backup-of-somebody"]


def test_the_hypervisor_refuses(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.refuse = errors.GuestFailed(instance=UUID, reason="no backup today")
    told = one.run()
    assert told["disks"] == {} and "no backup today" in told["reason"]
    assert os.listdir(one.path.parent) == ["disk"] and bitmaps(one.path) == []


def test_the_guest_goes_away_while_it_is_read(warm: Callable[..., Warm]) -> None:
    one = warm(bandwidth_mb=2)
    one.guest.writes("write -P 1 0 12M")
    told: dict[str, Any] = {}
    thread, raised = in_thread(lambda: told.update(one.run()))
    wait_for(lambda: any(done for _, done, _ in list(one.job.reports)), what="bytes")
    for server in one.guest._servers:
        server.kill()
    thread.join(10)
    assert not thread.is_alive() and raised == []
    assert told["disks"] == {} and "on this host" in told["reason"]
    assert bitmaps(one.path) == [] and not one.pair.arrived("disk.part").exists()


def test_little_room_is_left_to_the_guest(warm: Callable[..., Warm], monkeypatch: pytest.MonkeyPatch) -> None:
    one = warm()
    one.guest.writes("write -P 1 0 1M")
    monkeypatch.setattr("compute_worker.virt.libvirt.transfer.precopy._KEEP_FREE", 1 << 60)
    told = one.run()
    assert told["disks"] == {} and "MiB are left" in told["reason"]
    assert (one.guest.backup, bitmaps(one.path)) == (None, [])


def test_a_full_destination_is_met_while_the_guest_runs(warm: Callable[..., Warm]) -> None:
    one = warm()
    one.guest.writes("write -P 1 0 12M")
    there = one.pair.there.root
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(there)], check=True, timeout=10)
    try:
        one.pair.there.prepare()
        with pytest.raises(errors.DiskFull):
            one.run()
        assert (one.guest.backup, bitmaps(one.path)) == (None, [])
    finally:
        one.pair.receiver.stop_all()
        subprocess.run(["umount", "-l", str(there)], check=True, timeout=10)


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"resize_precopy": "never"}, lambda one: None, "resize_precopy is never"),
        ({}, lambda one: setattr(one.guest, "power", PowerState.SHUTDOWN), "it is off"),
        ({}, lambda one: setattr(one.guest, "backup", "<domainbackup/>"), "another backup"),
        ({}, lambda one: setattr(one, "info", DiskInfo(disks=one.info.disks[1:])), "none of them is a qcow2"),
        ({}, lambda one: one.pair.change.update(probe={"seen": True}), "they go by shared"),
    ],
)
def test_when_it_is_not_done(
    warm: Callable[..., Warm], options: dict[str, Any], change: Callable[[Warm], None], reason: str
) -> None:
    one = warm(**options)
    change(one)
    told = one.run()
    assert told["disks"] == {} and reason in told["reason"] and reason in one.job.reasons[-1]
    assert os.listdir(one.path.parent) == ["disk"]


def test_a_copy_that_differs_is_sent_as_a_whole(warm: Callable[..., Warm]) -> None:
    one = warm(compare="full")
    one.guest.writes("write -P 1 0 2M")
    one.run()
    qemu_io(one.pair.arrived("disk.part"), "write -P 9 64k 512")
    shipment = one.off()
    there, reason = one.rest(shipment)
    assert not there and "not the same on both sides" in reason


verbs = st.sampled_from(["write -P 5", "write -P 6", "write -z", "discard"])
writes = st.lists(st.tuples(verbs, st.integers(0, 250), st.integers(1, 5)), max_size=6)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(before=writes, after=writes)
def test_any_writes(warm: Callable[..., Warm], before: list[Any], after: list[Any]) -> None:
    one = warm()
    commands = [[f"{verb} {at * 64}k {count * 64 if verb == 'discard' else count * 32}k" for verb, at, count in some]
                for some in (before, after)]  # fmt: skip
    if commands[0]:
        one.guest.writes(*commands[0])
    one.run()
    if commands[1]:
        one.guest.writes(*commands[1])
    shipment = one.off()
    assert one.rest(shipment)[0], one.job.reasons
    assert_same_disk(shipment.source, one.pair.arrived())
