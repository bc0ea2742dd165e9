from __future__ import annotations

import inspect

import pytest

from compute_worker import errors
from compute_worker.ctl.exits import MEANING, Exit, NobodyAnswers, StillRunning, UsageError, advice, code_of

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.ComputeError)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), Exit.USAGE),
        (errors.InstanceNotFound(instance="i", host="h"), Exit.NOT_FOUND),
        (errors.OperationNotFound(operation="o"), Exit.NOT_FOUND),
        (errors.InstanceBusy(instance="i", operation="o", kind="k", phase="p"), Exit.REFUSED),
        (errors.InstanceDeleted(instance="i"), Exit.REFUSED),
        (errors.MessageUndeliverable(host="h"), Exit.UNREACHABLE),
        (errors.PeerUnavailable(host="h"), Exit.UNREACHABLE),
        (errors.HypervisorUnavailable(reason="r"), Exit.UNREACHABLE),
        (StillRunning(operation="o", state="running", phase="p", seconds=1.0), Exit.UNREACHABLE),
        (NobodyAnswers(seconds=2.0), Exit.UNREACHABLE),
        (errors.GuestFailed(instance="i", reason="r"), Exit.FAILED),
        (errors.ComputeError("internal"), Exit.FAILED),
    ],
)
def test_code_of(error: Exception, code: Exit) -> None:
    assert code_of(error) is code


def test_every_code_has_a_meaning() -> None:
    assert MEANING.keys() == set(Exit)


@pytest.mark.parametrize("cls", ALL)
def test_advice_never_fails_and_leaves_no_hole(cls: type[errors.ComputeError]) -> None:
    bare = advice(cls("said"))
    assert bare is None or "{" not in bare


def test_advice_names_what_to_type() -> None:
    busy = errors.InstanceBusy(instance="i", operation="op-1", kind="k", phase="p")
    assert advice(busy, "ctl") == "wait for it: `ctl explain op-1`; or end it: `ctl cancel op-1`"
    assert "in 5 s" in str(advice(errors.HostFull(host="h", running=1, limit=1, queued=0)))
    assert "ctl enable node1" in str(advice(errors.HostDisabled(host="node1", reason="fan"), "ctl"))
    assert advice(errors.GuestFailed(instance="i", reason="r")) is None
