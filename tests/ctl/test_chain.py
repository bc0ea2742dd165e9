from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.chain import Chain, Follower, Verdict, current, decide
from compute_worker.ctl.exits import StillRunning
from compute_worker.objects import Operation
from compute_worker.states import OperationState

UUID = "00000000-0000-4000-8000-000000000001"
CHAIN = Chain(UUID, ["node2", "node3"], ["node1"])
RUNNING, DONE, UNDONE = OperationState.RUNNING, OperationState.DONE, OperationState.UNDONE


def part(host: str, state: OperationState, kind: str = "prep_resize", phase: str = "await_disks") -> Operation:
    return Operation(uuid=UUID, kind=kind, host=host, state=state, phase=phase, created_at=0, updated_at=0)


def parts(**states: OperationState) -> dict[str, Operation]:
    return {host: part(host, state) for host, state in states.items()}


@pytest.mark.parametrize(
    ("there", "verdict", "host"),
    [
        ({}, Verdict.OPEN, None),
        (parts(node2=RUNNING), Verdict.OPEN, "node2"),
        (parts(node2=DONE, node1=RUNNING), Verdict.DONE, "node2"),
        (parts(node2=UNDONE, node3=RUNNING), Verdict.OPEN, "node3"),
        (parts(node2=UNDONE, node3=DONE), Verdict.DONE, "node3"),
        (parts(node2=UNDONE, node1=OperationState.UNDOING), Verdict.OPEN, "node1"),
        (parts(node2=UNDONE, node1=UNDONE), Verdict.FAILED, "node2"),
        (parts(node2=UNDONE, node3=UNDONE, node1=UNDONE), Verdict.FAILED, "node3"),
        ({"node2": part("node2", DONE, "prep_resize_elsewhere"), "node3": part("node3", DONE)}, Verdict.DONE, "node3"),
        (parts(node2=OperationState.REFUSED), Verdict.FAILED, "node2"),
    ],
)
def test_decide(there: dict[str, Operation], verdict: Verdict, host: str | None) -> None:
    found, by = decide(CHAIN, there)
    assert (found, by.host if by else None) == (verdict, host)


def test_who_is_waited_for() -> None:
    assert current(CHAIN, {}) == "node2"
    assert current(CHAIN, parts(node2=RUNNING)) == "node2"
    assert current(CHAIN, parts(node2=UNDONE)) == "node3"
    assert current(CHAIN, parts(node2=UNDONE, node3=UNDONE)) == "node2"


class Hosts:
    """Stands for the workers: each says these things one after the other, the last for ever."""

    def __init__(self, **said: list[Any]) -> None:
        self._said: Mapping[str, list[Any]] = said

    def get_operation(self, operation: str, wait: float = 0, *, host: str) -> Operation:
        assert operation == UUID
        said = self._said[host]
        answer = said.pop(0) if len(said) > 1 else said[0]
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Operation)
        return answer


NEVER = errors.OperationNotFound(operation=UUID)
SILENT = errors.PeerUnavailable(host="node2")


def follower(**said: list[Any]) -> tuple[Follower, list[str]]:
    told: list[str] = []
    api: Any = Hosts(**said)
    slept: list[float] = []
    return Follower(api, CHAIN, lambda o: told.append(f"{o.host} {o.state}"), 0.01, slept.append), told


def test_both_hosts_are_told() -> None:
    at, told = follower(
        node2=[part("node2", RUNNING), part("node2", DONE)], node3=[NEVER], node1=[part("node1", RUNNING)]
    )
    assert at.until_end(5).host == "node2"
    assert "node1 running" in told and "node2 running" in told and told[-1] == "node2 done"


def test_the_alternate_that_took_it_is_found() -> None:
    at, _ = follower(
        node2=[part("node2", UNDONE)], node3=[part("node3", RUNNING), part("node3", DONE)], node1=[NEVER]
    )
    ended = at.until_end(5)
    assert ended.host == "node3" and ended.state is DONE


def test_a_refusal_that_was_passed_on_is_no_end() -> None:
    passed = part("node2", DONE, "prep_resize_elsewhere")
    at, _ = follower(node2=[passed], node3=[part("node3", UNDONE)], node1=[NEVER])
    ended = at.until_end(5)
    assert ended.host == "node3" and ended.state is UNDONE


def test_through_silence_until_the_source_has_its_guest_back() -> None:
    at, _ = follower(
        node2=[SILENT, part("node2", UNDONE)],
        node3=[NEVER],
        node1=[part("node1", RUNNING), part("node1", OperationState.UNDOING), part("node1", UNDONE)],
    )
    assert at.until_end(5).state is UNDONE
    assert at.view.parts["node1"].state is UNDONE


def test_what_nobody_has_is_an_error() -> None:
    at, _ = follower(node2=[NEVER], node3=[NEVER], node1=[NEVER])
    with pytest.raises(errors.OperationNotFound):
        at.until_end(5)


def test_time_runs_out() -> None:
    at, _ = follower(node2=[part("node2", RUNNING)], node3=[NEVER], node1=[NEVER])
    with pytest.raises(StillRunning, match="await_disks"):
        at.until_end(0)
    at, _ = follower(node2=[SILENT], node3=[SILENT], node1=[NEVER])
    with pytest.raises(errors.PeerUnavailable, match="goes on when its worker is back"):
        at.until_end(0)


def test_a_witness_that_is_late_or_silent_is_named() -> None:
    at, _ = follower(node2=[part("node2", DONE)], node3=[NEVER], node1=[part("node1", RUNNING)])
    assert at.until_end(5).host == "node2"
    assert at.until_witnessed(0) == ["node1"]
    at, _ = follower(node2=[part("node2", DONE)], node3=[NEVER], node1=[SILENT])
    at.until_end(5)
    assert at.until_witnessed(5) == ["node1"], "silence is not waited for"
    at, _ = follower(node2=[part("node2", DONE)], node3=[NEVER], node1=[part("node1", RUNNING), part("node1", DONE)])
    at.until_end(5)
    assert at.until_witnessed(5) == []
