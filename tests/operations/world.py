"""A world outside the journal that operations change, and a worker that can die at any point of it."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from pathlib import Path

from compute_worker import errors
from compute_worker.messages import Context
from compute_worker.operations.database import Database
from compute_worker.operations.executor import Point
from compute_worker.operations.kinds import Commit, Do, Kind
from compute_worker.operations.schema import SCHEMA
from compute_worker.operations.service import Command, Operations
from compute_worker.store import SCHEMA as STORE_SCHEMA

STEPS = ("one", "two", "commit", "three")


class Death(BaseException):
    """The simulated end of the process."""


class Job:
    """Something outside that a step waits for: it ends when it is interrupted, and then the step fails."""

    def __init__(self, interrupt_fails: bool = False) -> None:
        self.begun = threading.Event()
        self._ended = threading.Event()
        self._interrupt_fails = interrupt_fails

    def interrupt(self) -> None:
        self._ended.set()
        if self._interrupt_fails:
            raise errors.HypervisorUnavailable(reason="it is down")

    def wait(self) -> None:
        self.begun.set()
        assert self._ended.wait(30)
        raise errors.GuestFailed(instance="one", reason="its job was aborted")


class World:
    """What outlives the worker: things that exist, how often each was made, what fails."""

    def __init__(self) -> None:
        self.things: set[str] = set()
        self.made: Counter[str] = Counter()
        self.failing: dict[str, list[Exception]] = {}
        self.finished: list[str] = []
        self.block: dict[str, threading.Event] = {}
        self.jobs: dict[str, Job] = {}

    def make(self, name: str) -> None:
        for error in self.failing.get(name, [])[:1]:
            self.failing[name].pop(0)
            self.things.add(f"half-{name}")
            raise error
        self.things.discard(f"half-{name}")
        if name not in self.things:
            self.made[name] += 1
            self.things.add(name)

    def fail(self, name: str) -> None:
        """Raise what is set to fail under that name, once for each time it is listed."""
        for error in self.failing.get(name, [])[:1]:
            self.failing[name].pop(0)
            raise error

    def unmake(self, name: str) -> None:
        self.fail(f"undo-{name}")
        self.things -= {name, f"half-{name}"}


class Worker:
    """Operations on a journal file and a world. ``die_at``: (step, direction, point) at which it dies once."""

    def __init__(self, path: Path, world: World, die_at: tuple[str, str, Point] | None = None) -> None:
        self.world = world
        self.die_at = die_at
        self.dead = threading.Event()
        self.reached: list[tuple[str, str, Point]] = []
        self.database = Database(path, (SCHEMA, STORE_SCHEMA))
        self.operations = Operations(
            self.database, "node1", self._kinds(), {"build": 2}, observer=self._observe, step_attempts=3
        )

    def _observe(self, point: Point, run: object, step: str, direction: str) -> None:
        if self.dead.is_set():
            raise Death
        self.reached.append((step, direction, point))
        if self.die_at == (step, direction, point):
            self.dead.set()
            self.database.close()
            raise Death

    def _kinds(self) -> dict[str, Kind]:
        def step(name: str) -> Do:
            def do(run):  # type: ignore[no-untyped-def]
                if name in self.world.block:
                    run.wait(self.world.block[name].is_set, 30)
                if name in self.world.jobs:
                    with run.on_cancel(self.world.jobs[name].interrupt):
                        self.world.jobs[name].wait()
                self.world.make(name)
                return {"made": name}

            return Do(name, do, lambda run: self.world.unmake(name))

        def plan(run, steps):  # type: ignore[no-untyped-def]
            self.world.fail("plan")
            return steps

        def finish(tx, run):  # type: ignore[no-untyped-def]
            self.world.fail("finish")
            self.world.finished.append("done")

        make = Kind(
            name="make",
            steps=lambda run: plan(run, [step("one"), step("two"), Commit(lambda tx, r: None), step("three")]),
            finish=finish,
            abandon=lambda tx, run, error: self.world.finished.append(type(error).__name__),
            limit="build",
            event="make",
        )
        wipe = Kind(
            name="wipe",
            steps=lambda run: [Do("wipe", lambda r: self.world.things.clear())],
            finish=lambda tx, run: self.world.finished.append("wiped"),
            abandon=lambda tx, run, error: None,
            limit="delete",
            event="wipe",
            committed_at_accept=True,
            preempts=True,
        )
        poke = Kind(
            name="poke",
            steps=lambda run: plan(run, [step("poke")]),
            finish=finish,
            abandon=lambda tx, run, error: self.world.finished.append(type(error).__name__),
            limit="power",
            event="poke",
            committed_at_accept=True,
            gives_up=True,
        )
        return {kind.name: kind for kind in (make, wipe, poke)}

    def send(self, kind: str = "make", instance: str | None = None, **changes):  # type: ignore[no-untyped-def]
        instance = instance or "00000000-0000-4000-8000-000000000001"
        context = Context(request_id="req-1", message_id=changes.pop("message_id", str(uuid.uuid4())))
        command = Command(kind=kind, context=context, instance=instance, **changes)
        return self.operations.accept(command, lambda tx: False)

    def outcome(self, operation: str, wait: float = 10):  # type: ignore[no-untyped-def]
        found = self.operations.get(operation, wait)
        assert found.state.final, f"still {found.state} in {found.phase}"
        return found

    def events(self) -> list[str]:
        return [row.event_type for row in self.operations.outbox.peek(100)]

    def close(self) -> None:
        self.operations.stop(5)
        self.database.close()


BROKEN = errors.Broken("cannot work")
BUSY = errors.HypervisorBusy(reason="once")
