"""The operator's program against two real hosts over RabbitMQ: a host is drained, what is left over on one is found and
removed, one that never returns is forgotten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import MEMORY_MIB, GuestImages
from tests.lab.movecell import tls_cell
from tests.lab.node import Node
from tests.lab.rabbit import ADMINISTRATOR, broker_url
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH, WORKER_USER
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

FULL, NEXT = "node1", "node2"
CONFIG = {"images": {"file_path": IMAGES_PATH}, "compute": {"peer_ask_interval": 1.0}}
PROGRAM = Path(sys.prefix, "bin", "compute-workerctl")
PATIENCE = 60.0
OK, FAILED, REFUSED, UNREACHABLE, NOT_FOUND = 0, 1, 3, 4, 5


@dataclass(frozen=True)
class Told:
    """What the program said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document that was printed."""
        return json.loads(self.out)


class Operator:
    """Somebody at a terminal who reaches the cell's broker."""

    def __init__(self, cell: Cell, images: GuestImages) -> None:
        self.cell = cell
        self._images = images
        relay = cell.relay()
        url = broker_url("rabbit", ADMINISTRATOR, "127.0.0.1", relay.port, cell.rabbit.vhost)
        self._environment = os.environ | {"COMPUTE_WORKER_TRANSPORT_URL": url}

    def ctl(self, *words: str) -> Told:
        """Run the program to its end."""
        done = subprocess.run([str(PROGRAM), "--discover", "1", *words], env=self._environment, capture_output=True,
                              text=True, timeout=150, check=False)  # fmt: skip
        print("$ compute-workerctl", *words, f"-> {done.returncode}\n{done.stdout}{done.stderr}")
        return Told(done.returncode, done.stdout, done.stderr)

    def start(self, *hosts: str) -> None:
        """Start the workers of these hosts, and wait until they say what they have."""
        for worker in [self.cell.start_worker(host, CONFIG) for host in hosts]:
            worker.wait_ready()
        wait_for(lambda: {row["host"] for row in self._hosts() if row["vcpus"]["total"]} >= set(hosts), PATIENCE,
                 f"{', '.join(hosts)} to say what they have")

    def _hosts(self) -> list[dict[str, Any]]:
        told = self.ctl("hosts", "--json")
        return list(told.document["hosts"]) if told.code == OK else []

    def boot(self, name: str, host: str = FULL) -> str:
        """A guest that has ticked; its uuid."""
        images = self._images
        told = self.ctl("boot", name, "--flavor", f"1/{MEMORY_MIB}/1", "--image", images.data_qcow2.name, "--kernel",
                        images.kernel.name, "--ramdisk", images.initrd.name, "--host", host, "--json")  # fmt: skip
        assert told.code == OK, told
        instance = str(told.document["instance"])
        self.wait_tick(host, instance)
        return instance

    def wait_tick(self, host: str, instance: str, after: int = 0) -> int:
        """Its counter, once that is beyond ``after`` on this host's console."""

        def beyond() -> int | None:
            boots = oracle.boots(oracle.read_console(self.cell[host], instance))
            found = [tick for boot in boots for tick in boot.ticks]
            return found[-1] if found and found[-1] > after else None

        return wait_for(beyond, PATIENCE, f"{instance} to tick on {host}") or 0

    def listed(self, host: str) -> set[str]:
        """Instances that a host says it has."""
        told = self.ctl("list", "--host", host, "--json")
        assert told.code == OK, told
        return {row["uuid"] for row in told.document["instances"]}

    def findings(self, host: str) -> dict[str, set[str]]:
        """What the doctor tells of a host: kinds by instance."""
        found: dict[str, set[str]] = {}
        for finding in self.ctl("doctor", host, "--json").document["findings"][host]:
            found.setdefault(finding["instance"], set()).add(finding["kind"])
        return found


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    """Two hosts with certificates."""
    with tls_cell() as made:
        yield made


@pytest.fixture
def operator(cell: Cell, lab_guest: GuestImages) -> Iterator[Operator]:
    for path in (lab_guest.kernel, lab_guest.initrd, lab_guest.data_qcow2):
        cell.add_image(path)
    made = Operator(cell, lab_guest)
    made.start(FULL, NEXT)
    yield made
    for worker in cell.workers:
        if worker.running:
            worker.terminate()
    cell.workers.clear()


def plant(node: Node, *paths: str) -> None:
    """Files in the instances directory, as the worker would own them."""
    for path in paths:
        above, _, name = f"{INSTANCES_PATH}/{path}".rpartition("/")
        node.run("mkdir", "-p", above, user=WORKER_USER)
        node.run("touch", f"{above}/{name}", user=WORKER_USER)


