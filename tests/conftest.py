"""For all tests: threads instead of eventlet, hypothesis profiles, and nothing left running behind a test."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from compute_worker.threads import use_threads
from tests.waiting import wait_for

use_threads()

# No deadlines: two shared cores are slow at times. CI runs the same examples each time; `long` looks
# for new ones.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.register_profile(
    "long", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


def lasting_threads() -> set[threading.Thread]:
    """Threads that would keep the interpreter from ending."""
    return {t for t in threading.enumerate() if t.is_alive() and not t.daemon}


def child_processes() -> dict[int, str]:
    """Living children of this process by pid, with their names; zombies are not counted."""
    found = {}
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            try:
                stat = Path("/proc", pid, "stat").read_text()
            except OSError:
                continue
            name, state = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2]
            if state != "Z":
                found[int(pid)] = name
    return found


@pytest.fixture(autouse=True)
def same_log_level() -> Iterator[None]:
    """Programs that are run in this process set the level of their own process: no later test is deaf for it."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A test ends the threads it began, daemons excepted. Those of fixtures of a wider scope were there before."""
    before = lasting_threads()
    yield
    if lasting_threads() - before:
        wait_for(
            lambda: not (lasting_threads() - before),
            deadline=3,
            what=f"threads of this test to end: {sorted(t.name for t in lasting_threads() - before)}",
        )


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """The tests end the processes they started."""
    before = child_processes().keys()
    yield

    def left() -> dict[int, str]:
        return {pid: name for pid, name in child_processes().items() if pid not in before}

    if left():
        wait_for(lambda: not left(), deadline=5, what=f"child processes of the tests to end: {left()}")
