"""Nothing accepted is lost and nothing happens twice: casts to a real worker process that is killed again and again.

Each instance goes through the same life, one cast after the other, each sent when the last notification of the one
before has come: build, stop, start, reboot, pause, unpause, suspend, resume, stop, terminate. Meanwhile the worker is
killed with SIGKILL at random moments, some of them while it is still starting, and started again at once. Judged at the
end from outside the worker: its journal, what the simulated host counted (boots, shutdowns, ... of every guest), what
is left on the host, and the notifications.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import (
    HOST,
    Report,
    WorkerProcess,
    add_queue,
    arguments,
    broker,
    finish,
    median,
    percentile,
    run,
    tiny_instance,
    workspace,
)
from notifications import Listener, is_final

from compute_worker.objects import Instance
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from compute_worker.virt.simulated.host import SimulatedHost
from tests.waiting import wait_for

LIFE = (
    "build_and_run_instance", "stop_instance", "start_instance", "reboot_instance", "pause_instance",
    "unpause_instance", "suspend_instance", "resume_instance", "stop_instance", "terminate_instance",
)  # fmt: skip
EFFECTS: Mapping[str, Mapping[str, int]] = {
    "build_and_run_instance": {"plug": 1, "define": 1, "boot": 1, "unpause": 1},
    "stop_instance": {"shutdown": 1},
    "start_instance": {"boot": 1},
    "reboot_instance": {"shutdown": 1, "boot": 1},
    "pause_instance": {"pause": 1},
    "unpause_instance": {"unpause": 1},
    "suspend_instance": {"suspend": 1},
    "resume_instance": {"restore": 1},
    "terminate_instance": {"undefine": 1, "unplug": 1, "delete": 1},
}
"""What each command does once to a guest in this life, as it can be seen from outside the worker."""
STALLED_SECONDS = 120.0


class Life:
    """One instance and what was cast for it."""

    def __init__(self, number: int, length: int) -> None:
        self.instance: Instance = tiny_instance(number)
        self.commands = LIFE[:length]
        self.operations: list[str] = []
        self.sent_at: list[float] = []

    @property
    def done(self) -> bool:
        """Whether everything was sent."""
        return len(self.operations) == len(self.commands)

    def expected(self) -> Counter[str]:
        """Effects of everything that was sent."""
        total: Counter[str] = Counter()
        for name in self.commands[: len(self.operations)]:
            total.update(EFFECTS[name])
        return total


class Conductor:
    """Sends the casts, ``window`` instances at a time, and hears how they end."""

    def __init__(self, api: ComputeAPI, casts: int, window: int) -> None:
        self._api = api
        self._waiting = [Life(n, min(len(LIFE), casts - n * len(LIFE))) for n in range(-(-casts // len(LIFE)))]
        self.lives: list[Life] = list(self._waiting)
        self._waiting.reverse()
        self._window = window
        self._changed = threading.Condition()
        self._of: dict[str, Life] = {}
        self._ready: list[Life] = []
        self.finals: dict[str, Counter[tuple[str, int]]] = {}
        self.states: dict[str, str] = {}
        self.seconds: list[float] = []
        self.refused: list[Any] = []
        self.ended = 0

    def hear(self, event_type: str, payload: dict[str, Any]) -> None:
        """One notification; the last one of an operation lets the next command of its instance go."""
        operation = payload.get("operation")
        if not is_final(event_type):
            return
        with self._changed:
            if operation is None or operation not in self._of:
                self.refused.append(payload.get("error") or event_type)
                self._changed.notify_all()
                return
            told = self.finals.setdefault(operation, Counter())
            told[event_type, payload["sequence"]] += 1
            if operation in self.states:
                return
            life = self._of[operation]
            self.states[operation] = payload["state"]
            self.seconds.append(time.monotonic() - life.sent_at[-1])
            self.ended += 1
            self._ready.append(life)
            self._changed.notify_all()

    def run(self, listener: Listener) -> None:
        """Send everything and wait until all of it has ended.

        :raises AssertionError: nothing ended for two minutes: something was lost; or nothing can be heard.
        """
        active = 0
        while True:
            with self._changed:
                if self._waiting and active < self._window:
                    life, active = self._waiting.pop(), active + 1
                else:
                    if not active:
                        return
                    if not self._changed.wait_for(lambda: self._ready or self.refused, STALLED_SECONDS):
                        why = listener.problem or self._open()
                        raise AssertionError(f"no operation ended for {STALLED_SECONDS:g} s: {why}")
                    if self.refused:
                        raise AssertionError(f"refused: {self.refused[:3]}")
                    life = self._ready.pop()
            if life.done:
                active -= 1
            else:
                self._send(life)

    def _send(self, life: Life) -> None:
        name, operation = life.commands[len(life.operations)], str(uuid.uuid4())
        what = life.instance if name == "build_and_run_instance" else life.instance.uuid
        with self._changed:
            self._of[operation] = life
            life.operations.append(operation)
            life.sent_at.append(time.monotonic())
        getattr(self._api, name)(what, host=HOST, cast=True, operation=operation)

    def _open(self) -> list[str]:
        return [operation for operation in self._of if operation not in self.states][:3]


class Killer:
    """Kills the worker at random moments, ``kills`` times over the run, and starts it again each time."""

    def __init__(self, process: WorkerProcess, conductor: Conductor, kills: int, casts: int, seed: int) -> None:
        self._process = process
        self._conductor = conductor
        self._random = random.Random(seed)
        self._moments = sorted(self._random.randint(1, max(1, int(casts * 0.97))) for _ in range(kills))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)
        self.killed = 0
        self.while_starting = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; the worker runs then."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for number, moment in enumerate(self._moments):
            early = number % 5 == 4
            if early:
                self._stop.wait(self._random.uniform(0.0, 1.2))
            else:
                while self._conductor.ended < moment and not self._stop.wait(0.01):
                    continue
                self._stop.wait(self._random.uniform(0.0, 0.3))
            if self._stop.is_set():
                return
            self._process.kill()
            self._process.start()
            self.killed += 1
            self.while_starting += early


# --- judged from outside --------------------------------------------------------------------------------------------


def judge_journal(path: Path, lives: Sequence[Life]) -> list[str]:
    """What the journal says of every cast: there once, done, nothing open, nothing left in the inbox."""
    wrong = []
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
        rows = Counter(dict(journal.execute("SELECT uuid, count(*) FROM operations GROUP BY uuid")))
        states = dict(journal.execute("SELECT uuid, state FROM operations"))
        left = {t: journal.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("inbox", "outbox")}
    for life in lives:
        for operation in life.operations:
            if rows[operation] != 1:
                wrong.append(f"operation {operation} is in the journal {rows[operation]} times")
            elif states[operation] != "done":
                wrong.append(f"operation {operation} ended {states[operation]}")
    return wrong + [f"{count} rows are left in the {table}" for table, count in left.items() if count]


def judge_effects(directory: Path, lives: Sequence[Life]) -> tuple[int, int, list[str]]:
    """Effects that are missing, effects that are too many, and what of the guests is left on the host."""
    host = SimulatedHost(HOST, directory=directory)
    try:
        missing = twice = 0
        wrong = []
        for life in lives:
            expected = life.expected()
            for effect in sorted({name for effects in EFFECTS.values() for name in effects} | {"kill"}):
                seen = host.effects[life.instance.uuid, effect]
                missing += max(0, expected[effect] - seen)
                twice += max(0, seen - expected[effect])
                if seen != expected[effect]:
                    wrong.append(f"{life.instance.uuid}: {effect} was seen {seen} times, {expected[effect]} expected")
        gone = {life.instance.uuid for life in lives if life.commands[len(life.operations) - 1] == LIFE[-1]}
        wrong += [f"left over: {item}" for item in host.leftovers() if item.uuid in gone]
        return missing, twice, wrong
    finally:
        host.close()


def judge_notifications(conductor: Conductor) -> list[str]:
    """One last notification for every cast; it may have come more than once, with the same sequence."""
    wrong = []
    for life in conductor.lives:
        for operation in life.operations:
            if len(told := conductor.finals.get(operation, Counter())) != 1:
                wrong.append(f"operation {operation} was told to have ended {len(told)} times: {list(told)}")
    return wrong


def measure(options: argparse.Namespace, directory: Path) -> tuple[Report, bool]:
    report = Report("casts under SIGKILL")
    with broker(directory) as rabbit:
        process = WorkerProcess(directory / "worker", rabbit.url(), options.queue == "quorum")
        transport = get_transport(rabbit.url())
        conductor = Conductor(ComputeAPI(transport), options.casts, options.window)
        listener = Listener(rabbit.url(scheme="amqp"), conductor.hear, options.queue == "quorum")
        killer = Killer(process, conductor, options.kills, options.casts, options.seed)
        try:
            process.start()
            process.wait_healthy()
            listener.start()
            began = time.monotonic()
            killer.start()
            conductor.run(listener)
            elapsed = time.monotonic() - began
            killer.stop()
            process.wait_healthy()
            wait_for(lambda: _outbox_empty(process), 30, "the outbox to be sent")
        finally:
            killer.stop()
            process.close()
            listener.stop()
            transport.cleanup()
        wrong = judge_journal(process.state / "journal.sqlite", conductor.lives) + judge_notifications(conductor)
        missing, twice, odd = judge_effects(process.state / "simulated" / HOST, conductor.lives)
        _tell(report, options, conductor, killer, elapsed, (missing, twice, wrong + odd))
        if listener.problem:
            wrong.append(f"a notification could not be read: {listener.problem}")
        return report, bool(missing or twice or wrong or odd)


def _outbox_empty(process: WorkerProcess) -> bool:
    with sqlite3.connect(f"file:{process.state / 'journal.sqlite'}?mode=ro", uri=True) as journal:
        return not journal.execute("SELECT count(*) FROM outbox").fetchone()[0]


def _tell(
    report: Report, options: argparse.Namespace, conductor: Conductor, killer: Killer, elapsed: float,
    verdict: tuple[int, int, list[str]],
) -> None:  # fmt: skip
    missing, twice, wrong = verdict
    sent = sum(len(life.operations) for life in conductor.lives)
    lost = sent - sum(1 for state in conductor.states.values() if state == "done")
    repeated = sum(sum(told.values()) - len(told) for told in conductor.finals.values())
    report.add("casts sent, SIGKILLs (of these while starting)",
               f"{sent}, {killer.killed} ({killer.while_starting})", casts=sent, kills=killer.killed)  # fmt: skip
    report.add("casts lost", str(lost), "0", lost == 0, lost=lost)
    report.add("effects missing", str(missing), "0", missing == 0, effects_missing=missing)
    report.add("effects twice", str(twice), "0", twice == 0, effects_twice=twice)
    report.add("anything else wrong from outside", str(len(wrong)), "0", not wrong, wrong=wrong[:20])
    report.add("last notifications that came again (same sequence)", str(repeated), repeated=repeated)
    report.add("wall clock, casts done a second", f"{elapsed:.0f} s, {sent / elapsed:.1f}/s",
               seconds=elapsed, rate=sent / elapsed)  # fmt: skip
    p50, p99, longest = (percentile(conductor.seconds, share) for share in (0.5, 0.99, 1.0))
    report.add("cast to last notification, p50 / p99 / longest s", f"{p50:.2f} / {p99:.2f} / {longest:.2f}",
               p50_s=median(conductor.seconds), p99_s=p99, longest_s=longest)  # fmt: skip
    for item in wrong[:10]:
        report.add("wrong", item, good=False)
    report.figures["seed"] = options.seed


def main(argv: Sequence[str]) -> int:
    """Exit status 1 when anything was lost, happened twice, or is not as it must be."""
    parser = arguments(__doc__ or "", casts=10_000, kills=100, window=200, seed=1)
    add_queue(parser)
    options = parser.parse_args(argv)
    with workspace() as directory:
        report, failed = measure(options, directory)
        return finish(report, options.json, failed)


if __name__ == "__main__":
    raise SystemExit(run(main))
