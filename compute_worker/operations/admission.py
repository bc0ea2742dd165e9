"""Who may run now: one operation at a time for each instance, in order of arrival, and a limit for each class.

Pure bookkeeping without threads; the runner calls it under its lock and starts what it returns.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ticket:
    """An operation that wants to run: its row, what it holds, its class."""

    id: int
    instance: str | None
    limit: str


class Admission:
    """Tickets that wait and tickets that run.

    :param limits: how many of each class run at once. A class that is not named has no limit.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = dict(limits)
        self._line: dict[str, deque[Ticket]] = {}
        self._ready: dict[str, deque[Ticket]] = {}
        self._running: dict[int, Ticket] = {}
        self._count: Counter[str] = Counter()
        self._urgent: set[int] = set()
        self._aside: set[int] = set()
        self._slotless: set[int] = set()
        self._waiting = 0

    def add(self, ticket: Ticket) -> list[Ticket]:
        """A new ticket at the end of its instance's line. Returns what may start now."""
        self._waiting += 1
        if ticket.instance is not None:
            line = self._line.setdefault(ticket.instance, deque())
            line.append(ticket)
            if len(line) > 1:
                return []
        return self._admit(ticket)

    def expedite(self, id_: int) -> list[Ticket]:
        """A waiting ticket that shall only end (it was cancelled): it waits for its instance's line and no limit.

        Returns what may start now. Ends well when the ticket runs already.
        """
        if id_ in self._running:
            return []
        self._urgent.add(id_)
        for ready in self._ready.values():
            for ticket in ready:
                if ticket.id == id_:
                    ready.remove(ticket)
                    return [self._run(ticket)]
        return []

    def step_aside(self, id_: int) -> list[Ticket]:
        """A running ticket only waits from now on: its place in its class and in its instance's line is free.

        It never asks for them again. Returns what may start now.
        """
        if id_ in self._aside or id_ not in self._running:
            return []
        self._aside.add(id_)
        return self._leave(self._running[id_])

    def yield_slot(self, id_: int) -> list[Ticket]:
        """A running ticket waits for somebody else: its place in its class is free until :meth:`claim_slot`, the one in
        its instance's line it keeps. Returns what may start now.
        """
        if id_ not in self._running or id_ in self._aside or id_ in self._slotless:
            return []
        self._slotless.add(id_)
        ticket = self._running[id_]
        self._count[ticket.limit] -= 1
        return self._start(ticket.limit)

    def claim_slot(self, id_: int) -> list[Ticket]:
        """It has something to do again: it gets a place in its class behind those that wait already.

        Returns what may start now, or go on: the ticket itself is among them once it has a place, or needs none.
        """
        ticket = self._running[id_]
        if id_ not in self._slotless:
            return [ticket]
        self._waiting += 1
        self._ready.setdefault(ticket.limit, deque()).append(ticket)
        return self._start(ticket.limit)

    def done(self, id_: int) -> list[Ticket]:
        """A running ticket ended. Returns what may start now."""
        ticket = self._running.pop(id_)
        self._urgent.discard(id_)
        if id_ in self._aside:
            self._aside.discard(id_)
            return []
        return self._leave(ticket)

    def _leave(self, ticket: Ticket) -> list[Ticket]:
        if ticket.id not in self._slotless:
            self._count[ticket.limit] -= 1
        elif ticket in (ready := self._ready.get(ticket.limit, deque())):
            ready.remove(ticket)
            self._waiting -= 1
        self._slotless.discard(ticket.id)
        started = []
        if ticket.instance is not None:
            line = self._line[ticket.instance]
            line.popleft()
            if line:
                started = self._admit(line[0])
            else:
                del self._line[ticket.instance]
        return started + self._start(ticket.limit)

    def _admit(self, ticket: Ticket) -> list[Ticket]:
        """The ticket is first in its line."""
        if ticket.id in self._urgent:
            return [self._run(ticket)]
        self._ready.setdefault(ticket.limit, deque()).append(ticket)
        return self._start(ticket.limit)

    def _run(self, ticket: Ticket) -> Ticket:
        self._running[ticket.id] = ticket
        self._slotless.discard(ticket.id)
        self._count[ticket.limit] += 1
        self._waiting -= 1
        return ticket

    def _start(self, limit: str) -> list[Ticket]:
        started = []
        ready = self._ready.get(limit, deque())
        while ready and self._count[limit] < self._limits.get(limit, len(ready) + self._count[limit]):
            started.append(self._run(ready.popleft()))
        return started

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def running(self) -> dict[str, int]:
        """How many run, by class."""
        return {limit: count for limit, count in self._count.items() if count}
