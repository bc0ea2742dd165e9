"""Moves between hosts as an operator sees them: both sides of each, by whichever hosts answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from compute_worker.ctl.connect import Client
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.find import SHORTEST_PREFIX, find_instance, is_uuid
from compute_worker.ctl.queries import told_problems
from compute_worker.ctl.text import safe, span
from compute_worker.errors import ComputeError, MigrationNotFound, NotFound
from compute_worker.objects import Migration, MigrationState

COLUMNS = ("migration", "instance", "type", "from", "at source", "to", "at destination", "attempt", "resized", "copy")


@dataclass(frozen=True)
class Side:
    """One side of a move, and the host that told it."""

    host: str
    state: MigrationState


def sides(client: Client, host: str | None, open_only: bool) -> tuple[list[Side], dict[str, ComputeError]]:
    """Sides of moves on ``host``, or on every host that answers; and who did not answer."""
    names = client.host_names(host)
    answers, problems = client.everywhere(names, lambda name: client.api.list_migrations(open_only, host=name))
    return [Side(name, state) for name, found in answers.items() for state in found], problems


def migrations(ctl: Ctl) -> Exit:
    """Open moves of all hosts, or with ``--all`` also those that are closed and not forgotten yet."""
    found, problems = sides(ctl.client, ctl.args.host, not ctl.args.all)
    if ctl.out.as_json:
        listed = [{"host": side.host, "state": side.state} for side in found]
        ctl.out.document({"migrations": listed, "unreachable": sorted(problems)})
    else:
        ctl.out.table(COLUMNS, rows(found, time.time()))
    return told_problems(ctl, problems)


def rows(found: Iterable[Side], now: float) -> list[Sequence[object]]:
    """One row for each move, as :data:`COLUMNS`."""
    by_uuid: dict[str, dict[str, MigrationState]] = {}
    for side in found:
        by_uuid.setdefault(side.state.migration.uuid, {})[side.state.side] = side.state
    return [_row(both, now) for both in by_uuid.values()]


def _row(both: Mapping[str, MigrationState], now: float) -> Sequence[object]:
    source, destination = both.get("source"), both.get("destination")
    # The later attempt knows where it goes now.
    newest = max(both.values(), key=lambda state: state.migration.attempt).migration
    finished = destination.finished_at if destination is not None else None
    return (
        newest.uuid,
        newest.instance,
        newest.migration_type,
        newest.source_host,
        words(source),
        newest.dest_host,
        words(destination),
        newest.attempt,
        f"{span(now - finished)} ago" if finished else "",
        "kept at the source" if source is not None and source.has_copy else "",
    )


def words(state: MigrationState | None) -> str:
    """How one side is, in words."""
    if state is None:
        return "not told"
    status = state.migration.status.value
    return f"{status}: {state.refused}" if state.refused else status


def find_source_side(ctl: Ctl) -> Side:
    """The open source side of a move of the instance that the command line means: also where its destination, which
    has the instance now, is off.

    :raises MigrationNotFound: no host that answers is the source of an open move of it.
    """
    word = ctl.args.instance
    found, problems = sides(ctl.client, ctl.args.host, open_only=True)
    at_source = [side for side in found if side.state.side == "source"]
    hit = _meant(word, at_source)
    if not hit and not is_uuid(word):
        try:
            uuid = find_instance(ctl.client, word).instance.uuid
        except NotFound:
            uuid = word
        hit = [side for side in at_source if side.state.migration.instance == uuid]
    if len(hit) != 1:
        silent = f"; {', '.join(problems)} could not be asked" if problems else ""
        many = f"{len(hit)} hosts that answer are" if hit else "no host that answers is"
        raise MigrationNotFound(
            f"{many} the source of an open move of instance {safe(word)}: give the uuid{silent}", migration=word
        )
    return hit[0]


def _meant(word: str, among: Sequence[Side]) -> list[Side]:
    exact = [side for side in among if side.state.migration.instance == word]
    begun = [side for side in among if side.state.migration.instance.startswith(word.lower())]
    return exact or (begun if len(word) >= SHORTEST_PREFIX else [])


def migration_of(ctl: Ctl, host: str, uuid: str) -> Migration:
    """A move as its destination has it; raises what ``get_migration`` raises."""
    state: MigrationState = ctl.client.api.get_migration(uuid, host=host)
    return state.migration
