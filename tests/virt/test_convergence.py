"""Convergence: tables of recorded statistics, and what holds of every history."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker.virt.convergence import LEAST_GIB, Action, Decision, History, Policy, decide
from compute_worker.virt.driver import JobStatistics
from tests.virt.convergence_samples import CONVERGES, SILENT_DISK, SLOW_LINK, STALLS, Sample

PATIENT = Policy(completion_timeout=0, progress_timeout=0, downtime_delay=0)


def statistics(sample: Sample, **changes: object) -> JobStatistics:
    _, iteration, remaining, processed, rate, disk = sample
    found = JobStatistics(
        type="unbounded",
        memory_total=100_000_000,
        memory_processed=processed,
        memory_remaining=remaining,
        memory_rate=rate,
        memory_iteration=iteration,
        disk_processed=disk,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def replay(samples: list[Sample], policy: Policy, **changes: object) -> list[tuple[float, Decision]]:
    """What is done, at which times."""
    history, done = History(), []
    for sample in samples:
        history = history.seen(statistics(sample, **changes), sample[0])
        decision = decide(history, policy)
        history = history.did(decision)
        if decision.action is not Action.WAIT:
            done.append((sample[0], decision))
    return done


def actions(samples: list[Sample], policy: Policy, **changes: object) -> list[str]:
    return [f"{d.action}{d.downtime_ms or ''}" for _, d in replay(samples, policy, **changes)]


@pytest.mark.parametrize(
    ("samples", "changes", "wanted"),
    [
        (CONVERGES, {}, ["downtime50"]),
        (SLOW_LINK, {}, ["downtime50"]),
        # The first stall is seen after the third iteration; each step has to stall anew before the next.
        (STALLS, {"downtime_steps": 2}, ["downtime50", "downtime500"]),
        (STALLS, {"downtime_steps": 1}, ["downtime500"]),
        (STALLS, {"downtime_steps": 2, "downtime_delay": 1000.0}, ["downtime50"]),
        (STALLS, {"downtime_steps": 1, "post_copy": True}, ["downtime500", "postcopy"]),
        (STALLS, {"downtime_steps": 2, "post_copy": True}, ["downtime50", "downtime500", "postcopy"]),
        (STALLS, {"downtime_steps": 1, "auto_converge": True}, ["downtime500"]),
        (SLOW_LINK, {"completion_timeout": 20.0}, ["downtime50", "abort"]),
        (SLOW_LINK, {"completion_timeout": 20.0, "timeout_action": "force_complete"}, ["downtime50", "pause"]),
        (SLOW_LINK, {"completion_timeout": 20.0, "timeout_action": "force_complete", "post_copy": True},
         ["downtime50", "postcopy"]),
        (SILENT_DISK, {"progress_timeout": 15.0}, ["downtime50", "abort"]),
        (SILENT_DISK, {"progress_timeout": 60.0}, ["downtime50"]),
    ],
)  # fmt: skip
def test_recorded(samples: list[Sample], changes: dict[str, object], wanted: list[str]) -> None:
    assert actions(samples, replace(PATIENT, **changes)) == wanted  # type: ignore[arg-type]


def test_a_hypervisor_that_throttles_is_given_its_time() -> None:
    policy = replace(PATIENT, downtime_steps=1, auto_converge=True, post_copy=True)
    assert actions(STALLS, policy, throttle=50) == ["downtime500"]
    assert actions(STALLS, policy, throttle=99) == ["downtime500", "postcopy"]


def test_reasons_carry_their_numbers() -> None:
    policy = replace(PATIENT, downtime_steps=2, post_copy=True)
    raised, switched = [decision.reason for _, decision in replay(STALLS, policy)[1:]]
    assert raised == "iteration 3 left 2.7 MiB, the one before 2.8: a downtime of 500 ms is permitted"
    assert "does not converge" in switched and "500 ms" in switched
    late = replay(SLOW_LINK, replace(PATIENT, completion_timeout=20))[1][1].reason
    assert "longer than 40 s" in late and "1.0 MiB/s" in late
    silent = replay(SILENT_DISK, replace(PATIENT, progress_timeout=15))[1][1].reason
    assert "not a byte was sent for" in silent and "progress_timeout 15 s" in silent


@pytest.mark.parametrize(
    ("changes", "ladder"),
    [
        ({}, (50, 79, 126, 199, 315, 500)),
        ({"downtime_steps": 1}, (500,)),
        ({"max_downtime_ms": 30}, (30,)),
        ({"max_downtime_ms": 60, "downtime_steps": 2}, (50, 60)),
    ],
)
def test_ladder(changes: dict[str, int], ladder: tuple[int, ...]) -> None:
    assert replace(Policy(), **changes).ladder == ladder  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "timeout", "deadline"), [(0.1, 10, 10 * LEAST_GIB), (8, 10, 80), (8, 0, None)])
def test_deadline_grows_with_the_guest(size: float, timeout: float, deadline: float | None) -> None:
    assert Policy(size_gib=size, completion_timeout=timeout).deadline == deadline


numbers = st.integers(0, 1 << 36)
stats = st.builds(
    JobStatistics,
    type=st.sampled_from(["unbounded", "bounded", "none", "completed", "failed", "cancelled"]),
    memory_processed=st.none() | numbers,
    memory_remaining=st.none() | numbers,
    memory_rate=st.none() | st.floats(0, 1e10),
    memory_dirty_rate=st.none() | st.floats(0, 1e10),
    memory_iteration=st.none() | st.integers(0, 50),
    disk_processed=st.none() | numbers,
    disk_remaining=st.none() | numbers,
    postcopy=st.booleans(),
    throttle=st.none() | st.integers(0, 99),
)
policies = st.builds(
    Policy,
    size_gib=st.floats(0.01, 1024),
    max_downtime_ms=st.integers(1, 5000),
    downtime_steps=st.integers(1, 20),
    downtime_delay=st.floats(0, 100),
    post_copy=st.booleans(),
    auto_converge=st.booleans(),
    completion_timeout=st.floats(0, 1000),
    timeout_action=st.sampled_from(["abort", "force_complete"]),
    progress_timeout=st.floats(0, 100),
)


@settings(max_examples=300, deadline=None)
@given(seen=st.lists(st.tuples(st.floats(0, 50), stats), max_size=40), policy=policies)
def test_of_every_history(seen: list[tuple[float, JobStatistics]], policy: Policy) -> None:
    history, now, last, forced, downtimes = History(), 0.0, False, 0, [0]
    for step, one in seen:
        now += step
        history = history.seen(one, now)
        decision = decide(history, policy)
        assert decision.reason, decision
        assert not last or decision.action is Action.WAIT, "something was done after it was aborted"
        if one.postcopy or one.type not in ("bounded", "unbounded"):
            assert decision.action is Action.WAIT
        if decision.action is Action.POSTCOPY:
            assert policy.post_copy
        if decision.action in (Action.POSTCOPY, Action.PAUSE):
            forced += 1
        if decision.action is Action.DOWNTIME:
            downtimes.append(decision.downtime_ms)
        if decision.action is Action.ABORT:
            assert policy.timeout_action == "abort" or "progress_timeout" in decision.reason
            last = True
        history = history.did(decision)
    assert forced <= 1, "it was forced twice"
    assert downtimes == sorted(set(downtimes)) and downtimes[-1] <= policy.max_downtime_ms
