"""Live migration of the libvirt driver between two real hosts."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.lab import faults, oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.node import Node
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH, WORKER_UID, WORKER_USER, Settings
from tests.lab.test_libvirt_driver import run_inside
from tests.lab.test_libvirt_moves import other_host
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
SPECIAL = ("fault_at", "by_tls", "one_directory", "by_postcopy")


@contextmanager
def shared_instances(cell: Cell) -> Iterator[None]:
    """Both hosts see one instances directory."""
    inside, directory = f"{IMAGES_PATH}/live-shared", cell.state / "images" / "live-shared"
    directory.mkdir(mode=0o700)
    try:
        for node in cell.nodes.values():
            node.run("chown", f"{WORKER_UID}:{WORKER_UID}", inside)
            node.run("mount", "--bind", inside, INSTANCES_PATH)
        yield
    finally:
        for node in cell.nodes.values():
            wait_for(lambda n=node: n.run("umount", INSTANCES_PATH, check=False).returncode == 0,  # type: ignore[misc]
                     10, f"umount on {node.name}")  # fmt: skip
        shutil.rmtree(directory)


def run_guests_as_root(node: Node) -> None:
    """Where the kernel lets only root fetch pages on demand, post-copy needs a hypervisor that is root."""
    conf = node.path("/etc/libvirt/qemu.conf")
    text = conf.read_text().replace(f'user = "{WORKER_USER}"', 'user = "root"')
    conf.write_text(text + "clear_emulator_capabilities = 0\n")
    node.libvirtd.stop()
    node.libvirtd.start()


@contextmanager
def cable_out(cell: Cell) -> Iterator[None]:
    with faults.link_down(cell["node2"]):
        yield


@contextmanager
def libvirtd_killed(cell: Cell) -> Iterator[None]:
    cell["node2"].libvirtd.kill()
    yield
    cell["node2"].libvirtd.start()


@contextmanager
def qemu_killed(cell: Cell) -> Iterator[None]:
    for process in oracle.qemu_processes(cell["node2"]):
        os.kill(process.pid, signal.SIGKILL)
    yield


FAULTS = {"cable": cable_out, "libvirtd": libvirtd_killed, "qemu": qemu_killed}


@pytest.mark.parametrize("retries", [6, 15])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_at_the_destination(cell: Cell, lab_guest: GuestImages, fault: str, retries: int) -> None:
    """The guest goes on at the source, and a second try succeeds. ``retries``: the kernel's patience with a silent
    peer (``tcp_retries2``): 25 s, or 15 minutes."""
    if fault != "cable" and retries != 15:
        pytest.skip("only a silent peer is a matter of patience")
    locks = cell["node1"].instances / "locks"

    def breaking() -> None:
        wait_for((locks / "in-the-air").exists, 90, "a guest in the air")
        with FAULTS[fault](cell):
            wait_for(lambda: not (locks / "in-the-air").exists(), 90, "its landing")
        (locks / "healed").touch(0o666)
        os.chown(locks / "healed", WORKER_UID, WORKER_UID)

    usual = cell.settings.tcp_retries2
    with other_host(cell, lab_guest), ThreadPoolExecutor(1) as pool:
        for node in cell.nodes.values():
            node.run("sh", "-c", f"echo {retries} > /proc/sys/net/ipv4/tcp_retries2")
        outside = pool.submit(breaking)
        try:
            assert run_inside(cell, "live_on_libvirt.py", 400, "-k", "fault_at", "-s") >= 1
            outside.result()
        finally:
            for node in cell.nodes.values():
                node.run("sh", "-c", f"echo {usual} > /proc/sys/net/ipv4/tcp_retries2")


@pytest.mark.parametrize(
    ("chosen", "count", "seconds"),
    [
        ("TestLiveMove", 17, 500),
        (" and ".join(f"not {name}" for name in ("TestLiveMove", *SPECIAL)), 14, 800),
    ],
    ids=["contract", "guests"],
)
def test_live(cell: Cell, lab_guest: GuestImages, chosen: str, count: int, seconds: float) -> None:
    with other_host(cell, lab_guest):
        assert run_inside(cell, "live_on_libvirt.py", seconds, "-k", chosen) >= count


def test_one_directory(cell: Cell, lab_guest: GuestImages) -> None:
    with shared_instances(cell), other_host(cell, lab_guest):
        assert run_inside(cell, "live_on_libvirt.py", 100, "-k", "one_directory") >= 1


def test_by_tls_and_by_postcopy(lab_machine: None, lab_guest: GuestImages) -> None:
    with Cell(settings=Settings(nodes=2, tls=True), rabbit=False) as cell:
        with other_host(cell, lab_guest):
            assert run_inside(cell, "live_on_libvirt.py", 200, "-k", "by_tls") >= 1
        for node in cell.nodes.values():
            run_guests_as_root(node)
        with other_host(cell, lab_guest):
            assert run_inside(cell, "live_on_libvirt.py", 300, "-k", "by_postcopy") >= 2
