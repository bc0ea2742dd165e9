"""Processor time that a live migration between two hosts costs the workers of both, on the fake driver, one at a time
and many at once: from ``live_migration`` until both hosts have recorded where the guest is. Its flight takes no time
here, so that the workers' own work is what is measured.

Measured twice, as :mod:`bench_resize_cpu` does: in one process with the broker in memory, and over RabbitMQ.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from bench_resize_cpu import DESTINATION, SOURCE, Bench, in_memory, over_rabbitmq, settled
from common import Report, arguments, finish, median, percentile, run, workspace
from moves import ended

from compute_worker.objects import Instance, Migration


class LiveBench(Bench):
    """Boots and moves; every figure is processor time in ms for one instance."""

    def move(self, instance: Instance, source: str, destination: str) -> str:
        """Ask for it: the operation."""
        migration = Migration(
            uuid=str(uuid.uuid4()), instance=instance.uuid, migration_type="live-migration", source_host=source,
            dest_host=destination,
        )  # fmt: skip
        return str(self._api.live_migration(instance.uuid, migration, host=source).operation)

    def until_there(self, operation: str, source: str, destination: str) -> None:
        """Until both have recorded it."""
        ended(self._api, operation, source)
        ended(self._api, operation, destination)

    def there(self, count: int) -> None:
        """One, then the next."""
        idle = self.idle()
        instances = self.boot(count)
        seconds: list[float] = []

        def each() -> list[str]:
            for instance in instances:
                began = time.perf_counter()
                operation = self.move(instance, SOURCE, DESTINATION)
                self.until_there(operation, SOURCE, DESTINATION)
                seconds.append(time.perf_counter() - began)
            return []

        _, moved, by_broker, took = self._measured(each, count)
        name, add = self._cell.name, self._report.add
        p50, p99 = median(seconds) * 1000, percentile(seconds, 0.99) * 1000
        add(
            f"{name}: live migration, ms of both hosts ({count}, one at a time)", f"{moved:.1f}",
            **{f"{name}_live_cpu_ms": moved},
        )  # fmt: skip
        add(
            f"{name}: of it by being there at all, ms", f"{idle * took * 1000 / count:.1f}",
            **{f"{name}_live_idle_cores": idle},
        )  # fmt: skip
        if self._cell.broker_used is not None:
            add(f"{name}: broker, ms", f"{by_broker:.1f}", **{f"{name}_live_broker_ms": by_broker})
        add(
            f"{name}: live_migration to recorded at both, p50 / p99 ms", f"{p50:.0f} / {p99:.0f}",
            **{f"{name}_live_p50_ms": p50, f"{name}_live_p99_ms": p99},
        )  # fmt: skip

    def all_at_once(self, count: int) -> None:
        """Half of them each way, all asked for before the first has ended."""
        ways = [(SOURCE, DESTINATION, one) for one in self.boot(count - count // 2)]
        ways += [(DESTINATION, SOURCE, one) for one in self.boot(count // 2, DESTINATION)]

        def all_of_them() -> list[str]:
            asked = [(self.move(one, here, there), here, there) for here, there, one in ways]
            for operation, here, there in asked:
                self.until_there(operation, here, there)
            return []

        _, moved, _, took = self._measured(all_of_them, count)
        for _, there, one in ways:
            found = self._api.get_instance(one.uuid, host=there)
            assert (found.host, found.vm_state) == (there, "active"), f"{found} should be active at {there}"
        name = self._cell.name
        self._report.add(
            f"{name}: {count} asked for at once, half each way: all there after s / a second / ms each",
            f"{took:.2f} / {count / took:.1f} / {moved:.1f}",
            **{f"{name}_live_at_once_s": took, f"{name}_live_at_once_cpu_ms": moved},
        )


def measure(options: argparse.Namespace, directory: Path) -> Report:
    """Every part, on each broker that is there."""
    report = Report("live migration on the fake driver")
    places = [in_memory, over_rabbitmq] if options.broker == "all" else [in_memory]
    for place in places:
        with place(directory) as made:
            bench = LiveBench(made, report)
            for instance in bench.boot(options.warm):
                operation = bench.move(instance, SOURCE, DESTINATION)
                bench.until_there(operation, SOURCE, DESTINATION)
            settled(made.api)
            bench.there(options.moves)
            bench.all_at_once(options.at_once)
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    parser = arguments(__doc__ or "", moves=50, warm=5, at_once=20)
    parser.add_argument("--broker", choices=("all", "memory"), default="all", help="(%(default)s)")
    options = parser.parse_args(argv)
    with workspace() as directory:
        return finish(measure(options, directory), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