def test_a_host_is_drained(operator: Operator) -> None:
    """One guest runs, one is stopped: both are elsewhere as they were, and nothing of them is left."""
    runs, stopped = operator.boot("runs"), operator.boot("stopped")
    assert operator.ctl("stop", stopped).code == OK
    planned = operator.ctl("drain", FULL, "--dry-run")
    assert planned.code == OK and f"2 instances would leave host {FULL}, 0 would stay" in planned.out
    assert runs in planned.out and stopped in planned.out
    assert operator.listed(FULL) == {runs, stopped} and "disabled" not in operator.ctl("hosts").out

    node = operator.cell[FULL]
    before = operator.wait_tick(FULL, runs)
    told = operator.ctl("drain", FULL, "--confirm", "--json")
    assert told.code == OK, told
    assert told.document["empty"] is True and told.document["left"] == {"instances": [], "migrations": []}
    results = {result["instance"]: result for result in told.document["results"]}
    assert results.keys() == {runs, stopped}
    assert all(result["moved"] and result["host"] == NEXT for result in results.values()), results

    assert operator.listed(FULL) == set() and operator.listed(NEXT) == {runs, stopped}
    assert oracle.leftovers(node) == []
    there = operator.cell[NEXT]
    states = {domain.uuid: domain.state for domain in oracle.domains(there).values()}
    assert states == {runs: "running", stopped: "shut off"}
    assert [process.uuid for process in oracle.qemu_processes(there)] == [runs]
    assert operator.wait_tick(NEXT, runs, before) > before
    shown = {row["host"]: row for row in operator._hosts()}
    assert not shown[FULL]["enabled"] and shown[FULL]["disabled_reason"] == "being drained" and shown[NEXT]["enabled"]
    assert operator.ctl("boot", "late", "--flavor", "1/64", "--image", "any", "--host", FULL).code == REFUSED

    assert operator.ctl("start", stopped).code == OK
    operator.wait_tick(NEXT, stopped)
    for instance in (runs, stopped):
        assert operator.ctl("delete", instance).code == OK
    assert operator.ctl("enable", FULL).code == OK


def test_what_is_left_over_is_found_and_removed(operator: Operator) -> None:
    """Leftovers of an instance that is another host's, of one that was deleted, and of one that nobody knows."""
    node = operator.cell[FULL]
    moved, deleted, unknown = operator.boot("moved"), operator.boot("deleted"), str(uuid.uuid4())
    assert operator.ctl("migrate", moved, "--to", NEXT).code == OK
    waits = operator.ctl("doctor")
    assert waits.code == OK and "waits" in waits.out, "a move that waits to be confirmed is no fault"
    assert operator.ctl("confirm", moved).code == OK
    orphan = node.virsh("dumpxml", "--inactive", deleted).stdout
    assert operator.ctl("delete", deleted).code == OK
    wait_for(lambda: oracle.leftovers(node) == [], PATIENCE, "nothing to be left of them")

    plant(node, f"{moved}_resize/disk", f"{moved}/disk.part", f"{deleted}_del/disk", f"{unknown}_del/disk")
    definition = node.path("/var/tmp/orphan.xml")
    definition.write_text(orphan)
    node.virsh("define", str(definition))
    definition.unlink()
    assert operator.ctl("doctor").code == FAILED
    found = operator.findings(FULL)
    assert found.keys() == {moved, deleted, unknown}
    assert {"resize", "part"} <= found[moved] and {"del", "domain"} <= found[deleted] and found[unknown] == {"del"}

    repaired = operator.ctl("doctor", "--repair")
    assert repaired.code == FAILED, "what nobody knows is for a person to decide"
    assert repaired.out.count(": removed") == 2 and f"instance {unknown}: removed" not in repaired.out
    assert operator.findings(FULL) == {unknown: {"del"}}
    assert [line for line in oracle.leftovers(node) if unknown not in line] == []
    node.run("rm", "-r", f"{INSTANCES_PATH}/{unknown}_del")
    assert operator.ctl("doctor").code == OK
    assert operator.wait_tick(NEXT, moved) and operator.ctl("delete", moved).code == OK


def test_a_host_that_never_returns_is_forgotten(operator: Operator) -> None:
    """A delete waits for the host that a copy went to, until an operator says that it is gone."""
    cell, instance = operator.cell, operator.boot("lost")
    assert operator.ctl("migrate", instance, "--to", NEXT).code == OK
    refused = operator.ctl("forget-host", NEXT)
    assert refused.code == REFUSED and "answers" in refused.err
    cell.kill_node(NEXT)
    assert operator.ctl("delete", instance, "--host", FULL, "--timeout", "5").code == UNREACHABLE
    told = operator.ctl("forget-host", NEXT)
    assert told.code == OK and f"host {FULL} waits no longer for host {NEXT}" in told.out

    def ended() -> bool:
        return operator.ctl("operations", "--open", "--host", FULL, "--json").document["operations"] == []

    wait_for(ended, PATIENCE, "the delete to end")
    assert oracle.leftovers(cell[FULL]) == []

    cell.start_node(NEXT)
    operator.start(NEXT)
    assert operator.ctl("delete", instance, "--host", NEXT).code == OK
    assert oracle.leftovers(cell[NEXT]) == []
