"""Jobs for tests: what was reported is kept, and a cancellation comes when the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compute_worker.errors import Cancelled


class RecordingJob:
    """A :class:`compute_worker.virt.driver.Job`. ``cancel_at``: cancelled at that many looks."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.reports: list[tuple[str, int | None, int | None]] = []
        self.details: list[dict[str, float | int | str]] = []
        self.reasons: list[str] = []
        self.looks = 0
        self._cancel_at = cancel_at
        self._cancelled = False
        self._condition = threading.Condition()
        self._callbacks: list[Callable[[], None]] = []

    def report(
        self, phase: str, done_bytes: int | None = None, total_bytes: int | None = None, **detail: float | int | str
    ) -> None:
        self.reports.append((phase, done_bytes, total_bytes))
        self.details.append(detail)

    def check(self) -> None:
        self.looks += 1
        if self._cancel_at is not None and self.looks >= self._cancel_at:
            self.cancel()
        if self._cancelled:
            raise Cancelled("cancelled by the test")

    def cancel(self) -> None:
        with self._condition:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
            self._condition.notify_all()
        for callback in callbacks:
            callback()

    @contextmanager
    def on_cancel(self, callback: Callable[[], None]) -> Iterator[None]:
        with self._condition:
            late = self._cancelled
            if not late:
                self._callbacks.append(callback)
        if late:
            callback()
        try:
            yield
        finally:
            with self._condition:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while True:
            self.check()
            if condition():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._condition:
                self._condition.wait(min(left, 0.05))

    def wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def explain(self, reason: str) -> None:
        self.reasons.append(reason)


def in_thread(target: object, *args: object) -> tuple[threading.Thread, list[BaseException]]:
    """Run ``target`` aside; what it raised is in the list."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            target(*args)  # type: ignore[operator]
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, raised
