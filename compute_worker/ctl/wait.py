"""Waiting for an operation's end, through restarts of its worker and of the broker."""

from __future__ import annotations

import time
from collections.abc import Callable

from compute_worker import errors
from compute_worker.ctl.exits import StillRunning
from compute_worker.errors import ComputeError
from compute_worker.objects import Accepted, Operation
from compute_worker.rpc.client import ComputeAPI

LOOK_SECONDS = 1.0
"""How long one question waits for the outcome: how often progress is shown."""

Tell = Callable[[Operation], None]


def silent(operation: Operation) -> None:
    """Tell nobody."""


def wait_for_end(
    api: ComputeAPI,
    accepted: Accepted,
    timeout: float,
    tell: Tell = silent,
    look: float = LOOK_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Operation:
    """The operation once it is final. ``tell`` is called with what is known, about every ``look`` seconds.

    A worker or broker that does not answer is asked again until ``timeout`` seconds are over: the operation is in the
    host's journal and goes on with its worker.

    :raises StillRunning: it is not final after ``timeout`` seconds.
    :raises PeerUnavailable: the same, and nobody answered at last.
    :raises NotFound: the host lost it.
    """
    assert accepted.operation is not None
    deadline = time.monotonic() + timeout
    last: Operation | None = None
    while True:
        left = deadline - time.monotonic()
        problem: ComputeError | None = None
        try:
            last = api.get_operation(accepted.operation, max(0.0, min(look, left)), host=accepted.host)
        except (errors.PeerUnavailable, errors.HostFull) as exc:
            problem = exc
        if last is not None and problem is None:
            tell(last)
            if last.state.final:
                return last
        if time.monotonic() >= deadline:
            raise _given_up(accepted, last, problem, timeout)
        if problem is not None:
            sleep(min(look, max(0.0, deadline - time.monotonic())))


def _given_up(
    accepted: Accepted, last: Operation | None, problem: ComputeError | None, timeout: float
) -> ComputeError:
    if isinstance(problem, errors.PeerUnavailable):
        return errors.PeerUnavailable(
            f"host {accepted.host} accepted operation {accepted.operation} and does not answer: it goes on when its"
            " worker is back",
            host=accepted.host,
        )
    return StillRunning(
        operation=accepted.operation,
        state=(last.state if last is not None else accepted.state).value,
        phase=last.phase if last is not None else "accepted",
        seconds=timeout,
    )
