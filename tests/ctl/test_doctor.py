from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from compute_worker.ctl.doctor import healthy, repairable
from compute_worker.objects import Finding
from compute_worker.virt.simulated.model import Slot
from tests.ctl.cell import IMAGE, CtlCell
from tests.waiting import wait_for

A, B = "aaaa0000-0000-4000-8000-000000000001", "bbbb0000-0000-4000-8000-000000000002"
# Names of their own: the broker in this process is one for all cells.
FIRST, SECOND = "ward", "clinic"


def finding(kind: str, instance: str | None = A, **facts: Any) -> Finding:
    return Finding(kind=kind, instance=instance, where="somewhere", reason="why", **facts)


@pytest.mark.parametrize(
    ("findings", "wanted"),
    [
        ([], []),
        ([finding("resize", safe=True)], [A]),
        ([finding("resize", safe=True), finding("del", safe=True), finding("lock", None, safe=True)], [A, None]),
        ([finding("resize", safe=True), finding("domain", safe=False)], []),
        ([finding("resize", safe=True), finding("directory", B)], [A]),
        ([finding("move"), finding("operation")], []),
        ([finding("lock", None, safe=True)], [None]),
    ],
)
def test_an_instance_is_repaired_as_a_whole_or_not(findings: list[Finding], wanted: list[str | None]) -> None:
    assert repairable({"h": findings}) == [("h", instance) for instance in wanted]


def test_healthy() -> None:
    assert healthy([]) and healthy([finding("move", kept=True)])
    assert not healthy([finding("move", kept=True), finding("part")])


@pytest.fixture
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlCell]:
    directory = tmp_path_factory.mktemp("doctor")
    with CtlCell([FIRST, SECOND], directory, compute={"peer_ask_interval": 0.2}) as cell:
        (directory / "images" / IMAGE).write_bytes(b"image")
        cell.ready()
        yield cell


def leave(cell: CtlCell, host: str, instance: str, suffix: str) -> None:
    simulated = cell.simulated(host)
    with simulated.cell.lock:
        simulated.changed(Slot(uuid=instance, directories={suffix: {}}))


def test_all_is_well(cell: CtlCell) -> None:
    cell.boot("well", "--host", FIRST)
    told = cell.ctl("doctor")
    assert told.code == 0 and told.out.startswith("nothing is left over on ")
    assert FIRST in told.out and SECOND in told.out


def test_what_waits_is_told_and_is_no_fault(cell: CtlCell) -> None:
    instance = cell.boot("waits", "--host", FIRST)
    assert cell.ctl("migrate", "waits", "--to", SECOND).code == 0
    told = cell.ctl("doctor", FIRST)
    assert told.code == 0 and "for confirm or revert" in told.out and instance in told.out
    repaired = cell.ctl("doctor", "--repair")
    assert repaired.code == 0 and "removed" not in repaired.out
    assert cell.ctl("revert", "waits").code == 0, "its copy is still there"


def test_repair_removes_what_is_safe_and_leaves_the_rest(cell: CtlCell) -> None:
    instance = cell.boot("moved", "--host", FIRST)
    assert cell.ctl("migrate", "moved", "--to", SECOND).code == 0
    assert cell.ctl("confirm", "moved").code == 0
    wait_for(lambda: cell.simulated(FIRST).leftovers() == [], what="the copy to go")
    leave(cell, FIRST, instance, "_resize")
    leave(cell, FIRST, B, "")
    told = cell.ctl("doctor", FIRST)
    assert told.code == 1 and f"host {SECOND} owns it and needs nothing here" in told.out
    assert "--repair: remove it" in told.out and "nothing says whose it is" in told.out
    assert "doctor --repair" in told.err
    repaired = cell.ctl("doctor", "--repair")
    assert repaired.code == 1 and f"{FIRST}: instance {instance}: removed" in repaired.out, repaired
    document = cell.ctl("doctor", FIRST, "--json")
    assert document.code == 1
    assert [f["instance"] for f in document.document["findings"][FIRST]] == [B]
    assert cell.simulated(SECOND).running(instance)


def test_a_host_that_does_not_answer(cell: CtlCell) -> None:
    assert cell.ctl("doctor", "nobody").code == 4
