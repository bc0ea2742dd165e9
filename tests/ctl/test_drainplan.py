from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.ctl.drainplan import How, Left, how_to_move, plan, verdict
from compute_worker.objects import BlockDeviceInfo, Flavor, ImageMeta, Instance, Migration, MigrationState
from compute_worker.states import MigrationStatus, TaskState, VmState
from tests.ctl.test_placement import host

SOURCE = host("src", instances=3)


def instance(number: int = 1, memory: int = 1024, vcpus: int = 1, root: int = 1, **facts: Any) -> Instance:
    fields: dict[str, Any] = {
        "uuid": f"00000000-0000-4000-8000-{number:012d}",
        "flavor": Flavor(vcpus=vcpus, memory_mb=memory, root_gb=root),
        "image": ImageMeta(id="x"),
        "vm_state": VmState.ACTIVE,
    }
    return Instance(**(fields | facts))


VOLUMES = BlockDeviceInfo(block_device_mapping=[{"connection_info": 1}])


@pytest.mark.parametrize(
    ("facts", "how", "reason", "passing"),
    [
        ({}, How.LIVE, "it is active", False),
        ({"vm_state": VmState.STOPPED}, How.COLD, "it is stopped", False),
        ({"vm_state": VmState.PAUSED}, How.LIVE, "it is paused", False),
        ({"vm_state": VmState.BUILDING}, None, "busy: building", True),
        ({"task_state": TaskState.REBOOTING}, None, "busy: rebooting", True),
        ({"vm_state": VmState.RESIZED}, None, "it waits for confirm or revert", False),
        ({"vm_state": VmState.SUSPENDED}, None,
         "resize_instance needs vm_state active, paused, stopped; it is suspended", False),
        ({"vm_state": VmState.ERROR}, None,
         "resize_instance needs vm_state active, paused, stopped; it is error", False),
        ({"block_device_info": VOLUMES}, None, "it has volumes", False),
    ],
)
def test_how_to_move(facts: dict[str, Any], how: How | None, reason: str, passing: bool) -> None:
    assert how_to_move(instance(**facts)) == (how, reason, passing)


@pytest.mark.parametrize(
    ("wanted", "state", "how", "reason"),
    [
        ("cold", VmState.ACTIVE, How.COLD, "asked for"),
        ("cold", VmState.STOPPED, How.COLD, "it is stopped"),
        ("live", VmState.ACTIVE, How.LIVE, "it is active"),
        ("live", VmState.STOPPED, None, "live_migration needs vm_state active, paused; it is stopped"),
    ],
)
def test_only_as_asked_for(wanted: str, state: VmState, how: How | None, reason: str) -> None:
    assert how_to_move(instance(vm_state=state), wanted) == (how, reason, False)


def test_live_to_the_first_host_that_can_take_it() -> None:
    asked: list[str] = []

    def refuses(one: Instance, name: str) -> str | None:
        asked.append(name)
        return "another processor" if name == "a" else None

    hosts = [SOURCE, host("a", memory=4096), host("b", memory=3500)]
    (move,) = plan("src", [instance()], hosts, refuses=refuses).moves
    assert (move.how, move.way.to, move.way.alternates, asked) == (How.LIVE, "b", (), ["a", "b"])


@pytest.mark.parametrize(("wanted", "moves"), [("auto", 1), ("live", 0)])
def test_what_nobody_takes_live_goes_cold_unless_only_live_was_asked_for(wanted: str, moves: int) -> None:
    made = plan("src", [instance()], [SOURCE, host("a")], wanted, lambda one, name: "another processor")
    reasons = [m.reason for m in made.moves] + [s.reason for s in made.stuck]
    assert len(made.moves) == moves and reasons == ["not live: a: another processor"]
    assert all(m.how is How.COLD for m in made.moves)


def test_the_largest_first_and_what_is_planned_counts() -> None:
    small, middle, large = instance(1, 1024), instance(2, 2048), instance(3, 3000)
    hosts = [SOURCE, host("a", memory=4096), host("b", memory=3500)]
    made = plan("src", [small, middle, large], hosts, "cold")
    assert [(m.instance.uuid[-1], m.way.to, m.way.alternates) for m in made.moves] == [
        ("3", "a", ("b",)), ("2", "b", ()), ("1", "b", ("a",)),
    ]
    assert made.stuck == []


@pytest.mark.parametrize(
    ("others", "wanted", "reason"),
    [
        ([], {}, "no other host answers"),
        ([host("a", enabled=False, disabled_reason="fan")], {}, r"a: disabled \(fan\)"),
        ([host("a", memory=512)], {}, "a: memory_mb: 1024 asked for, 512 free"),
        ([host("a", disk=0)], {}, "a: disk_gb: 1 asked for, 0 free"),
        ([host("a", vcpus=1)], {"vcpus": 2}, "a: vcpus: 2 asked for, 1 free"),
        ([host("a", hypervisor_up=False)], {}, "its hypervisor does not answer"),
    ],
)
def test_what_has_nowhere_to_go(others: list[Any], wanted: dict[str, int], reason: str) -> None:
    made = plan("src", [instance(**wanted)], [SOURCE, *others])
    assert not made.moves and len(made.stuck) == 1 and not made.stuck[0].passing
    assert re.search(reason, made.stuck[0].reason)


def test_another_architecture_is_no_place_to_go() -> None:
    made = plan("src", [instance()], [host("src", machine_arch="x86_64"), host("a", machine_arch="aarch64")])
    assert made.stuck[0].reason == "no other host can take it: a: it is aarch64, host src is x86_64"


@given(st.lists(st.tuples(st.integers(16, 2048), st.integers(1, 4), st.sampled_from(list(VmState))), max_size=12),
       st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 8)), max_size=4))
def test_everything_is_planned_once_and_no_host_is_overfilled(guests: Any, rooms: Any) -> None:
    instances = [instance(n, memory, vcpus, 0, vm_state=state) for n, (memory, vcpus, state) in enumerate(guests)]
    states = [SOURCE, *(host(f"h{n}", vcpus=v, memory=m) for n, (m, v) in enumerate(rooms))]
    made = plan("src", instances, states)
    planned = [m.instance.uuid for m in made.moves] + [s.instance.uuid for s in made.stuck]
    assert sorted(planned) == sorted(i.uuid for i in instances)
    assert all(s.reason for s in made.stuck)
    for state in states:
        here = [m.instance.flavor for m in made.moves if m.way.to == state.host]
        assert sum(f.memory_mb for f in here) <= state.memory_mb.free
        assert sum(f.vcpus for f in here) <= state.vcpus.free
    assert all(m.way.to != "src" and "src" not in m.way.alternates for m in made.moves)


def side(side_: str, status: MigrationStatus) -> MigrationState:
    uuid = instance().uuid
    migration = Migration(uuid=uuid, instance=uuid, source_host="src", dest_host="a", status=status)
    return MigrationState(migration=migration, side=side_, operation=migration.uuid)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (Left([], []), "host src is empty"),
        (Left([instance()], []), "host src is not empty: 1 instances stay"),
        (Left([], [side("source", MigrationStatus.FINISHED)]),
         "host src is not empty: 1 copies are kept until their moves are confirmed"),
        (Left([instance()], [side("destination", MigrationStatus.FINISHED)]),
         "host src is not empty: 1 instances stay, 1 moves are not closed"),
    ],
)
def test_verdict(left: Left, said: str) -> None:
    assert verdict("src", left) == said
    assert left.empty is (said == "host src is empty")

