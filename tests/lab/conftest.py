"""Fixtures of the lab: one cell of two hosts for the whole run, checked after each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import faults, oracle
from tests.lab.cell import Cell, interrupt_as_exit
from tests.lab.guest_images import GuestImages, guest_images
from tests.lab.node import Node
from tests.lab.requirements import missing

LOGS_VARIABLE = "LAB_LOGS"
pytest.register_assert_rewrite("tests.lab.killcell", "tests.lab.livecell", "tests.lab.movecell")

IN_MAKE_TEST = frozenset({
    "test_lab.py::test_up_in_seconds_and_down_leaves_nothing",
    "test_lab.py::test_link_and_port_faults",
    "test_libvirt_driver.py::test_guests",
    "test_libvirt_guest.py::test_libvirtd_killed_again_and_again",
    "test_kill_real.py::test_worker_killed[start_paused-after_do-undefine-after_record]",
    "test_kill_real.py::test_libvirtd_killed_inside_a_call[start_paused]",
    "test_kill_real.py::test_qemu_killed",
    "test_kill_real.py::test_rabbitmq_stopped[0.0]",
    "test_kill_real.py::test_host_power_failure",
    "test_moves_killed.py::test_worker_killed_in_the_middle_of_a_disk[nbd-node1]",
    "test_live_killed.py::test_worker_killed_in_flight[node2]",
    "test_snapshot_killed.py::test_worker_killed[upload-after_do-True]",
})
"""One real cell for each class of fault: what `make test` runs. The others are `lab_full`, for `make lab`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.parent != here or item.get_closest_marker("lab") is None:
            continue
        if f"{item.path.name}::{item.name}" not in IN_MAKE_TEST:
            item.add_marker("lab_full")


@pytest.fixture(scope="session")
def lab_machine() -> None:
    """A machine that can hold a cell; elsewhere the tests are skipped, in CI they fail."""
    lacking = missing()
    if lacking and os.environ.get("CI") == "true":
        pytest.fail(f"the lab needs {'; '.join(lacking)}")
    if lacking:
        pytest.skip(f"the lab needs {'; '.join(lacking)}")


@pytest.fixture(scope="session")
def lab_guest(lab_machine: None) -> GuestImages:
    """The guest's kernel, initrd and disks."""
    return guest_images()


@pytest.fixture(scope="session")
def cell(lab_machine: None) -> Iterator[Cell]:
    """Two hosts and a RabbitMQ, up for the whole run."""
    interrupt_as_exit()
    with Cell(nodes=2) as made:
        yield made
        logs = os.environ.get(LOGS_VARIABLE)
        if logs:
            made.collect_logs(Path(logs))


@pytest.fixture(autouse=True)
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that uses the cell: no guest, no file, no worker, no fault is left.

    What is left fails the test and is removed, so that the next one starts clean.
    """
    if "cell" not in request.fixturenames:
        yield
        return
    cell: Cell = request.getfixturevalue("cell")
    yield
    found = [f"{worker.node.name}: a worker runs" for worker in cell.stop_workers()]
    for node in cell.nodes.values():
        if not node.ns.alive:
            found.append(f"{node.name} is off")
            cell.start_node(node.name)
        found += [f"{node.name}: fault {fault}" for fault in faults.heal(node)]
        for name, daemon in node.daemons.items():
            if daemon.process() is None:
                found.append(f"{node.name}: {name} is not running")
                daemon.start()
        found += oracle.leftovers(node)
        cleanse(node)
    if not cell.rabbit.ready():
        found.append("RabbitMQ does not answer")
        restore_rabbit(cell)
    if found:
        pytest.fail("left over: " + "; ".join(found))


def cleanse(node: Node) -> None:
    """Remove every guest and every instance file of a host, and what its worker remembers."""
    for domain in oracle.domains(node).values():
        node.virsh("destroy", domain.uuid, check=False)
        node.virsh("undefine", domain.uuid, "--managed-save", "--snapshots-metadata",
                   "--checkpoints-metadata", "--nvram", check=False)
    node.run("sh", "-c", "rm -rf /var/lib/compute-worker/* && "
             "install -d -m 700 -o compute-worker -g compute-worker "
             "/var/lib/compute-worker/instances")


def restore_rabbit(cell: Cell) -> None:
    if cell.rabbit.process() is None:
        cell.rabbit.start()
    else:
        cell.rabbit.thaw()


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """The workers' last lines, with the report of a failed test."""
    cell = getattr(item, "funcargs", {}).get("cell")
    if call.excinfo is not None and isinstance(cell, Cell):
        for worker in cell.workers:
            item.add_report_section(call.when, f"worker of {worker.node.name}", worker.tail())
