"""Scenes in which a guest moves between the hosts, and how long it was off meanwhile, seen from outside."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import msgspec

from compute_worker.ctl.chain import Chain, Follower
from compute_worker.ctl.text import amount, span
from compute_worker.demo.cell import Before
from compute_worker.demo.stage import FIRST, LONGEST_OPERATION, Scene, Stage
from compute_worker.objects import Accepted, Migration, Operation
from compute_worker.states import OperationState, VmState

LOOK_SECONDS = 0.05
MORE_ROOT_GB, MORE_MEMORY_MB = 1, 32
"""What each resize adds."""
AHEAD = "written since precopy-"
"""How a source says that a disk had gone ahead."""


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


def of_one_that_is_off(stage: Stage) -> str:
    """To the other host with a larger disk, while it is off: what arrived is what was set aside; confirmed."""
    return resize_off(stage, FIRST)


def warm(stage: Stage) -> str:
    """To the other host while it runs, from one that sends disks ahead; confirmed."""
    return resize(stage, FIRST)


def cold(stage: Stage) -> str:
    """Once more, from a host that does not; and reverted."""
    return resize_and_revert(stage, FIRST)


def resize_off(stage: Stage, name: str) -> str:
    """See :func:`of_one_that_is_off`. What it was before is remembered for :func:`as_it_was`."""
    uuid_, source = stage.guest(name)
    dest = _other(stage, source)
    size = stage.cell.root_disk_bytes(source, uuid_, stage.console(name))
    stage.memory.before[name] = Before(stage.counter(name), size)
    noise = stage.cell.fill(source, uuid_)
    stage.say(f"{amount(noise)} of noise were written to its disk; {stage.cell.line}")
    moved = _move(stage, name, dest)
    compared = stage.cell.compare(source, dest, uuid_)
    _confirm(stage, name, moved, dest, source)
    return f"{source} -> {dest}, {compared}"


def as_it_was(stage: Stage, name: str, tick: int) -> str:
    """Started for the first time after :func:`resize_off`: the guest itself sees a larger disk, and lost no write."""
    uuid_, host = stage.guest(name)
    before = stage.memory.before[name]
    grown = _grown(stage, before.disk_bytes, stage.cell.root_disk_bytes(host, uuid_, stage.console(name)), host, uuid_)
    return f"on {host}, disk {grown}, {_counter_went_on(stage, name, before.counter, tick)}"


def resize(stage: Stage, name: str) -> str:
    """To the other host with a larger disk; confirmed there, its copy goes."""
    uuid_, source = stage.guest(name)
    dest = _other(stage, source)
    before, size = stage.counter(name), stage.cell.root_disk_bytes(source, uuid_, stage.console(name))
    with Heartbeat(lambda: stage.cell.alive(uuid_)) as beats:
        moved = _move(stage, name, dest)
        tick = stage.booted(name, 1)
    grown = _grown(stage, size, stage.cell.root_disk_bytes(dest, uuid_, stage.console(name)), dest, uuid_)
    counted = _counter_went_on(stage, name, before, tick)
    _confirm(stage, name, moved, dest, source)
    return f"{source} -> {dest}, disk {grown}, {counted}, {_off(stage, beats, moved, source)}"


def resize_and_revert(stage: Stage, name: str) -> str:
    """To the other host and, reverted, back: what is there again is what was there before."""
    uuid_, source = stage.guest(name)
    dest = _other(stage, source)
    flavor = stage.api.get_instance(uuid_, host=source).flavor
    boots, before = stage.cell.guest.boots(stage.console(name)), stage.counter(name)
    with Heartbeat(lambda: stage.cell.alive(uuid_)) as away:
        moved = _move(stage, name, dest)
        stage.booted(name, 1)
    parts = _decide(stage, name, "revert_resize", moved.migration, dest, source)
    stage.memory.where[uuid_] = source
    tick = stage.booted(name, boots + 1)
    record = stage.api.get_instance(uuid_, host=source)
    stage.require(record.flavor == flavor and record.vm_state is VmState.ACTIVE, f"{name} is not as it was")
    counted = _counter_went_on(stage, name, before, tick)
    off, back = _off(stage, away, moved, source), span(between(parts[dest], "set_aside", parts[source]))
    return f"{source} -> {dest} and back, as it was; {counted}; {off}; back: off for {back}"


SCENES = (
    Scene("resize while it runs, warm: disks go ahead; confirm", warm),
    Scene("resize while it runs, cold; revert", cold),
)


@dataclass(frozen=True)
class Moved:
    """A resize that has ended. ``off``: seconds from the guest's end at the source to its start at the destination;
    ``ahead``: whether its disks were sent while it ran."""

    migration: str
    off: float
    ahead: bool


def _off(stage: Stage, beats: Heartbeat, moved: Moved, source: str) -> str:
    """How long the guest was off, beside how long the other kind of move had kept it off.

    :raises SceneFailed: the disks were to go ahead and did not, or the other way round.
    """
    kind = "warm" if moved.ahead else "cold"
    stage.require(moved.ahead == (source in stage.cell.sends_ahead), f"the disks of {source} went {kind}")
    stage.memory.off[kind] = moved.off
    words = f"silent for {span(beats.longest)}, off for {span(moved.off)} of it"
    if not stage.cell.sends_ahead:
        return f"{words} (cold: no host here sends disks ahead)"
    others = "".join(f"; {k} it was {span(seconds)}" for k, seconds in stage.memory.off.items() if k != kind)
    return f"{words} ({kind}{others})"


def _grown(stage: Stage, before: int, now: int, host: str, uuid_: str) -> str:
    wanted = stage.api.get_instance(uuid_, host=host).flavor.root_gb << 30
    stage.require(before < now == wanted, f"the guest's disk had {before} bytes and has {now}")
    return f"{amount(before)} -> {amount(now)}"


def _other(stage: Stage, host: str) -> str:
    return next(name for name in stage.cell.hosts if name != host)


def _move(stage: Stage, name: str, dest: str) -> Moved:
    """Resize to ``dest`` and wait for both hosts."""
    uuid_, source = stage.guest(name)
    instance = stage.api.get_instance(uuid_, host=source)
    flavor = msgspec.structs.replace(
        instance.flavor,
        name="larger",
        memory_mb=instance.flavor.memory_mb + MORE_MEMORY_MB,
        root_gb=instance.flavor.root_gb + MORE_ROOT_GB,
    )
    migration = Migration(
        uuid=str(uuid.uuid4()), instance=uuid_, migration_type="resize", source_host=source, dest_host=dest,
        new_flavor=flavor,
    )  # fmt: skip
    accepted = stage.api.prep_resize(instance, migration, host=dest)
    stage.say(f"resize of {name} accepted by {dest} as operation {accepted.operation}")
    parts = _end_of_both(stage, accepted, dest, source)
    stage.memory.where[uuid_] = dest
    return Moved(migration.uuid, between(parts[source], "power_off", parts[dest]), sent_ahead(parts[source]))


def sent_ahead(source: Operation) -> bool:
    """Whether only what a guest wrote since its disks had gone ahead was sent after its end."""
    return any(AHEAD in (step.reason or "") for step in source.steps if step.name.startswith("send_"))


def _confirm(stage: Stage, name: str, moved: Moved, dest: str, source: str) -> None:
    """The copy at the source goes with it."""
    uuid_, _ = stage.guest(name)
    _decide(stage, name, "confirm_resize", moved.migration, dest, source)
    left = [line for line in stage.cell.leftovers() if uuid_ in line and source in line]
    stage.require(not left, f"after the confirmation: {'; '.join(left)}")


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
