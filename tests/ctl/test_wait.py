from __future__ import annotations

from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.exits import StillRunning
from compute_worker.ctl.wait import wait_for_end
from compute_worker.objects import Accepted, Operation
from compute_worker.states import OperationState

UUID = "00000000-0000-4000-8000-000000000001"
ACCEPTED = Accepted(operation=UUID, host="node1")


def operation(state: OperationState, phase: str = "define") -> Operation:
    return Operation(uuid=UUID, kind="k", host="node1", state=state, phase=phase, created_at=0, updated_at=0)


RUNNING = operation(OperationState.RUNNING)
DONE = operation(OperationState.DONE)
SILENCE = errors.PeerUnavailable(host="node1")


class Answers:
    """Stands for the worker: says these things one after the other, the last for ever."""

    def __init__(self, *answers: Operation | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[float] = []

    def get_operation(self, operation: str, wait: float = 0, *, host: str) -> Operation:
        assert (operation, host) == (UUID, "node1")
        self.asked.append(wait)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def wait(answers: Answers, timeout: float = 5.0, **extra: Any) -> tuple[Operation, list[str]]:
    told: list[str] = []
    api: Any = answers
    ended = wait_for_end(api, ACCEPTED, timeout, lambda o: told.append(o.state), sleep=lambda s: None, **extra)
    return ended, told


def test_until_final_with_everything_told() -> None:
    ended, told = wait(Answers(RUNNING, RUNNING, DONE))
    assert ended is DONE and told == ["running", "running", "done"]


def test_through_silence_and_a_full_host() -> None:
    full = errors.HostFull(host="node1", running=8, limit=8, queued=0)
    ended, told = wait(Answers(SILENCE, RUNNING, full, SILENCE, DONE))
    assert ended is DONE and told == ["running", "done"]


def test_time_runs_out() -> None:
    with pytest.raises(StillRunning, match=r"still running \(define\) after 0 s; it goes on"):
        wait(Answers(RUNNING), timeout=0)


def test_time_runs_out_in_silence() -> None:
    with pytest.raises(errors.PeerUnavailable, match="goes on when its worker is back"):
        wait(Answers(SILENCE), timeout=0)


def test_the_last_look_is_never_skipped() -> None:
    assert wait(Answers(DONE), timeout=0)[0] is DONE


def test_one_question_never_waits_beyond_the_timeout() -> None:
    answers = Answers(DONE)
    wait(answers, timeout=0.5, look=30.0)
    assert answers.asked[0] <= 0.5


def test_an_operation_that_is_gone_is_an_error() -> None:
    with pytest.raises(errors.OperationNotFound):
        wait(Answers(errors.OperationNotFound(operation=UUID)))
