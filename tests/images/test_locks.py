from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.images.locks import NamedLocks
from tests.images.support import Job
from tests.waiting import wait_for


def test_one_holder_at_a_time_between_threads(tmp_path: Path, job: Job) -> None:
    locks, inside, seen, intruders = NamedLocks(tmp_path), [0], [0], []

    def work() -> None:
        for _ in range(20):
            with locks.hold("base", job):
                inside[0] += 1
                with locks.try_hold("base") as second:
                    intruders.append(second or inside[0] != 1)
                inside[0] -= 1
                seen[0] += 1
                locks.forget("base")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [80]
    assert not any(intruders)


def test_waiting_is_cancelled(tmp_path: Path) -> None:
    locks, waiting, caught = NamedLocks(tmp_path), Job(), []

    def wait() -> None:
        try:
            with locks.hold("base", waiting):
                caught.append("held")
        except errors.Cancelled:
            caught.append("cancelled")

    with locks.hold("base", Job()):
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.cancel()
        thread.join(5)
    assert caught == ["cancelled"]


def test_other_processes_are_excluded_and_death_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom compute_worker.images.locks import NamedLocks\n"
        "from compute_worker.virt.driver import NullJob\n"
        "with NamedLocks(Path(sys.argv[1])).hold('base', NullJob()):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    locks = NamedLocks(tmp_path)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with locks.try_hold("base") as held:
            assert not held
    finally:
        child.kill()
        child.wait()

    def free() -> bool:
        with locks.try_hold("base") as held:
            return held

    wait_for(free, what="the dead holder's lock")


def test_last_use_is_the_lock_files_time(tmp_path: Path) -> None:
    locks = NamedLocks(tmp_path)
    assert locks.last_used("base") == 0
    with locks.try_hold("base"):
        os.utime(locks.path("base"), (5, 5))
        assert locks.last_used("base") == 5
        locks.touch("base")
    assert locks.last_used("base") > 1_600_000_000


def test_names_are_those_of_the_files(tmp_path: Path) -> None:
    locks = NamedLocks(tmp_path)
    for name in ("one", "two.raw"):
        with locks.try_hold(name):
            assert name in locks.names()
    (tmp_path / "other").touch()
    (tmp_path / ".hidden.lock").touch()
    assert locks.names() == {"one", "two.raw"}
    locks.forget("one")
    assert locks.names() == {"two.raw"}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x\0", "a" * 201])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="lock name"):
        NamedLocks(tmp_path).path(name)
