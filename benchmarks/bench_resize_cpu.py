"""Processor time that a resize between two hosts costs the workers of both, on the fake driver, one at a time and many
at once: from ``prep_resize`` to RESIZED recorded by both hosts, and the confirmation after it.

Measured twice: in one process with the broker in memory (client, broker and both workers count), and over RabbitMQ
(both workers in one process, the client in another; the workers' process counts).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from common import (
    REPOSITORY,
    Report,
    arguments,
    broker,
    cpu_seconds,
    finish,
    median,
    pause,
    percentile,
    run,
    tiny_instance,
    workspace,
)
from moves import Moved, ask, confirm, ended, resize
from two_hosts import HOSTS, cell

from compute_worker.objects import Flavor, Instance, Migration
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.waiting import wait_for

GOAL, STRETCH = 60.0, 30.0
SOURCE, DESTINATION = HOSTS
IDLE_SECONDS = 1.0
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """Two hosts to be measured: how to ask them, and the seconds of processor time that they have used so far."""

    name: str
    api: ComputeAPI
    used: Callable[[], float]
    broker_used: Callable[[], float] | None = None


@contextmanager
def in_memory(directory: Path) -> Iterator[Cell]:
    """Everything in this process."""
    with cell(directory / "embedded") as made:
        yield Cell("memory", made.api, time.process_time)


@contextmanager
def over_rabbitmq(directory: Path) -> Iterator[Cell]:
    """Both workers in a process of their own."""
    with broker(directory) as rabbit:
        url = rabbit.url(vhost="classic")
        argv = [sys.executable, str(Path(__file__).with_name("two_hosts.py")), url, str(directory / "hosts")]
        with open(directory / "hosts.log", "wb") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY
            )
        assert process.stdin is not None and process.stdout is not None
        try:
            said = process.stdout.readline().split()
            if said[:1] != ["listening"]:
                raise AssertionError(f"the workers have ended: {(directory / 'hosts.log').read_text()}")
            transport = get_transport(url, exchange=said[1])
            found = rabbit.process()
            assert found is not None
            beam = found.pid
            try:
                api = ComputeAPI(transport, exchange=said[1], timeout=60)
                yield Cell("rabbitmq", api, lambda: cpu_seconds(process.pid), lambda: cpu_seconds(beam))
            finally:
                transport.cleanup()
        finally:
            process.stdin.close()
            process.wait(40)


def settled(api: ComputeAPI) -> None:
    """Until no move is open on either host."""
    for host in HOSTS:
        wait_for(lambda name=host: not api.list_operations(open_only=True, host=name), 30, f"{host} to be at rest")
    # What is published after an operation's end waits up to 30 ms for company.
    pause(0.3)


class Bench:
    """Boots, resizes and confirms; every figure is processor time in ms for one instance."""

    def __init__(self, made: Cell, report: Report) -> None:
        self._cell = made
        self._api = made.api
        self._report = report
        self._number = 0

    def boot(self, count: int, host: str = SOURCE) -> list[Instance]:
        """Instances that run on a host."""
        asked = []
        for _ in range(count):
            self._number += 1
            instance = tiny_instance(self._number)
            asked.append((instance.uuid, str(self._api.build_and_run_instance(instance, host=host).operation)))
        for _, operation in asked:
            ended(self._api, operation, host)
        settled(self._api)
        return [self._api.get_instance(uuid, host=host) for uuid, _ in asked]

    def idle(self) -> float:
        """Seconds of processor time a second at rest: the broker in memory is polled."""
        before = self._cell.used()
        pause(IDLE_SECONDS)
        return (self._cell.used() - before) / IDLE_SECONDS

    def one_at_a_time(self, count: int) -> None:
        """A resize, then the next; then a confirmation after the other."""
        idle = self.idle()
        instances, booted, _, _ = self._measured(lambda: self.boot(count), count)
        seconds: list[float] = []

        def each() -> list[Moved]:
            moved = []
            for instance in instances:
                began = time.perf_counter()
                moved.append(resize(self._api, instance, SOURCE, DESTINATION, larger(instance)))
                seconds.append(time.perf_counter() - began)
            return moved

        moved, resized, broker_resized, took = self._measured(each, count)
        _, confirmed, broker_confirmed, confirming = self._measured(
            lambda: [confirm(self._api, one.migration) for one in moved], count
        )
        name, add = self._cell.name, self._report.add
        p50, p99 = median(seconds) * 1000, percentile(seconds, 0.99) * 1000
        add(
            f"{name}: resize, ms of both hosts ({count}, one at a time)", f"{resized:.1f}",
            f"<= {GOAL:.0f}, stretch {STRETCH:.0f}", resized <= GOAL,
            **{f"{name}_resize_cpu_ms": resized, f"{name}_stretch": resized <= STRETCH},
        )  # fmt: skip
        add(f"{name}: confirmation, ms of both hosts", f"{confirmed:.1f}", **{f"{name}_confirm_cpu_ms": confirmed})
        add(f"{name}: a boot in the same run, all at once, ms", f"{booted:.1f}", **{f"{name}_boot_cpu_ms": booted})
        idle_ms = [idle * elapsed * 1000 / count for elapsed in (took, confirming)]
        add(
            f"{name}: of these by being there at all, resize / confirmation, ms",
            f"{idle_ms[0]:.1f} / {idle_ms[1]:.1f}", **{f"{name}_idle_cores": idle},
        )  # fmt: skip
        if self._cell.broker_used is not None:
            add(
                f"{name}: broker, resize / confirmation, ms", f"{broker_resized:.1f} / {broker_confirmed:.1f}",
                **{f"{name}_broker_ms": broker_resized, f"{name}_broker_confirm_ms": broker_confirmed},
            )  # fmt: skip
        add(
            f"{name}: prep_resize to RESIZED at both, p50 / p99 ms", f"{p50:.0f} / {p99:.0f}",
            **{f"{name}_resize_p50_ms": p50, f"{name}_resize_p99_ms": p99},
        )  # fmt: skip

    def at_once(self, count: int) -> None:
        """Half of them each way, all asked for before the first has ended; then all confirmed."""
        ways = [(SOURCE, DESTINATION, one) for one in self.boot(count - count // 2)]
        ways += [(DESTINATION, SOURCE, one) for one in self.boot(count // 2, DESTINATION)]

        def all_of_them() -> list[Migration]:
            asked = [ask(self._api, one, here, there, larger(one)) for here, there, one in ways]
            for migration, operation in asked:
                ended(self._api, operation, migration.dest_host)
                ended(self._api, operation, migration.source_host)
            return [migration for migration, _ in asked]

        began = time.perf_counter()
        moved, resized, _, took = self._measured(all_of_them, count)
        for migration in moved:
            confirm(self._api, migration)
        settled(self._api)
        confirmed = time.perf_counter() - began
        for _, there, one in ways:
            found = self._api.get_instance(one.uuid, host=there)
            assert (found.host, found.vm_state) == (there, "active"), f"{found} should be active at {there}"
        name = self._cell.name
        self._report.add(
            f"{name}: {count} asked for at once, half each way: all RESIZED after s / a second / ms each",
            f"{took:.2f} / {count / took:.1f} / {resized:.1f}",
            **{f"{name}_at_once_s": took, f"{name}_at_once_cpu_ms": resized},
        )
        self._report.add(
            f"{name}: the same, all confirmed after s", f"{confirmed:.2f}", **{f"{name}_at_once_confirmed_s": confirmed}
        )

    def _measured(self, work: Callable[[], list[T]], count: int) -> tuple[list[T], float, float, float]:
        """What it returned; ms of the hosts and of the broker for one of ``count``; seconds until it returned."""
        broker_used = self._cell.broker_used or (lambda: 0.0)
        before, broker_before, began = self._cell.used(), broker_used(), time.perf_counter()
        done = work()
        took = time.perf_counter() - began
        settled(self._api)
        used, by_broker = self._cell.used() - before, broker_used() - broker_before
        return done, used * 1000 / count, by_broker * 1000 / count, took


def larger(instance: Instance) -> Flavor:
    """Twice the memory and another GiB."""
    before = instance.flavor
    return msgspec.structs.replace(before, memory_mb=2 * before.memory_mb, root_gb=before.root_gb + 1)


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """Every part, on each broker that is there."""
    report = Report("resize on the fake driver")
    places = [in_memory, over_rabbitmq] if options.broker == "all" else [in_memory]
    for place in places:
        with place(directory) as made:
            bench = Bench(made, report)
            for instance in bench.boot(options.warm):
                confirm(made.api, resize(made.api, instance, SOURCE, DESTINATION, larger(instance)).migration)
            bench.one_at_a_time(options.resizes)
            bench.at_once(options.at_once)
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    parser = arguments(__doc__ or "", resizes=50, warm=5, at_once=20)
    parser.add_argument("--broker", choices=("all", "memory"), default="all", help="(%(default)s)")
    options = parser.parse_args(argv)
    with workspace() as directory:
        return finish(measure(options, directory), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
