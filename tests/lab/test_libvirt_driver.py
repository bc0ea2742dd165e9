"""The libvirt driver on a real libvirt, run in a host as the worker's user: its contract, and what only guests show."""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ET

import pytest

from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.killcell import HOST, kill_host
from tests.lab.libvirt_world import BOOT, DATA, INITRD, KERNEL
from tests.lab.settings import INSTANCES_PATH, WORKER_USER
from tests.lab.worker import REPOSITORY

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def images(cell: Cell, lab_guest: GuestImages) -> None:
    """The guest's files, as images of the file store that every host sees."""
    for name, path in ((KERNEL, lab_guest.kernel), (INITRD, lab_guest.initrd), (DATA, lab_guest.data_raw),
                       (BOOT, lab_guest.boot_qcow2)):
        cell.add_image(path, name)


def run_inside(cell: Cell, what: str, seconds: float, *options: str) -> int:
    """Run tests inside node1 as the worker's user; how many passed. A failure there is shown here."""
    report = "/tmp/report.xml"
    argv = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--rootdir",
        str(REPOSITORY), f"--junitxml={report}", f"{REPOSITORY}/tests/lab/{what}", *options,
    ]  # fmt: skip
    env = {"HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    node = cell["node1"]
    script = f"cd {REPOSITORY} && exec \"$@\""
    done = node.run("sh", "-ec", script, "sh", *argv, user=WORKER_USER, env=env, check=False, timeout=seconds)
    try:
        assert done.returncode == 0, f"{what} inside {node.name}:\n{done.stdout[-20_000:]}\n{done.stderr[-4_000:]}"
        suite = next(ET.parse(node.path(report)).getroot().iter("testsuite"))
        return int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
    finally:
        node.path(report).unlink(missing_ok=True)


def test_contract_refusals(cell: Cell, images: None) -> None:
    assert run_inside(cell, "contract_on_libvirt.py::TestRefusals", 100) >= 9


@pytest.mark.timeout(300)
def test_guests(cell: Cell, images: None) -> None:
    assert run_inside(cell, "guests_on_libvirt.py", 280) >= 5


@pytest.mark.timeout(300)
def test_console_that_is_root_s_alone(cell: Cell, lab_guest: GuestImages) -> None:
    """What virtlogd makes when it rolls a console over: the worker reads it by way of libvirt, and leaves no pool."""
    with kill_host(cell, lab_guest) as host:
        host.start()
        instance, _ = host.boot()
        host.wait_ticks(instance)
        log = host.node.instances / instance.uuid / "console.log"
        os.chown(log, 0, 0)
        assert host.node.run("cat", f"{INSTANCES_PATH}/{instance.uuid}/console.log", user=WORKER_USER,
                             check=False).returncode != 0
        assert "LAB: tick 1 " in host.api.get_console_output(instance.uuid, 100_000, host=HOST)
        assert 0 < len(host.api.get_console_output(instance.uuid, 10, host=HOST)) <= 10
        assert host.node.virsh("pool-list", "--all", "--name").stdout.split() == []
        host.do("terminate_instance", instance.uuid)
        host.stop()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("contract", "count"), [("Spawn", 30), ("Lifecycle", 14), ("Facts", 11)])
def test_contract(cell: Cell, images: None, contract: str, count: int) -> None:
    assert run_inside(cell, f"contract_on_libvirt.py::Test{contract}", 380) >= count
