"""Following a command whose operation runs on several hosts under one uuid: a move, its confirmation, its revert."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from compute_worker import errors
from compute_worker.ctl.exits import StillRunning
from compute_worker.ctl.wait import LOOK_SECONDS, Tell, silent
from compute_worker.errors import ComputeError
from compute_worker.objects import Operation
from compute_worker.rpc.client import ComputeAPI
from compute_worker.states import OperationState

WITNESS_SECONDS = 10.0
"""How long the other host may take to record what was decided. It does so by itself; only the display waits."""
PACE_SECONDS = 0.2
"""Between two looks where no host holds the question until there is an answer."""
PASSED_ON = "prep_resize_elsewhere"
"""Kind of an operation that only hands a command on to the next host: its end is not the chain's."""


@dataclass(frozen=True)
class Chain:
    """Where an operation has its parts.

    :param deciders: hosts one of which decides, in the order in which they are asked (destination, alternates).
    :param witnesses: hosts that have a part of it and follow what is decided (the source).
    """

    operation: str
    deciders: Sequence[str]
    witnesses: Sequence[str] = ()


@dataclass
class View:
    """What is known of a chain: its parts, and who was silent at the last look, by host."""

    parts: dict[str, Operation] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


class Verdict(StrEnum):
    """How a chain stands."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"


def decide(chain: Chain, parts: Mapping[str, Operation]) -> tuple[Verdict, Operation | None]:
    """How it stands, and the part that says so. Alternates are asked before the host before them ends its part."""
    there = [parts[host] for host in chain.deciders if host in parts]
    for part in there:
        if part.state is OperationState.DONE and part.kind != PASSED_ON:
            return Verdict.DONE, part
    for part in [*there, *(parts[host] for host in chain.witnesses if host in parts)]:
        if not part.state.final:
            return Verdict.OPEN, part
    return (Verdict.FAILED, there[-1]) if there else (Verdict.OPEN, None)


def current(chain: Chain, parts: Mapping[str, Operation]) -> str:
    """The host whose answer is waited for: the decider that is at it, else the first that may come next."""
    for host in chain.deciders:
        if host in parts and not parts[host].state.final:
            return host
    return next((host for host in chain.deciders if host not in parts), chain.deciders[0])


class Follower:
    """Looks at every host of a chain until it has ended.

    :param tell: called with each part that was seen, about every ``look`` seconds.
    """

    def __init__(
        self,
        api: ComputeAPI,
        chain: Chain,
        tell: Tell = silent,
        look: float = LOOK_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._api = api
        self._chain = chain
        self._tell = tell
        self._look_seconds = look
        self._sleep = sleep
        self.view = View()

    def until_end(self, timeout: float) -> Operation:
        """The part that decides, final. Hosts that do not answer are asked again: the operation goes on with them.

        :raises StillRunning: it is open after ``timeout`` seconds.
        :raises PeerUnavailable: the same, and the host that decides does not answer.
        :raises OperationNotFound: no host has it.
        """
        deadline = time.monotonic() + timeout
        while True:
            verdict, part = self._look(max(0.0, min(self._look_seconds, deadline - time.monotonic())))
            if verdict is not Verdict.OPEN and part is not None:
                return part
            if time.monotonic() >= deadline:
                raise self._given_up(part, timeout)

    def until_witnessed(self, seconds: float = WITNESS_SECONDS) -> list[str]:
        """Wait until the witnesses have ended their parts. Returns those that have not: they do it by themselves."""
        deadline = time.monotonic() + seconds
        while True:
            for host in self._chain.witnesses:
                self._ask(host, 0.0)
            late = [h for h in self._chain.witnesses if h in self.view.silent or not self._ended(h)]
            if not [h for h in late if h not in self.view.silent] or time.monotonic() >= deadline:
                return late
            self._sleep(min(PACE_SECONDS, self._look_seconds))

    def _ended(self, host: str) -> bool:
        return host not in self.view.parts or self.view.parts[host].state.final

    def _look(self, wait: float) -> tuple[Verdict, Operation | None]:
        for host in self._chain.witnesses:
            self._ask(host, 0.0)
        at_it = current(self._chain, self.view.parts)
        self._ask(at_it, wait)
        if self._ended(at_it) or at_it in self.view.silent:
            for host in self._chain.deciders:
                if host != at_it:
                    self._ask(host, 0.0)
        if not self.view.parts and not self.view.silent:
            raise errors.OperationNotFound(operation=self._chain.operation)
        verdict, part = decide(self._chain, self.view.parts)
        if verdict is Verdict.OPEN and (self._ended(at_it) or at_it in self.view.silent):
            self._sleep(min(wait, PACE_SECONDS))
        return verdict, part

    def _ask(self, host: str, wait: float) -> None:
        known = self.view.parts.get(host)
        if known is not None and known.state.final and host not in self._chain.witnesses:
            return
        self.view.silent.pop(host, None)
        try:
            part = self._api.get_operation(self._chain.operation, wait, host=host)
        except errors.OperationNotFound:
            return
        except ComputeError as exc:
            self.view.silent[host] = exc.message
            return
        self.view.parts[host] = part
        self._tell(part)

    def _given_up(self, part: Operation | None, timeout: float) -> ComputeError:
        host = current(self._chain, self.view.parts)
        if host in self.view.silent:
            return errors.PeerUnavailable(
                f"host {host} does not answer: operation {self._chain.operation} goes on when its worker is back",
                host=host,
            )
        return StillRunning(
            operation=self._chain.operation,
            state=part.state.value if part is not None else OperationState.QUEUED.value,
            phase=part.phase if part is not None else "accepted",
            seconds=timeout,
        )
