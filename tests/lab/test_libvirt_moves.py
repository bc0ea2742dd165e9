"""Cold moves of the libvirt driver between two real hosts: the contract, and what only guests show."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.agent import PORT
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.libvirt_world import DATA, INITRD, KERNEL
from tests.lab.settings import WORKER_USER, Settings
from tests.lab.test_libvirt_driver import run_inside
from tests.lab.worker import REPOSITORY
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1_300)]


@contextmanager
def other_host(cell: Cell, guest: GuestImages) -> Iterator[None]:
    """The second host answers the tests that run in the first."""
    for name, path in ((KERNEL, guest.kernel), (INITRD, guest.initrd), (DATA, guest.data_raw)):
        cell.add_image(path, name)
    node = cell["node2"]
    log = cell.state / "agent.log"
    with open(log, "wb") as output:
        # Not by -m: what is pickled must have been made by a module of a name that the other end knows.
        words = [sys.executable, "-c", f"from tests.lab.agent import main; main({PORT})"]
        argv = ["sh", "-ec", f"cd {REPOSITORY} && exec \"$@\"", "sh", *words]
        env = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
        agent = node.ns.popen(argv, user=WORKER_USER, env=env, output=output)
    try:
        wait_for(lambda: agent.poll() is not None or _listens(cell), 20, "the agent of node2")
        assert agent.poll() is None, log.read_text()
        yield
    finally:
        for process in node.ns.processes(r"tests\.lab\.agent"):
            process.signal(signal.SIGKILL)
        agent.wait(20)
        _show(log)


def _listens(cell: Cell) -> bool:
    return f":{PORT}" in cell["node2"].run("ss", "-ltn").stdout


def _show(log: Path) -> None:
    """For the report of a test that failed."""
    print(log.read_text(errors="replace")[-4_000:])


@pytest.mark.parametrize(
    ("chosen", "count", "seconds"),
    [("TestColdMove", 40, 1_200), ("not TestColdMove and not tls and not warm", 6, 700), ("warm and not tls", 9, 900)],
    ids=["contract", "guests", "warm"],
)
def test_moves(cell: Cell, lab_guest: GuestImages, chosen: str, count: int, seconds: float) -> None:
    with other_host(cell, lab_guest):
        assert run_inside(cell, "moves_on_libvirt.py", seconds, "-k", chosen) >= count


def test_moves_with_certificates(lab_machine: None, lab_guest: GuestImages) -> None:
    with Cell(settings=Settings(nodes=2, tls=True), rabbit=False) as cell, other_host(cell, lab_guest):
        assert run_inside(cell, "moves_on_libvirt.py", 200, "-k", "tls") >= 1
