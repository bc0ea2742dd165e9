from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.ctl.placement import rank, unfit
from compute_worker.objects import Capacity, Flavor, HostState

FLAVOR = Flavor(vcpus=2, memory_mb=1024, root_gb=10, ephemeral_gb=5)


def host(name: str = "h", vcpus: float = 8, memory: float = 4096, disk: float = 100, **facts: Any) -> HostState:
    def room(free: float) -> Capacity:
        return Capacity(total=free, usable=free)

    return HostState(host=name, vcpus=room(vcpus), memory_mb=room(memory), disk_gb=room(disk), **facts)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (host(), None),
        (host(vcpus=2, memory=1024, disk=15), None),
        (host(vcpus=1), "vcpus: 2 asked for, 1 free"),
        (host(memory=1000), "memory_mb: 1024 asked for, 1000 free"),
        (host(disk=14.5), "disk_gb: 15 asked for, 14.5 free"),
        (host(enabled=False, disabled_reason="fan"), "disabled (fan)"),
        (host(enabled=False), "disabled (no reason given)"),
        (host(hypervisor_up=False), "its hypervisor does not answer"),
    ],
)
def test_unfit(state: HostState, reason: str | None) -> None:
    assert unfit(state, FLAVOR) == reason


def test_most_free_memory_first_then_fewest_instances_then_name() -> None:
    states = [host("d", instances=2), host("c"), host("b"), host("a", memory=2048)]
    states += [host("big", memory=8192), host("no", vcpus=1)]
    assert rank(states, FLAVOR) == (["big", "b", "c", "d", "a"], {"no": "vcpus: 2 asked for, 1 free"})


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4096), st.booleans()), max_size=8))
def test_every_host_is_ranked_or_left_out_with_a_reason(facts: list[tuple[int, int, bool]]) -> None:
    states = [host(f"h{n}", c, m, enabled=e) for n, (c, m, e) in enumerate(facts)]
    ranked, left_out = rank(states, FLAVOR)
    assert sorted([*ranked, *left_out]) == sorted(s.host for s in states)
    assert all(left_out.values())
