"""Processor time of the worker process for one boot on the fake driver, over real RabbitMQ, notifications included."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    HOST,
    CannotRun,
    Report,
    WorkerProcess,
    add_queue,
    arguments,
    broker,
    cpu_seconds,
    finish,
    median,
    percentile,
    run,
    tiny_instance,
    wait_until_quiet,
    worker,
    workspace,
)
from notifications import Listener, is_final

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport

GOAL, STRETCH = 28.0, 14.0


class Ends:
    """Waits for the last notification of an operation."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.final: dict[str, str] = {}
        self.count = 0

    def note(self, event_type: str, payload: dict[str, Any]) -> None:
        with self._changed:
            self.count += 1
            if is_final(event_type) and payload.get("operation"):
                self.final[payload["operation"]] = payload["state"]
                self._changed.notify_all()

    def wait(self, operation: str, timeout: float = 30.0) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: operation in self.final, timeout):
                raise AssertionError(f"no last notification of operation {operation} came in {timeout} s")
            return self.final[operation]


def one_at_a_time(api: ComputeAPI, ends: Ends, count: int) -> tuple[list[float], list[str]]:
    """Boot ``count`` instances; seconds of each from the call to its last notification, and their uuids."""
    seconds, uuids = [], []
    for number in range(count):
        instance = tiny_instance(number)
        began = time.perf_counter()
        accepted = api.build_and_run_instance(instance, host=HOST)
        if (state := ends.wait(str(accepted.operation))) != "done":
            raise AssertionError(f"boot {number} ended {state}")
        seconds.append(time.perf_counter() - began)
        uuids.append(instance.uuid)
    return seconds, uuids


def all_at_once(api: ComputeAPI, ends: Ends, count: int) -> list[str]:
    """Cast ``count`` boots and wait until all have ended; their uuids."""
    instances = [tiny_instance(number) for number in range(count)]
    operations = [str(api.build_and_run_instance(i, host=HOST, cast=True).operation) for i in instances]
    states = {ends.wait(operation, 120) for operation in operations}
    if states != {"done"}:
        raise AssertionError(f"boots ended {states}")
    return [instance.uuid for instance in instances]


def delete(api: ComputeAPI, ends: Ends, uuids: Sequence[str]) -> None:
    for operation in [str(api.terminate_instance(uuid, host=HOST).operation) for uuid in uuids]:
        ends.wait(operation, 60)


def measure(options: argparse.Namespace, directory: Path) -> Report:
    report = Report("processor time of a boot")
    with broker(directory) as rabbit, worker(directory / "worker", rabbit.url(), options.queue == "quorum") as process:
        broker_process = rabbit.process()
        if broker_process is None:
            raise CannotRun("RabbitMQ has ended")
        ends = Ends()
        listener = Listener(rabbit.url(scheme="amqp"), ends.note, options.queue == "quorum")
        listener.start()
        transport = get_transport(rabbit.url())
        api = ComputeAPI(transport)
        try:
            _, uuids = one_at_a_time(api, ends, options.warm)
            delete(api, ends, uuids)
            wait_until_quiet(process.pid)
            before, rabbit_before, heard = cpu_seconds(process.pid), cpu_seconds(broker_process.pid), ends.count
            seconds, uuids = one_at_a_time(api, ends, options.boots)
            wait_until_quiet(process.pid)
            each = (cpu_seconds(process.pid) - before) * 1000 / options.boots
            broker_each = (cpu_seconds(broker_process.pid) - rabbit_before) * 1000 / options.boots
            report.add(
                f"one at a time: worker, ms a boot ({options.boots} boots)", f"{each:.1f}",
                f"<= {GOAL:.0f}, stretch {STRETCH:.0f}", each <= GOAL, boot_cpu_ms=each, stretch=each <= STRETCH,
            )  # fmt: skip
            report.add("broker, ms a boot", f"{broker_each:.1f}", broker_cpu_ms=broker_each)
            report.add("notifications a boot", f"{(ends.count - heard) / options.boots:.1f}")
            report.add(
                "call to last notification, p50 / p99 ms",
                f"{median(seconds) * 1000:.0f} / {percentile(seconds, 0.99) * 1000:.0f}",
                boot_p50_ms=median(seconds) * 1000, boot_p99_ms=percentile(seconds, 0.99) * 1000,
            )  # fmt: skip
            delete(api, ends, uuids)
            wait_until_quiet(process.pid)
            together(process, api, ends, options.boots, report)
        finally:
            listener.stop()
            transport.cleanup()
    return report


def together(process: WorkerProcess, api: ComputeAPI, ends: Ends, count: int, report: Report) -> None:
    before, began = cpu_seconds(process.pid), time.perf_counter()
    all_at_once(api, ends, count)
    elapsed = time.perf_counter() - began
    wait_until_quiet(process.pid)
    each = (cpu_seconds(process.pid) - before) * 1000 / count
    report.add("all cast at once: worker, ms a boot", f"{each:.1f}", together_cpu_ms=each)
    report.add("all cast at once: boots a second", f"{count / elapsed:.1f}", boots_per_s=count / elapsed)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    parser = arguments(__doc__ or "", boots=200, warm=20)
    add_queue(parser)
    options = parser.parse_args(argv)
    with workspace() as directory:
        return finish(measure(options, directory), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
