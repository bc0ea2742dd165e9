"""Start-up time of a worker, to READY=1 and to a healthy answer, and its memory and threads, at rest and after work."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common import (
    HOST,
    Report,
    WorkerProcess,
    arguments,
    broker,
    cpu_seconds,
    finish,
    median,
    pause,
    rss_mib,
    run,
    threads,
    tiny_instance,
    workspace,
)

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.waiting import wait_for

READY_GOAL = 1.2
RSS_GOAL = 80.0


def start_once(process: WorkerProcess) -> tuple[float, float, float]:
    """Seconds to READY=1, to a healthy answer, and of processor time until then."""
    began = time.perf_counter()
    process.start()
    process.readiness.wait()
    ready = time.perf_counter() - began
    while not process.healthy():
        pause(0.005)
    return ready, time.perf_counter() - began, cpu_seconds(process.pid)


def work(url: str, operations: int) -> None:
    """Boots and deletes, one wave after the other, until ``operations`` have ended."""
    transport = get_transport(url)
    api = ComputeAPI(transport)
    try:
        left = operations
        while left > 0:
            wave = [tiny_instance(n) for n in range(min(25, max(1, left // 2)))]
            for instance in wave:
                api.build_and_run_instance(instance, host=HOST)
            wait_for(lambda: not api.list_operations(open_only=True, host=HOST), 120, "the builds to end")
            for instance in wave:
                api.terminate_instance(instance.uuid, host=HOST)
            wait_for(lambda: not api.list_operations(open_only=True, host=HOST), 120, "the deletes to end")
            left -= 2 * len(wave)
    finally:
        transport.cleanup()


def measure(options: argparse.Namespace, directory: Path) -> Report:
    report = Report("start-up and size")
    with broker(directory) as rabbit:
        process = WorkerProcess(directory / "worker", rabbit.url())
        try:
            times = []
            for _ in range(options.starts):
                times.append(start_once(process))
                process.stop()
            ready, healthy, cpu = (median([t[i] for t in times]) for i in range(3))
            report.add("start to READY=1, median s", f"{ready:.2f}", ready_s=ready)
            report.add(
                "start to healthy (broker connected), median s", f"{healthy:.2f}", f"<= {READY_GOAL}",
                healthy <= READY_GOAL, healthy_s=healthy, best_s=min(t[1] for t in times),
            )  # fmt: skip
            report.add("processor time until then, median s", f"{cpu:.2f}", start_cpu_s=cpu)
            start_once(process)
            at_rest(process, report, options.rest)
            work(rabbit.url(), options.operations)
            size = rss_mib(process.pid)
            report.add(
                f"RSS after {options.operations} operations, MiB", f"{size:.0f}", f"<= {RSS_GOAL:.0f}",
                size <= RSS_GOAL, rss_after_mib=size,
            )  # fmt: skip
            count = threads(process.pid)
            report.add(f"threads after {options.operations} operations", str(count), threads_after=count)
        finally:
            process.close()
    return report


def at_rest(process: WorkerProcess, report: Report, seconds: float) -> None:
    before = cpu_seconds(process.pid)
    pause(seconds)
    idle = (cpu_seconds(process.pid) - before) / seconds
    size, count = rss_mib(process.pid), threads(process.pid)
    report.add("RSS at rest, MiB", f"{size:.0f}", f"<= {RSS_GOAL:.0f}", size <= RSS_GOAL, rss_rest_mib=size)
    report.add("threads at rest", str(count), threads_rest=count)
    report.add(f"processor at rest over {seconds:g} s, cores", f"{idle:.4f}", idle_cores=idle)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", starts=5, operations=1000, rest=20.0).parse_args(argv)
    with workspace() as directory:
        return finish(measure(options, directory), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
