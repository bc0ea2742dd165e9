"""The worker with an observer that kills it, or holds it, where the environment says. For tests of real deaths.

``LAB_KILL_AT`` and ``LAB_HOLD_AT`` are points as ``kind:step:direction:point``, several joined by commas. At a kill
point the process SIGKILLs itself, once in the life of the marker directory ``LAB_MARKS``; at a hold point it says so by
a file ``<point>.held`` there and waits for ``<point>.go``.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path

from compute_worker import worker
from compute_worker.cmd.worker import main
from compute_worker.operations.executor import Point
from compute_worker.operations.run import Run


class Observer:
    def __init__(self, environment: dict[str, str]) -> None:
        self._kill = set(filter(None, environment.get("LAB_KILL_AT", "").split(",")))
        self._hold = set(filter(None, environment.get("LAB_HOLD_AT", "").split(",")))
        self._marks = Path(environment["LAB_MARKS"])
        self._marks.mkdir(parents=True, exist_ok=True)

    def __call__(self, point: Point, run: Run, step: str, direction: str) -> None:
        here = f"{run.kind}:{step}:{direction}:{point}"
        if here in self._kill and self._first(f"{here}.killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if here in self._hold and self._first(f"{here}.held"):
            while not (self._marks / f"{here}.go").exists():
                time.sleep(0.02)

    def _first(self, name: str) -> bool:
        try:
            os.close(os.open(self._marks / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


if __name__ == "__main__":
    worker.Worker = functools.partial(worker.Worker, observer=Observer(dict(os.environ)))  # type: ignore[misc,assignment]
    sys.exit(main())
