"""Whole moves between two real hosts, by message: each transport, with growth, confirmed and reverted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.movecell import COMMIT, DESTINATION, FLAVOR, SOURCE, MoveCell, move_cell, shared_instances, tls_cell

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

GIB = 1 << 30
FILLER_MIB, BANDWIDTH_MB = 96, 12


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    """Two hosts with certificates."""
    with tls_cell() as made:
        yield made


@pytest.fixture
def moves(cell: Cell, lab_guest: GuestImages) -> Iterator[MoveCell]:
    with move_cell(cell, lab_guest) as made:
        yield made


TRANSPORTS: dict[str, dict[str, Any]] = {
    "nbd-tls": {"transport": "auto"},
    "ssh": {"transport": "ssh"},
    "shared": {"transport": "auto"},
    "warm": {"transport": "auto", "resize_precopy": "auto"},
}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_resized_and_reverted_resized_and_confirmed(moves: MoveCell, name: str) -> None:
    """There, grown; back as it was; there again for good: the guest's counter never jumps."""
    with ExitStack() as stack:
        if name == "shared":
            stack.enter_context(shared_instances(moves))
        moves.start(hold_at=COMMIT, transfer={**TRANSPORTS[name], "compare": "full"})
        instance = moves.boot(flavor=FLAVOR)
        migration, operation = moves.resize(instance)
        moves.arrived(instance, operation)
        disks = oracle.seen_disks(moves.watch.console(DESTINATION))
        assert (disks["vda"]["size"], disks["vdb"]["size"]) == (str(2 * GIB), str(2 * GIB))
        moves.revert(instance, migration)
        assert oracle.seen_disks(moves.watch.console(SOURCE))["vda"]["size"] == str(GIB)
        migration, operation = moves.resize(instance)
        moves.resized(instance, operation)
        moves.assert_arrived(instance, boot=3)
        moves.confirm(instance, migration)
        moves.destination.do("stop_instance", instance.uuid)
        moves.assert_sound(DESTINATION, instance)
        moves.delete(instance, DESTINATION)
        moves.stop()


def test_a_warm_resize_keeps_the_guest_off_for_less_long(moves: MoveCell) -> None:
    """The same disk cold and warm over the same capped line: what is sent while the guest runs does not keep it off."""
    gaps, blackouts, copies = {}, {}, {}
    for name, precopy in (("cold", "never"), ("warm", "auto")):
        moves.start(transfer={"bandwidth_mb": BANDWIDTH_MB, "resize_precopy": precopy})
        instance = moves.boot(FILLER_MIB)
        migration, operation = moves.resize(instance)
        moves.resized(instance, operation)
        moves.assert_arrived(instance)
        gaps[name] = moves.watch.gap()
        blackouts[name] = moves.blackout(operation)
        copies[name] = sum(s for step, _, s in moves.steps(SOURCE, operation) if step.startswith("send_"))
        moves.confirm(instance, migration)
        assert moves.noise(DESTINATION, instance) == moves.filler.hexdigest()
        moves.delete(instance, DESTINATION)
        moves.stop()
    print(f"seconds from shutdown to start {blackouts}, of which disks were sent {copies}; between ticks {gaps}")
    assert copies["cold"] > FILLER_MIB / BANDWIDTH_MB
    assert blackouts["warm"] < blackouts["cold"] - FILLER_MIB / BANDWIDTH_MB / 2
