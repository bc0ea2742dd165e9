"""How long guests stood still in live migrations from this host, counted since its worker started."""

from __future__ import annotations

import threading
from collections.abc import Sequence

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
"""Seconds: upper bounds of the classes, beside the last one without any."""


class Downtimes:
    """A histogram. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        place = next((n for n, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
        with self._lock:
            self._counts[place] += 1
            self._sum += seconds

    def cumulative(self) -> tuple[Sequence[tuple[str, float]], float]:
        """How many were at most as long as each bound, by the bound in words, and the sum of all."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, so_far = [], 0
        for name, count in zip([*map(str, BOUNDS), "+Inf"], counts, strict=True):
            so_far += count
            found.append((name, float(so_far)))
        return found, total
