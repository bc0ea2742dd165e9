from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker.rpc.lanes import Lanes
from tests.waiting import wait_for


@pytest.mark.parametrize("threads", [1, 4])
def test_every_job_runs_once(threads: int) -> None:
    lanes, done = Lanes(threads, "t"), []
    for number in range(100):
        assert lanes.submit(str(number % 7), lambda number=number: done.append(number))
    assert lanes.stop(5)
    assert sorted(done) == list(range(100))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 2)), max_size=30))
def test_jobs_of_one_key_run_in_order_though_some_must_wait(jobs: list[tuple[str | None, int]]) -> None:
    lanes = Lanes(3, "t")
    done: list[tuple[str | None, int]] = []

    def job(key: str | None, number: int, attempts: list[None]) -> float | None:
        if attempts:
            attempts.pop()
            return 0.001
        done.append((key, number))
        return None

    for number, (key, attempts) in enumerate(jobs):
        lanes.submit(key, lambda key=key, number=number, left=[None] * attempts: job(key, number, left))
    wait_for(lambda: lanes.backlog == 0, what="all jobs to be done")
    for key in ("a", "b"):
        mine = [number for its_key, number in done if its_key == key]
        assert mine == sorted(mine)
    assert len(done) == len(jobs)
    assert lanes.stop(5)


def test_one_key_never_runs_twice_at_once_and_others_run_beside_it() -> None:
    lanes, gate, running = Lanes(4, "t"), threading.Event(), []

    def block() -> None:
        running.append("a")
        gate.wait(5)

    lanes.submit("a", block)
    lanes.submit("a", block)
    lanes.submit("b", lambda: running.append("b"))
    lanes.submit(None, lambda: running.append("none"))
    wait_for(lambda: sorted(running) == ["a", "b", "none"], what="others to run beside a blocked key")
    gate.set()
    assert lanes.stop(5)
    assert sorted(running) == ["a", "a", "b", "none"]


def test_a_parked_job_holds_no_thread() -> None:
    lanes, done = Lanes(1, "t"), []
    attempts = iter([0.2, None])
    lanes.submit("a", lambda: next(attempts))
    lanes.submit("a", lambda: done.append("a"))
    lanes.submit("b", lambda: done.append("b"))
    wait_for(lambda: done == ["b", "a"], what="b to overtake the parked a")
    assert lanes.stop(5)


def test_a_failing_job_is_dropped_and_its_lane_goes_on() -> None:
    lanes, done = Lanes(1, "t"), []
    lanes.submit("a", lambda: 1 / 0)  # type: ignore[return-value]
    lanes.submit("a", lambda: done.append(1))
    wait_for(lambda: done, what="the next job")
    assert lanes.backlog == 0
    assert lanes.stop(5)


def test_a_job_that_is_interrupted_leaves_the_thread_alive() -> None:
    lanes, done = Lanes(1, "t"), []

    def interrupted() -> None:
        raise SystemExit

    lanes.submit("a", interrupted)
    lanes.submit("a", lambda: done.append(1))
    wait_for(lambda: done, what="the next job")
    assert lanes.stop(5)


def test_stop_forgets_what_is_parked_and_takes_no_more() -> None:
    lanes = Lanes(2, "t")
    lanes.submit("a", lambda: 3600.0)
    wait_for(lambda: lanes._parked, what="the job to be parked")
    started = time.monotonic()
    assert lanes.stop(5)
    assert time.monotonic() - started < 2
    assert not lanes.submit("a", lambda: None)


def test_stop_says_when_something_did_not_end() -> None:
    lanes, gate = Lanes(1, "t"), threading.Event()
    lanes.submit("a", lambda: gate.wait(5) and None)
    assert not lanes.stop(0.05)
    gate.set()


def test_backlog_can_be_waited_for() -> None:
    lanes, gate = Lanes(1, "t"), threading.Event()
    for _ in range(3):
        lanes.submit(None, lambda: gate.wait(5) and None)
    assert not lanes.wait_below(3, 0.01)
    gate.set()
    assert lanes.wait_below(1, 5)
    assert lanes.stop(5)


def test_threads_are_started_only_when_needed() -> None:
    lanes = Lanes(16, "t")
    for _ in range(20):
        done = threading.Event()
        lanes.submit(None, lambda done=done: done.set())
        assert done.wait(5)
        wait_for(lambda: lanes._idle, what="the thread to be idle")
    assert lanes._started == 1
    assert lanes.stop(5)


def test_what_is_parked_holds_up_nobody() -> None:
    lanes, parked = Lanes(1, "t"), threading.Event()

    def park() -> float:
        parked.set()
        return 60.0

    lanes.submit("a", park)
    lanes.submit("a", lambda: None)
    assert parked.wait(5)
    assert lanes.wait_below(1, 5)
    assert lanes.backlog == 2
    assert lanes.stop(5)
