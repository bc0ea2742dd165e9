from __future__ import annotations

import argparse
import io
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.connect import Client
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.movelist import Side, find_source_side, rows, words
from compute_worker.ctl.output import Output
from compute_worker.objects import Instance, Migration, MigrationState
from compute_worker.states import MigrationStatus

A, B = "aaaa0000-0000-4000-8000-000000000001", "bbbb0000-0000-4000-8000-000000000002"
MIGRATION = "cccc0000-0000-4000-8000-000000000003"


def state(side: str, status: MigrationStatus = MigrationStatus.FINISHED, **facts: Any) -> MigrationState:
    instance, attempt = facts.pop("instance", A), facts.pop("attempt", 1)
    migration = Migration(
        uuid=facts.pop("uuid", MIGRATION), instance=instance, source_host="node1",
        dest_host=facts.pop("dest_host", "node2"), status=status, attempt=attempt,
    )
    return MigrationState(migration=migration, side=side, operation=MIGRATION, **facts)


def test_both_sides_are_one_row() -> None:
    source = Side("node1", state("source", has_copy=True))
    destination = Side("node2", state("destination", finished_at=90.0))
    assert rows([source, destination], 100.0) == [
        (MIGRATION, A, "migration", "node1", "finished", "node2", "finished", 1, "10.0 s ago", "kept at the source")
    ]


def test_a_side_that_is_not_told_and_a_later_attempt() -> None:
    first = Side("node2", state("destination", MigrationStatus.ERROR, refused="disabled"))
    later = Side("node1", state("source", MigrationStatus.MIGRATING, dest_host="node3", attempt=2))
    (row,) = rows([first, later], 0.0)
    assert row[4:8] == ("migrating", "node3", "error: disabled", 2)
    (alone,) = rows([later], 0.0)
    assert alone[6] == "not told"


def test_words_say_why() -> None:
    assert words(None) == "not told"
    assert words(state("source", MigrationStatus.ERROR, refused="no room")) == "error: no room"


class Hosts:
    def __init__(self, **told: list[MigrationState] | errors.ComputeError) -> None:
        self.told = told

    def list_migrations(self, open_only: bool, *, host: str) -> list[MigrationState]:
        found = self.told[host]
        if isinstance(found, errors.ComputeError):
            raise found
        return found

    def list_instances(self, *, host: str) -> list[Instance]:
        return []


def asked(word: str, **told: Any) -> Side:
    api: Any = Hosts(**told)
    client = Client(api, None)
    object.__setattr__(client, "host_names", lambda host: list(told))
    args = argparse.Namespace(instance=word, host=None)
    return find_source_side(Ctl(client, args, Output(stdout=io.StringIO(), stderr=io.StringIO())))


def test_the_source_side_by_uuid_and_by_its_beginning() -> None:
    told = {"node1": [state("source"), state("source", instance=B, uuid=B)], "node2": [state("destination")]}
    assert asked(A, **told).host == "node1"
    assert asked("bbbb", **told).state.migration.instance == B


@pytest.mark.parametrize("word", [B, "bbbb", "nobody", "a"])
def test_what_does_not_move(word: str) -> None:
    silent = errors.PeerUnavailable(host="node3")
    with pytest.raises(errors.MigrationNotFound, match="node3 could not be asked"):
        asked(word, node1=[state("source")], node2=[state("destination", instance=B)], node3=silent)
