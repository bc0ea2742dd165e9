"""Where scenes play: says what happens, waits for what must come, keeps the times, and draws the table at the end."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.text import Text

from compute_worker.ctl.output import Output
from compute_worker.ctl.text import span
from compute_worker.ctl.wait import wait_for_end
from compute_worker.demo.cell import DemoCell, Memory
from compute_worker.objects import Accepted, Flavor, ImageMeta, Instance, Operation
from compute_worker.states import OperationState

T = TypeVar("T")
POLL_SECONDS = 0.05
LONGEST_OPERATION = 120.0
FIRST, SECOND, THIRD = "web", "db", "survivor"
"""Names of the guests."""
ROOT_GB = 1
"""GiB of root disk that they have at first."""


class SceneFailed(Exception):
    """What should have come did not."""


@dataclass(frozen=True)
class Scene:
    """One step of the scenario: it returns what was seen, in one line."""

    title: str
    play: Callable[[Stage], str]


@dataclass(frozen=True)
class Line:
    """One line of the table at the end."""

    title: str
    seen: str
    seconds: float
    good: bool


class Stage:
    """What a scene is handed."""

    def __init__(self, cell: DemoCell, out: Output) -> None:
        self.cell = cell
        self.out = out
        self.memory = Memory()

    @property
    def api(self):  # type: ignore[no-untyped-def]  # ComputeAPI, whose module is heavy to import
        """Commands to the workers."""
        return self.cell.client.api

    def say(self, text: str) -> None:
        """A line below the scene's title."""
        self.out.line(f"    {text}")

    def until(self, condition: Callable[[], T], seconds: float, what: str) -> T:
        """What ``condition`` returns, once that is true.

        :raises SceneFailed: not within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise SceneFailed(f"waited {seconds:.0f} s for {what}")
            time.sleep(POLL_SECONDS)
        return value

    def require(self, truth: bool, what: str) -> None:
        """:raises SceneFailed: ``truth`` is false."""
        if not truth:
            raise SceneFailed(what)

    def make(self, name: str, image: ImageMeta) -> Instance:
        """A new instance, not sent yet."""
        flavor = Flavor(name="demo", vcpus=1, memory_mb=self.cell.guest.memory_mb, root_gb=ROOT_GB)
        return Instance(uuid=str(uuid.uuid4()), name=name, flavor=flavor, image=image)

    def send_boot(self, host: str, instance: Instance) -> Accepted:
        """Send a build and remember the guest by its name."""
        accepted: Accepted = self.api.build_and_run_instance(instance, host=host)
        self.memory.guests[instance.name] = instance.uuid
        self.memory.where[instance.uuid] = host
        self.say(f"{instance.name} ({instance.uuid}) accepted by {host} as operation {accepted.operation}")
        return accepted

    def end_of(self, accepted: Accepted) -> Operation:
        """The operation, ended well, with its steps told.

        :raises SceneFailed: it ended otherwise.
        """
        with self.out.following(f"    {accepted.host}") as following:
            ended = wait_for_end(self.api, accepted, LONGEST_OPERATION, following)
        self.tell_steps(ended)
        if ended.state is not OperationState.DONE:
            raise SceneFailed(f"{ended.kind}: {ended.state.value}: {(ended.error or {}).get('message')}")
        return ended

    def tell_steps(self, ended: Operation) -> None:
        """An ended operation, its steps and how long each took, and what it decided."""
        steps = ", ".join(f"{s.name} {span((s.ended_at or s.started_at) - s.started_at)}" for s in ended.steps)
        self.say(f"{ended.kind} on {ended.host}: {ended.state.value}{f' ({steps})' if steps else ''}")
        for reason in (step.reason for step in ended.steps if step.reason):
            self.say(f"decision: {reason}")

    def counter(self, name: str) -> int:
        """The guest's last tick."""
        return self.cell.guest.last_tick(self.console(name))

    def guest(self, name: str) -> tuple[str, str]:
        """Uuid and host of a guest."""
        uuid_ = self.memory.guests[name]
        return uuid_, self.memory.where[uuid_]

    def command(self, name: str, method: str, *args: object) -> Operation:
        """Send a command for a guest, by the API's method name, and wait for its end."""
        uuid_, host = self.guest(name)
        return self.end_of(getattr(self.api, method)(uuid_, *args, host=host))

    def console(self, name: str) -> str:
        """What the guest wrote."""
        uuid_, host = self.guest(name)
        text: str = self.api.get_console_output(uuid_, host=host)
        return text

    def tick_after(self, name: str, tick: int, what: str) -> int:
        """The guest's counter once it is beyond ``tick``."""

        def beyond() -> int | None:
            now = self.cell.guest.last_tick(self.console(name))
            return now if now > tick else None

        return self.until(beyond, self.cell.guest.patience, what) or 0

    def booted(self, name: str, times: int) -> int:
        """The guest's first tick after its boot number ``times``."""
        patience = self.cell.guest.patience
        self.until(lambda: self.cell.guest.boots(self.console(name)) >= times, patience, f"{name} to boot")
        seen = self.cell.guest.boots(self.console(name))
        self.require(seen == times, f"{name} booted {seen} times, not {times}")
        return self.tick_after(name, -1, f"{name} to tick after its boot")


def play(stage: Stage, scenes: Sequence[Scene]) -> bool:
    """Play the scenes in order, up to the first that fails, and draw the table. Whether all were good."""
    lines: list[Line] = []
    for number, scene in enumerate(scenes, 1):
        stage.out.line(f"{number:2}. {scene.title}")
        began = time.monotonic()
        good = True
        try:
            seen = scene.play(stage)
        except Exception as exc:
            seen, good = f"{type(exc).__name__}: {exc}", False
        lines.append(Line(scene.title, seen, time.monotonic() - began, good))
        stage.say(f"{'good' if good else 'FAILED'}: {seen}")
        if not good:
            break
    _table(stage.out, lines, len(scenes))
    return len(lines) == len(scenes) and all(line.good for line in lines)


def _table(out: Output, lines: Sequence[Line], wanted: int) -> None:
    rows = [
        (
            number,
            line.title,
            Text("good", style="green") if line.good else Text("FAILED", style="red"),
            Text(f"{line.seconds:.2f}", justify="right"),
            line.seen,
        )
        for number, line in enumerate(lines, 1)
    ]
    out.raw("\n")
    out.table(("", "step", "", "seconds", "seen"), rows)
    total = sum(line.seconds for line in lines)
    good = sum(line.good for line in lines)
    out.line(f"\n{good} of {wanted} steps good in {total:.1f} s".lstrip("\n"))
