from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.manager import leftovers
from compute_worker.manager.leftovers import Facts, OwnerSays, is_finding, judge
from compute_worker.moves import Move, Side
from compute_worker.objects import Migration, Operation
from compute_worker.states import MigrationStatus, OperationState
from tests.manager.machine import make_instance

HERE = "node1"
SAFE_ANSWER = OwnerSays.NEEDS_NOTHING


@pytest.mark.parametrize(
    ("facts", "safe", "kept", "reason"),
    [
        ({"operation": "x (build, define)"}, False, True, "operation x (build, define) is at it"),
        ({"move": "migration m waits"}, False, True, "migration m waits"),
        ({"in_store": True}, False, True, "the instance is this host's"),
        ({"in_store": True, "deleted": True}, False, True, "the instance is this host's"),
        ({"deleted": True}, True, False, "the instance was deleted"),
        ({}, False, False, "nothing says whose it is"),
        ({"owner": HERE}, False, False, "its record names this host, and the journal does not have it"),
        ({"owner": "node2"}, False, False, "host node2 was not asked"),
        ({"owner": "node2", "owner_says": OwnerSays.SILENT}, False, False, "host node2 does not answer"),
        ({"owner": "node2", "owner_says": OwnerSays.DOES_NOT_OWN}, False, False, "host node2 does not own it"),
        ({"owner": "node2", "owner_says": OwnerSays.NEEDS_IT}, False, False,
         "host node2 owns it and has an open move with this host"),
        ({"owner": "node2", "owner_says": OwnerSays.SHARES}, False, False,
         "host node2 owns it and may see the same instances directory"),
        ({"owner": "node2", "owner_says": SAFE_ANSWER}, True, False, "host node2 owns it and needs nothing here"),
        ({"owner": "node2", "owner_says": SAFE_ANSWER, "runs_here": True}, False, False,
         "host node2 owns it and needs nothing here, and a guest of it runs here"),
    ],
)
def test_judge(facts: dict[str, Any], safe: bool, kept: bool, reason: str) -> None:
    judged = judge(Facts(this_host=HERE, **facts))
    assert (judged.safe, judged.kept, judged.reason) == (safe, kept, reason)
    assert judged.remedy


@given(
    st.builds(
        Facts,
        this_host=st.just(HERE),
        in_store=st.booleans(),
        operation=st.none() | st.just("op"),
        move=st.none() | st.just("move"),
        deleted=st.booleans(),
        runs_here=st.booleans(),
        owner=st.sampled_from([None, HERE, "node2"]),
        owner_says=st.sampled_from(list(OwnerSays)),
    )
)
def test_what_somebody_needs_is_never_safe(facts: Facts) -> None:
    judged = judge(facts)
    if facts.in_store or facts.operation or facts.move:
        assert not judged.safe
    elif judged.safe and not facts.deleted:
        assert facts.owner == "node2" and facts.owner_says is SAFE_ANSWER and not facts.runs_here


@pytest.mark.parametrize(
    ("kind", "facts", "told"),
    [
        ("directory", {"in_store": True}, False),
        ("domain", {"in_store": True}, False),
        ("directory", {"move": "m"}, False),
        ("resize", {"move": "m"}, True),
        ("resize", {"in_store": True}, True),
        ("part", {"in_store": True}, True),
        ("part", {"operation": "o", "in_store": True}, False),
        ("directory", {"operation": "o"}, False),
        ("directory", {}, True),
        ("domain", {"deleted": True}, True),
    ],
)
def test_what_is_worth_telling(kind: str, facts: dict[str, Any], told: bool) -> None:
    assert is_finding(kind, Facts(this_host=HERE, **facts)) is told


def move(side: Side, status: MigrationStatus, finished_at: float | None = None) -> Move:
    instance = make_instance()
    migration = Migration(
        uuid=instance.uuid, instance=instance.uuid, source_host="node1", dest_host="node2", status=status
    )
    return Move(migration=migration, side=side, instance=instance, operation=instance.uuid, finished_at=finished_at)


def test_moves_say_what_they_wait_for() -> None:
    uuid = make_instance().uuid
    decided = leftovers.of_move(move(Side.DESTINATION, MigrationStatus.FINISHED, 90.0), 100.0)
    assert decided.reason == f"migration {uuid} from host node1 waits since 10 s for confirm or revert"
    assert decided.kept and not decided.safe and decided.remedy == "confirm or revert it"
    sending = leftovers.of_move(move(Side.SOURCE, MigrationStatus.POST_MIGRATING), 100.0)
    assert sending.reason == f"migration {uuid} to host node2 is post-migrating"
    assert "goes on by itself with host node2" in sending.remedy


def test_only_operations_that_wait_are_told() -> None:
    uuid = make_instance().uuid
    facts: dict[str, Any] = {
        "uuid": uuid, "kind": "resize_instance", "host": HERE, "state": OperationState.RUNNING,
        "phase": "await_outcome", "created_at": 0, "updated_at": 0,
    }
    assert leftovers.of_operation(Operation(**facts)) is None
    told = leftovers.of_operation(Operation(**facts, waiting_for="host node2 does not answer"))
    assert told is not None and told.kept
    assert told.reason == "resize_instance in await_outcome waits: host node2 does not answer"


def test_every_answer_of_an_owner_has_words_of_its_own() -> None:
    assert all(a.value != b.value for a, b in itertools.combinations(OwnerSays, 2))
