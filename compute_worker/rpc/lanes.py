"""A small pool of threads that keeps order where order matters.

Jobs with the same key run one after the other, as they came; others run side by side. A job that cannot be done yet
is parked at the head of its lane, so that nothing overtakes it, and holds no thread meanwhile. Threads are started
when needed and are daemons: one that waits for a broker that is gone never keeps the process alive.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

LOG = logging.getLogger(__name__)

Job = Callable[[], float | None]
"""Returns ``None`` when done, or the seconds after which it is to be called again."""


@dataclass(slots=True)
class _Lane:
    key: str | None
    jobs: deque[Job] = field(default_factory=deque)


class Lanes:
    """At most ``threads`` jobs at once; per key one at a time, in order of :meth:`submit`."""

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._name = name
        self._lock = threading.Lock()
        self._work_there = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        self._lanes: dict[str, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._parked: list[tuple[float, int, _Lane]] = []
        self._sequence = itertools.count()
        self._started = 0
        self._idle = 0
        self._backlog = 0
        self._running = 0
        self._stopped = False

    @property
    def backlog(self) -> int:
        """Jobs that are not done: waiting, parked or running."""
        return self._backlog

    def submit(self, key: str | None, job: Job) -> bool:
        """Add a job; false when stopped. Without a key it is ordered against nothing."""
        with self._lock:
            if self._stopped:
                return False
            self._backlog += 1
            lane = self._lanes.get(key) if key is not None else None
            if lane is not None:
                lane.jobs.append(job)
                return True
            lane = _Lane(key, deque([job]))
            if key is not None:
                self._lanes[key] = lane
            self._make_ready(lane)
            return True

    def wait_below(self, limit: int, timeout: float) -> bool:
        """Wait until fewer than ``limit`` jobs are to be done now, at most ``timeout`` seconds; whether it is so.

        What is parked is not to be done now: it waits for something else, and nobody shall wait for it.
        """
        with self._lock:
            return self._progress.wait_for(lambda: self._stopped or self._backlog - self._put_off() < limit, timeout)

    def _put_off(self) -> int:
        return sum(len(lane.jobs) for _, _, lane in self._parked)

    def stop(self, timeout: float) -> bool:
        """Take no more jobs; let what waits and runs end within ``timeout`` seconds, and forget what is parked.

        :return: whether everything that was not parked has ended.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._stopped = True
            self._parked.clear()
            self._work_there.notify_all()
            ended = self._progress.wait_for(lambda: not self._ready and not self._running, deadline - time.monotonic())
            self._ready.clear()
            self._work_there.notify_all()
            return ended

    def _make_ready(self, lane: _Lane) -> None:
        self._ready.append(lane)
        if len(self._ready) <= self._idle:
            self._work_there.notify()
        elif self._started < self._threads:
            self._started += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()

    def _work(self) -> None:
        while (lane := self._next()) is not None:
            again = self._run(lane.jobs[0])
            with self._lock:
                self._running -= 1
                self._put_back(lane, again)
                self._progress.notify_all()

    def _run(self, job: Job) -> float | None:
        try:
            return job()
        except Exception:
            LOG.exception("a job of %s failed and is dropped", self._name)
        except BaseException as exc:  # the thread must live, whatever a job was interrupted by
            LOG.warning("a job of %s was interrupted: %r", self._name, exc)
        return None

    def _put_back(self, lane: _Lane, again: float | None) -> None:
        if again is not None:
            if not self._stopped:
                heapq.heappush(self._parked, (time.monotonic() + again, next(self._sequence), lane))
                self._work_there.notify()  # somebody has to watch the clock
            return
        lane.jobs.popleft()
        self._backlog -= 1
        if lane.jobs:
            self._ready.append(lane)
        elif lane.key is not None:
            del self._lanes[lane.key]

    def _next(self) -> _Lane | None:
        """The next lane with a job to run, or ``None`` when there will be none."""
        with self._lock:
            while True:
                now = time.monotonic()
                while self._parked and self._parked[0][0] <= now:
                    self._ready.append(heapq.heappop(self._parked)[2])
                if self._ready:
                    self._running += 1
                    self._work_there.notify(len(self._ready) - 1)
                    return self._ready.popleft()
                if self._stopped:
                    return None
                self._idle += 1
                self._work_there.wait(self._parked[0][0] - now if self._parked else None)
                self._idle -= 1
