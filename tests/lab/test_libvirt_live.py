"""Live migration of the libvirt driver between two real hosts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.node import Node
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH, WORKER_UID, WORKER_USER, Settings
from tests.lab.test_libvirt_driver import run_inside
from tests.lab.test_libvirt_moves import other_host
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
SPECIAL = ("by_tls", "one_directory", "by_postcopy")


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
