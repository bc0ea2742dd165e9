"""How long a worker takes to accept a command, against a bare oslo.messaging server that only echoes, side by side.

The command is a whole ``build_and_run_instance``: decoded, checked, claimed, written with its operation and its first
notification in one commit that is on disk before the answer goes. The first boot waits for a plug event that never
comes, and one boot runs at a time: what is measured is accepting, and nothing of what comes after it.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import echo_server
import oslo_messaging
from common import (
    HOST,
    REPOSITORY,
    Report,
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

from compute_worker import objects
from compute_worker.objects import Vif
from compute_worker.rpc.client import ComputeAPI
from tests.waiting import wait_for

EXTRA_GOAL_MS = 3.0
RATE_GOAL = 0.7
IN_FLIGHT = "1,8,64"
Call = Callable[[dict[str, Any]], Any]


@contextmanager
def echo(directory: Path, url: str, quorum: bool) -> Iterator[subprocess.Popen[bytes]]:
    """The echo server as a process of its own, listening."""
    argv = [sys.executable, echo_server.__file__, url, "quorum" if quorum else "classic"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with open(directory / "echo.log", "ab") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=environment)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert b"listening" in said, f"the echo server has ended (see {directory}/echo.log)"
        yield process
    finally:
        process.kill()
        process.wait()


def command() -> dict[str, Any]:
    """The arguments of one build, as they travel."""
    vif = Vif(id=str(uuid.uuid4()), mac="52:54:00:00:00:01", bridge="br0", wait_for_plug=True)
    return {
        "instance": objects.encode(tiny_instance(vifs=[vif])),
        "injected_files": [],
        "admin_password": None,
        "operation": str(uuid.uuid4()),
        "expires_at": time.time() + 3600,
        "check_only": False,
    }


def caller(transport: Any, exchange: str, topic: str, server: str) -> Call:
    """Sends ``build_and_run_instance`` with the same bare client to either server."""
    target = oslo_messaging.Target(exchange=exchange, topic=topic, server=server, version="1.0")
    client = oslo_messaging.get_rpc_client(transport, target, timeout=60)
    return lambda arguments: client.call({"request_id": "req-bench"}, "build_and_run_instance", **arguments)


def drive(call: Call, commands: Sequence[dict[str, Any]], in_flight: int) -> tuple[list[float], float]:
    """Send ``commands`` from ``in_flight`` threads; seconds of each, and of all together."""
    work: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for item in commands:
        work.put(item)
    seconds: list[float] = []
    problems: list[Exception] = []

    def client() -> None:
        while True:
            try:
                arguments = work.get_nowait()
            except queue.Empty:
                return
            began = time.perf_counter()
            try:
                call(arguments)
            except Exception as exc:
                problems.append(exc)
                return
            seconds.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client) for _ in range(in_flight)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return seconds, time.perf_counter() - began


def clear(api: ComputeAPI, uuids: Sequence[str]) -> None:
    """Delete what a round has built, so that the host never has more instances than a host has."""
    for uuid_ in uuids:
        api.terminate_instance(uuid_, host=HOST, cast=True)
    wait_for(lambda: not api.list_operations(open_only=True, host=HOST), 300, "the deletes to end")


class Side:
    """One of the two servers, and what was measured of it by calls in flight.

    :param clear: called after each round with the uuids that were sent.
    """

    def __init__(self, name: str, call: Call, pid: int, clear: Callable[[list[str]], None]) -> None:
        self.name, self.call, self.pid, self.clear = name, call, pid, clear
        self.seconds: dict[int, list[float]] = {}
        self.rates: dict[int, list[float]] = {}
        self.cpu: dict[int, list[float]] = {}

    def round(self, count: int, in_flight: int) -> None:
        """``count`` calls more, against a server at rest."""
        wait_until_quiet(self.pid)
        commands = [command() for _ in range(count)]
        before = cpu_seconds(self.pid)
        seconds, elapsed = drive(self.call, commands, in_flight)
        self.seconds.setdefault(in_flight, []).extend(seconds)
        self.rates.setdefault(in_flight, []).append(count / elapsed)
        self.cpu.setdefault(in_flight, []).append((cpu_seconds(self.pid) - before) * 1000 / count)
        self.clear([item["instance"]["uuid"] for item in commands])

    def figures(self, in_flight: int) -> dict[str, float]:
        """p50 and p99 in ms over all rounds; rate and server CPU as the median round's."""
        seconds = self.seconds[in_flight]
        return {
            "p50": median(seconds) * 1000,
            "p99": percentile(seconds, 0.99) * 1000,
            "rate": median(self.rates[in_flight]),
            "cpu": median(self.cpu[in_flight]),
        }


