"""Waiting for a condition with a deadline, instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02


def wait_for(
    predicate: Callable[[], T], deadline: float = 10.0, what: str = "the condition"
) -> T:
    """Call `predicate` until it returns something true, and return that.

    `deadline` is in seconds; `predicate` is called at least once, and once more after the
    deadline has passed.  Raises AssertionError naming `what`, with the last value seen.
    Exceptions of `predicate` are not caught.
    """
    end = time.monotonic() + deadline
    while True:
        late = time.monotonic() >= end
        value = predicate()
        if value:
            return value
        if late:
            raise AssertionError(f"waited {deadline:g} s for {what}; last seen: {value!r}")
        time.sleep(POLL_SECONDS)
