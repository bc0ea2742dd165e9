"""What another host's answer means."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.manager.peers import Verdict, decide, reached
from compute_worker.objects import OperationAnswer
from compute_worker.states import OperationState

S = OperationState
NO_ERROR = {"class": "DiskFull", "message": "no space left", "details": {}}


@pytest.mark.parametrize(
    ("answer", "journal", "one_directory", "verdict", "why"),
    [
        (OperationAnswer(known=True, state=S.DONE, committed=True), "", False, Verdict.YES, "committed"),
        (OperationAnswer(known=True, state=S.RUNNING, committed=True), "", False, Verdict.YES, "committed"),
        # Preempted by a delete after its COMMIT: it owned the instance, and it is that host's to delete.
        (OperationAnswer(known=True, state=S.UNDONE, committed=True), "", False, Verdict.YES, "committed"),
        (OperationAnswer(known=True, state=S.RUNNING, phase="grow_disks"), "", False, Verdict.WAIT, "grow_disks"),
        (OperationAnswer(known=True, state=S.QUEUED, phase="queued"), "", False, Verdict.WAIT, "queued"),
        (OperationAnswer(known=True, state=S.UNDONE, error=NO_ERROR), "", False, Verdict.NO, "no space left"),
        (OperationAnswer(known=True, state=S.UNDOING, error=NO_ERROR), "", False, Verdict.NO, "no space left"),
        # On the same files what is being undone is in the way of what is taken back.
        (OperationAnswer(known=True, state=S.UNDOING, phase="undo define"), "", True, Verdict.WAIT, "undo define"),
        (OperationAnswer(known=True, state=S.REFUSED), "", False, Verdict.NO, "refused"),
        (OperationAnswer(known=False, journal_id="a"), "a", False, Verdict.NO, "never came"),
        (OperationAnswer(known=False, journal_id="b", clean=True), "a", False, Verdict.NO, "never came"),
        # A lost journal is not a no.
        (OperationAnswer(known=False, journal_id="b", clean=False), "a", False, Verdict.WAIT, "lost its journal"),
    ],
)
def test_decide(answer, journal, one_directory, verdict, why):
    found, reason = decide(answer, journal, one_directory)
    assert found is verdict
    assert why in reason


@given(
    known=st.booleans(),
    state=st.sampled_from(list(OperationState)),
    committed=st.booleans(),
    clean=st.booleans(),
    journals=st.sampled_from(list(itertools.product(["", "a"], ["a", "b"]))),
    one_directory=st.booleans(),
)
def test_never_a_no_from_a_host_that_committed_nor_a_yes_from_one_that_did_not(
    known, state, committed, clean, journals, one_directory
):
    answer = OperationAnswer(
        known=known, state=state, committed=known and committed, clean=clean, journal_id=journals[1]
    )
    verdict, why = decide(answer, journals[0], one_directory)
    assert why
    assert (verdict is Verdict.YES) == answer.committed
    if known and state in (S.QUEUED, S.RUNNING) and not committed:
        assert verdict is Verdict.WAIT


def test_a_host_without_a_queue_does_not_answer():
    def call():
        raise errors.MessageUndeliverable(host="node2")

    with pytest.raises(errors.PeerUnavailable, match="node2"):
        reached("node2", call)
