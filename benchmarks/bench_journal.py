"""What the journal costs: a step of an operation, and how many transactions share a commit when many come at once.

The disk itself is measured beside it: a small write with fdatasync is what no durable record can do without.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Report, arguments, finish, median, percentile, run, workspace

from compute_worker.messages import Context
from compute_worker.operations.database import Database, Tx
from compute_worker.operations.kinds import Do, Kind
from compute_worker.operations.schema import SCHEMA
from compute_worker.operations.service import Command, Operations
from compute_worker.states import OperationState

STEP_GOAL_MS = 3.0
WRITERS = (1, 8, 64)


def synced_writes(path: Path, count: int) -> list[float]:
    """Seconds of each of ``count`` appends of 4 KiB with fdatasync."""
    seconds = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for _ in range(count):
            began = time.perf_counter()
            os.write(fd, b"\0" * 4096)
            os.fdatasync(fd)
            seconds.append(time.perf_counter() - began)
    finally:
        os.close(fd)
    return seconds


def nothing(*_: Any) -> None:
    """A step that does nothing: what remains is its record."""


def operations_of(database: Database, steps: int) -> Operations:
    """Operations of one kind with ``steps`` steps that do nothing."""
    listed = [Do(f"step{number}", nothing, nothing) for number in range(steps)]
    kind = Kind(name="bench", steps=lambda run: listed, finish=nothing, abandon=nothing, limit="bench", event="bench")
    return Operations(database, "bench", {"bench": kind}, {"bench": 1})


def one_operation(operations: Operations) -> float:
    """Seconds from the answer to the end of one operation, by the journal's own clock."""
    context = Context(request_id="req-bench", message_id=os.urandom(8).hex())
    accepted = operations.accept(Command(kind="bench", context=context), lambda tx: False)
    ended = operations.get(str(accepted.operation), wait=60)
    assert ended.state is OperationState.DONE, ended
    first, last = ended.steps[0].started_at, ended.steps[-1].ended_at
    assert last is not None
    return last - first


def step_cost(database: Database, steps: int, repeats: int) -> list[float]:
    """Seconds a step, for each of ``repeats`` operations."""
    operations = operations_of(database, steps)
    operations.start()
    try:
        return [one_operation(operations) / steps for _ in range(repeats)]
    finally:
        operations.stop(5)


def insert(tx: Tx) -> None:
    """One row, as the inbox gets them."""
    tx.execute(
        "INSERT INTO inbox (message_id, body, received_at) VALUES (?, ?, ?)",
        (os.urandom(8).hex(), b"x" * 1500, time.time()),
    )


def together(database: Database, writers: int, seconds: float) -> tuple[float, list[float]]:
    """Transactions a second of ``writers`` threads, and the seconds each took."""
    taken: list[float] = []
    end = time.perf_counter() + seconds

    def write() -> None:
        while (began := time.perf_counter()) < end:
            database.write(insert)
            taken.append(time.perf_counter() - began)

    threads = [threading.Thread(target=write) for _ in range(writers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.perf_counter() - began), taken


def measure(options: argparse.Namespace, directory: Path) -> Report:
    report = Report("journal")
    disk = synced_writes(directory / "probe", options.repeats * 10)
    report.add(
        "the disk: 4 KiB with fdatasync, p50 / p99 ms",
        f"{median(disk) * 1000:.2f} / {percentile(disk, 0.99) * 1000:.2f}",
        disk_ms=median(disk) * 1000,
    )
    commits: list[float] = []
    database = Database(directory / "journal.sqlite", [SCHEMA], on_commit=commits.append)
    try:
        cost = step_cost(database, options.steps, options.repeats)
        step = median(cost) * 1000
        report.add(f"a step (begin and end recorded), p50 ms of {options.repeats} operations of {options.steps} steps",
                   f"{step:.2f}", f"<= {STEP_GOAL_MS:.0f} ms", step <= STEP_GOAL_MS, step_ms=step)  # fmt: skip
        report.add("the same, the slowest operation's mean, ms", f"{max(cost) * 1000:.2f}")
        for writers in WRITERS:
            commits.clear()
            rate, taken = together(database, writers, options.seconds)
            shared = len(taken) / len(commits)
            report.add(
                f"{writers:2d} writers",
                f"{rate:6.0f} transactions/s, {shared:5.1f} a commit, p50 {median(taken) * 1000:5.2f} ms, "
                f"p99 {percentile(taken, 0.99) * 1000:5.2f} ms",
                **{f"writers_{writers}": {"rate": rate, "shared": shared, "p50_ms": median(taken) * 1000}},
            )
    finally:
        database.close()
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", steps=8, repeats=30, seconds=5.0).parse_args(argv)
    with workspace() as directory:
        return finish(measure(options, directory), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
