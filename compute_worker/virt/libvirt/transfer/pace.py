"""A bandwidth cap that several threads share."""

from __future__ import annotations

import threading
import time


class Pace:
    """Lets ``bytes_per_second`` through; 0: everything, at once."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, count: int, stop: threading.Event) -> None:
        """Wait until ``count`` more bytes may go, or ``stop`` is set."""
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(self._free_at, now)
            self._free_at = begin + count / self._rate
        if begin > now:
            stop.wait(begin - now)
