"""``watch``: hosts and operations as a table that follows them, and leaves the terminal as it was."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from compute_worker.ctl.connect import Client
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.output import cell, describe, table_of
from compute_worker.ctl.queries import condition, used
from compute_worker.ctl.text import clock, fraction, span
from compute_worker.errors import ComputeError
from compute_worker.objects import HostState, Operation

DISCOVER_EVERY = 10.0
KEEP_ENDED = 30.0
"""Seconds that an operation stays in the table after its end."""
MOST_ROWS = 40
BROKER = "broker"
_STYLES = {"done": "green", "undone": "red", "refused": "red", "undoing": "yellow", "running": "cyan", "queued": ""}


@dataclass
class Board:
    """What is known of the cell. Times are seconds since the epoch, of this machine."""

    hosts: dict[str, HostState] = field(default_factory=dict)
    operations: dict[tuple[str, str], Operation] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    ended_at: dict[tuple[str, str], float] = field(default_factory=dict)
    updated_at: float = 0.0

    def learn(self, state: HostState, operations: Iterable[Operation], now: float) -> None:
        """Take what one host answered."""
        self.hosts[state.host] = state
        self.silent.pop(state.host, None)
        for operation in operations:
            key = (operation.host, operation.uuid)
            self.seqs[operation.host] = max(self.seqs.get(operation.host, 0), operation.seq)
            self.operations[key] = operation
            if operation.state.final:
                self.ended_at.setdefault(key, now)
        self.updated_at = now

    def forget(self, now: float) -> None:
        """Drop what ended a while ago."""
        for key, ended in list(self.ended_at.items()):
            if now - ended > KEEP_ENDED:
                del self.ended_at[key]
                del self.operations[key]

    def shown(self) -> list[Operation]:
        """Open operations first, then ended ones, newest first."""
        everything = list(self.operations.values())
        return sorted(everything, key=lambda o: (o.state.final, -o.created_at))[:MOST_ROWS]


class Watcher:
    """Keeps a board up to date."""

    def __init__(self, client: Client, host: str | None) -> None:
        self._client = client
        self._host = host
        self._names: list[str] = []
        self._discovered = float("-inf")
        self.board = Board()

    def look(self, now: float) -> Board:
        """Ask every host once.

        :raises NobodyAnswers: there was never one.
        """
        if now - self._discovered >= DISCOVER_EVERY or not self._names:
            found = self._client.host_names(self._host)
            self._names = sorted({*self._names, *found})
            self._discovered = now
        self.board.silent.pop(BROKER, None)
        answers, problems = self._client.everywhere(self._names, self._ask)
        for host, problem in problems.items():
            self.board.silent[host] = problem.message
        for state, operations in answers.values():
            self.board.learn(state, operations, now)
        self.board.forget(now)
        return self.board

    def _ask(self, host: str) -> tuple[HostState, list[Operation]]:
        """What changed since the last look, and what is open, whose progress changes without a row."""
        api = self._client.api
        if host not in self.board.seqs:
            # Instances count with the same counter: what ended before the newest of them is of no interest here.
            self.board.seqs[host] = max((i.seq for i in api.list_instances(host=host)), default=0)
            self._skip_ended(host)
        changed = self._client.operations(host, since=self.board.seqs[host])
        return api.get_host_state(host=host), [*changed, *self._client.operations(host, open_only=True)]

    def _skip_ended(self, host: str) -> None:
        for operation in self._client.operations(host, since=self.board.seqs[host]):
            self.board.seqs[host] = max(self.board.seqs[host], operation.seq)


def draw(board: Board) -> RenderableType:
    """The board as tables."""
    hosts = table_of(
        ("host", "state", "vcpus", "memory MiB", "disk GiB", "instances", "operations"),
        [_host_row(board, state) for _, state in sorted(board.hosts.items())],
    )
    operations = table_of(
        ("operation", "kind", "instance", "host", "state", "progress", "at", "since"),
        [_operation_row(operation, board.updated_at) for operation in board.shown()],
    )
    silent = [cell(f"{host}: {problem}") for host, problem in sorted(board.silent.items())]
    nothing = [] if board.operations else [Text("no operation runs", style="dim")]
    return Group(Text(clock(board.updated_at), style="dim"), hosts, *silent, Text(""), operations, *nothing)


def _host_row(board: Board, state: HostState) -> Sequence[object]:
    silent = state.host in board.silent
    said = Text("no answer", style="red") if silent else cell(condition(state))
    return (
        state.host,
        said,
        used(state.vcpus),
        used(state.memory_mb),
        used(state.disk_gb),
        state.instances,
        state.operations,
    )


def _operation_row(operation: Operation, now: float) -> Sequence[object]:
    state = operation.state.value
    return (
        operation.uuid[:8],
        operation.kind,
        (operation.instance or "")[:8],
        operation.host,
        Text(state, style=_STYLES.get(state, "")),
        _bar(operation),
        cell((operation.error or {}).get("message") or describe(operation)),
        span((operation.updated_at if operation.state.final else now) - operation.created_at),
    )


def _bar(operation: Operation) -> RenderableType:
    share = fraction(operation.progress)
    if operation.state.final:
        return Text("")
    if share is None:
        return ProgressBar(total=None, width=16, pulse=True, animation_time=time.monotonic())
    return ProgressBar(total=1.0, completed=share, width=16)


def run(ctl: Ctl, sleep: Callable[[float], None] = time.sleep) -> Exit:
    """Look and draw until interrupted (or ``--count`` times). With ``--json`` one document each time."""
    signal_before = _leave_on_sigterm()
    try:
        _loop(ctl, Watcher(ctl.client, ctl.args.host), sleep)
    except KeyboardInterrupt:
        return Exit.OK
    finally:
        if signal_before is not None:
            signal.signal(signal.SIGTERM, signal_before)
    return Exit.OK


def _loop(ctl: Ctl, watcher: Watcher, sleep: Callable[[float], None]) -> None:
    rounds = ctl.args.count
    live = ctl.out.stdout.isatty() and not ctl.out.as_json
    board = watcher.look(time.time())
    if not live:
        while True:
            _print(ctl, board)
            rounds = rounds - 1 if rounds else rounds
            if ctl.args.count and not rounds:
                return
            sleep(ctl.args.interval)
            board = _look_again(ctl, watcher)
    with Live(draw(board), console=ctl.out.console, screen=True, auto_refresh=False) as view:
        while True:
            view.update(draw(board), refresh=True)
            rounds = rounds - 1 if rounds else rounds
            if ctl.args.count and not rounds:
                return
            sleep(ctl.args.interval)
            board = _look_again(ctl, watcher)


def _look_again(ctl: Ctl, watcher: Watcher) -> Board:
    """A broker that is away for a while does not end the watch."""
    try:
        return watcher.look(time.time())
    except ComputeError as exc:
        watcher.board.silent[BROKER] = exc.message
        return watcher.board


def _print(ctl: Ctl, board: Board) -> None:
    if ctl.out.as_json:
        hosts = [state for _, state in sorted(board.hosts.items())]
        ctl.out.document({"hosts": hosts, "operations": board.shown(), "unreachable": sorted(board.silent)})
    else:
        ctl.out.show(draw(board))


def _leave_on_sigterm() -> Any:
    """Let SIGTERM end the watch as an interrupt does, so that the terminal is put back. Returns what was set before."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, leave)
    except ValueError:
        # Not the main thread: whoever runs us there has signals of its own.
        return None
