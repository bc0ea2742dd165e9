"""Scenes in which a guest moves between the hosts, and how long it was off meanwhile, seen from outside."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType

from compute_worker.ctl.chain import Chain, Follower
from compute_worker.ctl.text import amount, span
from compute_worker.demo.stage import LONGEST_OPERATION, Stage
from compute_worker.objects import Accepted, Flavor, Migration, Operation
from compute_worker.states import OperationState, VmState

LOOK_SECONDS = 0.05
ROOT_GB = 1
"""GiB of root disk after the resize: more than any image of the scenario has."""


class Heartbeat:
    """While open, looks whether a guest lives; :attr:`longest` is the longest time it gave no sign of that.

    :param alive: another value each time while the guest lives, ``None`` or the same while it does not.
    """

    def __init__(self, alive: Callable[[], object | None]) -> None:
        self._alive = alive
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="heartbeat", daemon=True)
        self._signs: list[float] = []

    @property
    def longest(self) -> float:
        """Seconds between two signs of life, at most."""
        return max((b - a for a, b in zip(self._signs, self._signs[1:], strict=False)), default=0.0)

    def _look(self) -> None:
        last: object | None = None
        ended = False
        while not ended:
            # Once more at the end: what it ends for may be the first sign after a long silence.
            ended = self._end.wait(LOOK_SECONDS)
            now = self._alive()
            if now is not None and now != last:
                self._signs.append(time.monotonic())
                last = now

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


def resize(stage: Stage, name: str) -> str:
    """To the other host with a larger disk; confirmed there, its copy goes."""
    uuid_, source = stage.guest(name)
    dest = _other(stage, source)
    before, size = stage.counter(name), stage.cell.root_disk_bytes(source, uuid_, stage.console(name))
    with Heartbeat(lambda: stage.cell.alive(uuid_)) as beats:
        migration, moved = _move(stage, name, dest)
        tick = stage.booted(name, 1)
    grown = stage.cell.root_disk_bytes(dest, uuid_, stage.console(name))
    stage.require(size < grown == ROOT_GB << 30, f"the guest's disk had {size} bytes and has {grown}")
    counted = _counter_went_on(stage, name, before, tick)
    _decide(stage, name, "confirm_resize", migration, dest, source)
    left = [line for line in stage.cell.leftovers() if uuid_ in line and source in line]
    stage.require(not left, f"after the confirmation: {'; '.join(left)}")
    off = _off(beats, moved)
    return f"{source} -> {dest}, disk {amount(size)} -> {amount(grown)}, {counted}, {off}"


def resize_and_revert(stage: Stage, name: str) -> str:
    """To the other host and, reverted, back: what is there again is what was there before."""
    uuid_, source = stage.guest(name)
    dest = _other(stage, source)
    flavor = stage.api.get_instance(uuid_, host=source).flavor
    boots, before = stage.cell.guest.boots(stage.console(name)), stage.counter(name)
    with Heartbeat(lambda: stage.cell.alive(uuid_)) as away:
        migration, moved = _move(stage, name, dest)
        stage.booted(name, 1)
    with Heartbeat(lambda: stage.cell.alive(uuid_)) as back:
        parts = _decide(stage, name, "revert_resize", migration, dest, source)
        stage.memory.where[uuid_] = source
        tick = stage.booted(name, boots + 1)
    record = stage.api.get_instance(uuid_, host=source)
    stage.require(record.flavor == flavor and record.vm_state is VmState.ACTIVE, f"{name} is not as it was")
    counted = _counter_went_on(stage, name, before, tick)
    times = f"{_off(away, moved)}; back: {_off(back, between(parts[dest], 'set_aside', parts[source]))}"
    return f"{source} -> {dest} and back, as it was; {counted}; {times}"


def _off(beats: Heartbeat, moved: float) -> str:
    return f"silent for {span(beats.longest)}, off for {span(moved)} of it"


def _other(stage: Stage, host: str) -> str:
    return next(name for name in stage.cell.hosts if name != host)


def _move(stage: Stage, name: str, dest: str) -> tuple[str, float]:
    """Resize to ``dest`` and wait for both hosts; the migration's uuid, and seconds from power-off to start."""
    uuid_, source = stage.guest(name)
    instance = stage.api.get_instance(uuid_, host=source)
    flavor = Flavor(
        name="larger", vcpus=instance.flavor.vcpus, memory_mb=instance.flavor.memory_mb + 32, root_gb=ROOT_GB
    )
    migration = Migration(
        uuid=str(uuid.uuid4()), instance=uuid_, migration_type="resize", source_host=source, dest_host=dest,
        new_flavor=flavor,
    )  # fmt: skip
    accepted = stage.api.prep_resize(instance, migration, host=dest)
    stage.say(f"resize of {name} accepted by {dest} as operation {accepted.operation}")
    parts = _end_of_both(stage, accepted, dest, source)
    stage.memory.where[uuid_] = dest
    return migration.uuid, between(parts[source], "power_off", parts[dest])


def _decide(
    stage: Stage, name: str, method: str, migration: str, decider: str, other: str
) -> dict[str, Operation]:
    uuid_, _ = stage.guest(name)
    accepted = getattr(stage.api, method)(uuid_, migration, host=decider)
    return _end_of_both(stage, accepted, decider, other)


def between(off: Operation, step: str, on: Operation) -> float:
    """Seconds from the end of the step that stopped the guest to the end of the one that let it run again."""
    stopped = next(s.ended_at or s.started_at for s in off.steps if s.name == step and s.direction == "do")
    runs = next(s.ended_at or s.started_at for s in on.steps if s.name == "resume_guest")
    return runs - stopped


def _end_of_both(stage: Stage, accepted: Accepted, decider: str, other: str) -> dict[str, Operation]:
    """The chain, ended well on both hosts, with its steps told; its parts by host."""
    with stage.out.following("    move", by=lambda part: part.host) as following:
        follower = Follower(stage.api, Chain(accepted.operation or "", [decider], [other]), following)
        ended = follower.until_end(LONGEST_OPERATION)
        late = follower.until_witnessed()
    parts: list[Operation] = sorted(follower.view.parts.values(), key=lambda part: part.host != other)
    for part in parts:
        stage.tell_steps(part)
    message = (ended.error or {}).get("message")
    stage.require(ended.state is OperationState.DONE, f"{ended.kind}: {ended.state.value}: {message}")
    stage.require(not late, f"{', '.join(late)} has not recorded it")
    return follower.view.parts


def _counter_went_on(stage: Stage, name: str, before: int, tick: int) -> str:
    """The guest's own counter on its disk: nothing that it wrote was lost."""
    if not stage.cell.guest.keeps_count:
        return f"ticks again ({stage.tick_after(name, tick, f'{name} to go on ticking')})"
    stage.require(tick > before, f"{name} counted to {before}, and from {tick} after the move")
    return f"counter {before}, then {tick}"