def compare(report: Report, kind: str, bare: Side, accept: Side, in_flight: int) -> None:
    """Three rows: the echo, the accept, and how they stand to each other."""
    one, other = bare.figures(in_flight), accept.figures(in_flight)
    for side, figures in ((bare, one), (accept, other)):
        report.add(
            f"{kind}, {in_flight:2d} in flight, {side.name}",
            "p50 {p50:6.1f} ms, p99 {p99:6.1f} ms, {rate:4.0f}/s, server CPU {cpu:.1f} ms".format(**figures),
            **{f"{kind}_{in_flight}_{side.name}": figures},
        )
    extra, share = other["p50"] - one["p50"], other["rate"] / one["rate"]
    if in_flight == 1:
        report.add(f"{kind}, {in_flight:2d} in flight, p50 over the echo's", f"{extra:+.1f} ms",
                   f"<= +{EXTRA_GOAL_MS:.0f} ms", extra <= EXTRA_GOAL_MS)  # fmt: skip
    report.add(f"{kind}, {in_flight:2d} in flight, rate to the echo's", f"{share:.2f}",
               f">= {RATE_GOAL}", share >= RATE_GOAL)  # fmt: skip


def measure(options: argparse.Namespace, directory: Path, url: str, quorum: bool, report: Report) -> None:
    kind = "quorum" if quorum else "classic"
    directory.mkdir()
    conf = echo_server.configuration(quorum)
    waiting = {"max_concurrent_builds": 1, "max_queued_operations": 1_000_000, "vif_plugging_timeout": 86_400}
    with (
        echo(directory, url, quorum) as bare_process,
        worker(directory, url, quorum, compute=waiting) as process,
    ):
        transport = oslo_messaging.get_rpc_transport(conf, url=url)
        try:
            api = ComputeAPI(transport, timeout=120)
            to_echo = caller(transport, echo_server.EXCHANGE, echo_server.TOPIC, echo_server.SERVER)
            bare = Side("echo", to_echo, bare_process.pid, lambda uuids: None)
            to_worker = caller(transport, "compute_worker", "compute", HOST)
            accept = Side("accept", to_worker, process.pid, lambda uuids: clear(api, uuids))
            for side in (bare, accept):
                side.round(max(1, options.calls // 10), 1)
                side.seconds.clear(), side.rates.clear(), side.cpu.clear()
            for in_flight in map(int, options.in_flight.split(",")):
                for _ in range(options.rounds):
                    for side in (bare, accept):
                        side.round(options.calls, in_flight)
                compare(report, kind, bare, accept, in_flight)
        finally:
            transport.cleanup()


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    parser = arguments(__doc__ or "", calls=300, rounds=5, in_flight=IN_FLIGHT)
    parser.add_argument("--queue", choices=("classic", "quorum", "both"), default="both", help="(%(default)s)")
    options = parser.parse_args(argv)
    report = Report("accept")
    with workspace() as directory, broker(directory) as rabbit:
        for kind in ("classic", "quorum"):
            if options.queue not in (kind, "both"):
                continue
            measure(options, directory / kind, rabbit.url(vhost=kind), kind == "quorum", report)
    return finish(report, options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
