"""Real deaths in the middle of a snapshot: the worker, libvirtd, qemu, the host, the instance itself.

The oracle looks from outside: the guest runs on and is defined, its hypervisor keeps nothing for us, no file of a
snapshot is left, and the image is whole or absent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker.objects import Instance
from compute_worker.states import OperationState
from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.killcell import HOST, PATIENCE, KillHost, kill_host
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SNAPSHOT = "snapshot_instance"


@pytest.fixture
def host(cell: Cell, lab_guest: GuestImages) -> Iterator[KillHost]:
    with kill_host(cell, lab_guest) as made:
        yield made


def at(step: str, point: str, direction: str = "do") -> str:
    return f"{SNAPSHOT}:{step}:{direction}:{point}"


class Shot:
    """A guest that ticks, and images of it."""

    def __init__(self, host: KillHost, **points: str) -> None:
        self.host = host
        host.start(**points)
        self.instance: Instance
        self.instance, _ = host.boot()
        host.wait_ticks(self.instance)
        self.store = Path(host.cell.state, "images")
        self.before = set(os.listdir(self.store))
        self.image = f"snap-{self.instance.uuid}"

    def send(self, live: bool = True) -> str:
        return self.host.send(SNAPSHOT, self.instance.uuid, self.image, live)

    def left(self) -> list[str]:
        """What of a snapshot hangs on the guest or lies about."""
        node, uuid = self.host.node, self.instance.uuid
        found = [name for name in oracle.files(node, uuid) if "snapshot.part" in name]
        found += sorted(name for name in set(os.listdir(self.store)) - self.before if name.endswith(".part"))
        if node.virsh("backup-dumpxml", uuid, check=False).returncode == 0:
            found.append("a backup")
        return found

    def checkpoints(self) -> list[str]:
        return self.host.node.virsh("checkpoint-list", self.instance.uuid, "--name").stdout.split()

    def assert_whole(self, tmp_path: Path) -> None:
        image, disk = self.store / self.image, tmp_path / "flat"
        for words in (["check", "-q", "-f", "qcow2", str(image)],
                      ["convert", "-f", "qcow2", "-O", "raw", str(image), str(disk)]):  # fmt: skip
            subprocess.run(["qemu-img", *words], check=True, timeout=60)
        note = json.loads((self.store / f".{self.image}.json").read_text())
        assert note["image"]["size_bytes"] == image.stat().st_size
        subprocess.run(["e2fsck", "-p", "-E", "journal_only", str(disk)], check=False, timeout=60)
        subprocess.run(["e2fsck", "-fn", str(disk)], check=True, timeout=60, stdout=subprocess.DEVNULL)
        said = subprocess.run(["debugfs", "-R", "cat counter", str(disk)], check=True, capture_output=True, timeout=60)
        ticks = [tick for boot in oracle.boots(self.host.console(self.instance)) for tick in boot.ticks]
        assert 0 < int(said.stdout) <= max(ticks) + 1
        assert self.left() == [] and len(self.checkpoints()) <= 1

    def assert_absent(self) -> None:
        assert set(os.listdir(self.store)) == self.before
        assert self.left() == [] and self.checkpoints() == []

    def close(self, deaths: int) -> None:
        self.host.do("terminate_instance", self.instance.uuid)
        self.host.assert_gone()
        assert self.host.deaths == deaths
        self.host.stop()
        for name in set(os.listdir(self.store)) - self.before:
            (self.store / name).unlink()


@pytest.mark.parametrize(
    ("step", "point", "live"),
    [
        ("create_image", "after_do", True),
        ("freeze", "before_do", True),
        ("freeze", "after_do", True),
        ("freeze", "after_do", False),
        ("upload", "before_do", True),
        ("upload", "after_do", True),
        ("upload", "after_do", False),
        ("publish", "before_record", True),
        ("commit", "after_record", True),
    ],
)
def test_worker_killed(host: KillHost, tmp_path: Path, step: str, point: str, live: bool) -> None:
    shot = Shot(host, kill_at=at(step, point))
    operation = shot.send(live)
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(shot.instance)
    shot.assert_whole(tmp_path)
    host.assert_ended_once(shot.instance, operation, "instance.snapshot.end")
    shot.close(deaths=1)


@pytest.mark.parametrize(("held", "killed"), [("upload", "freeze"), ("upload", "create_image"), ("publish", "freeze")])
def test_worker_killed_while_it_is_undone(host: KillHost, held: str, killed: str) -> None:
    """Cancelled, and the worker dies on the way back."""
    point = at(held, "before_do")
    shot = Shot(host, hold_at=point, kill_at=at(killed, "after_do", "undo"))
    operation = shot.send()
    host.wait_held(point)
    host.api.cancel_operation(operation, host=HOST)
    host.release(point)
    assert host.outcome(operation).state is OperationState.UNDONE
    host.assert_runs(shot.instance)
    shot.assert_absent()
    shot.close(deaths=1)


@pytest.mark.parametrize("step", ["freeze", "upload", "publish"])
def test_libvirtd_killed(host: KillHost, tmp_path: Path, step: str) -> None:
    """Who serves the point in time is qemu: it outlives libvirtd."""
    point = at(step, "before_do")
    shot = Shot(host, hold_at=point)
    operation = shot.send()
    host.wait_held(point)
    host.node.libvirtd.kill()
    host.release(point)
    host.node.libvirtd.start()
    assert host.outcome(operation).state is OperationState.DONE
    host.assert_runs(shot.instance)
    shot.assert_whole(tmp_path)
    shot.close(deaths=0)


def test_qemu_killed(host: KillHost, tmp_path: Path) -> None:
    """The point in time dies with it: the image is made of the disk that the guest left."""
    point = at("upload", "before_do")
    shot = Shot(host, hold_at=point)
    operation = shot.send()
    host.wait_held(point)
    os.kill(oracle.qemu_processes(host.node)[0].pid, signal.SIGKILL)
    wait_for(lambda: not oracle.qemu_processes(host.node), 10, "qemu's end")
    host.release(point)
    assert host.outcome(operation).state is OperationState.DONE
    shot.assert_whole(tmp_path)
    host.do("start_instance", shot.instance.uuid)
    host.assert_runs(shot.instance, boot=2)
    shot.close(deaths=0)


@pytest.mark.parametrize("step", ["upload", "publish"])
def test_host_power_failure(host: KillHost, tmp_path: Path, step: str) -> None:
    point = at(step, "before_do")
    shot = Shot(host, hold_at=point)
    operation = shot.send()
    host.wait_held(point)
    host.cell.kill_node(HOST)
    host.cell.start_node(HOST)
    host.node.path(host.mark).mkdir(parents=True, mode=0o777)
    host.node.path(host.mark).chmod(0o777)
    host.node.path(f"{host.mark}/{point}.held").touch()
    host.release(point)
    host.revive()
    ended = host.outcome(operation)
    host.wait_ticks(shot.instance, boot=2)
    if ended.state is OperationState.DONE:
        shot.assert_whole(tmp_path)
    else:
        shot.assert_absent()
    shot.close(deaths=1)


@pytest.mark.parametrize("step", ["freeze", "upload", "publish"])
def test_deleted_meanwhile(host: KillHost, step: str) -> None:
    point = at(step, "before_do")
    shot = Shot(host, hold_at=point)
    operation = shot.send()
    host.wait_held(point)
    gone = host.send("terminate_instance", shot.instance.uuid)
    host.release(point)
    assert host.outcome(gone).state is OperationState.DONE
    wait_for(lambda: host.api.get_operation(operation, host=HOST).state.final, PATIENCE, "the snapshot's end")
    host.assert_gone()
    wait_for(lambda: set(os.listdir(shot.store)) == shot.before, 20, "the image to be withdrawn")
    host.stop()
