"""What is left over on a host: pure decisions from facts, and how the facts are gathered.

Nothing of an instance in the store, of an open move or of an open operation is ever removed by this. What another host
owns goes only when that host, asked, owns it, needs nothing here, and does not see the same directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from compute_worker import errors
from compute_worker.manager.core import Core
from compute_worker.moves import Move, Side
from compute_worker.objects import Finding, Instance, Operation
from compute_worker.operations import journal
from compute_worker.operations.database import Tx
from compute_worker.states import MigrationStatus, PowerState
from compute_worker.virt.driver import GuestInfo, Leftover

MOST_HOPS = 4
_ORDINARY = frozenset({"directory", "domain"})
"""What every instance of a host has."""


class OwnerSays(StrEnum):
    """What the host that owns an instance answers about what is left of it elsewhere."""

    NOT_ASKED = "was not asked"
    NEEDS_NOTHING = "owns it and needs nothing here"
    NEEDS_IT = "owns it and has an open move with this host"
    SHARES = "owns it and may see the same instances directory"
    DOES_NOT_OWN = "does not own it"
    SILENT = "does not answer"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the instance that something on this host belongs to."""

    this_host: str
    in_store: bool = False
    operation: str | None = None
    """Kind and phase of an open operation on it."""
    move: str | None = None
    """An open move of it, in words."""
    deleted: bool = False
    runs_here: bool = False
    owner: str | None = None
    """Who owns it, as the store or the record beside the disks says."""
    owner_says: OwnerSays = OwnerSays.NOT_ASKED


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to be done about it, and why; fields as in :class:`~compute_worker.objects.Finding`."""

    safe: bool
    reason: str
    remedy: str
    kept: bool = False


def judge(facts: Facts) -> Judgement:
    """Whether what is left of an instance may be removed without asking a person."""
    if facts.operation is not None:
        return Judgement(False, f"operation {facts.operation} is at it", "that operation ends it", kept=True)
    if facts.move is not None:
        return Judgement(False, facts.move, "confirm, revert or delete ends it", kept=True)
    if facts.in_store:
        return Judgement(False, "the instance is this host's", "its next operation, or its delete, takes it", kept=True)
    if facts.deleted:
        return Judgement(True, "the instance was deleted", "remove it")
    if facts.owner is None:
        return Judgement(False, "nothing says whose it is", "look at it: nobody but a person can know")
    if facts.owner == facts.this_host:
        reason = "its record names this host, and the journal does not have it"
        return Judgement(False, reason, "the next comparison adopts it, where it has heard nothing else of it")
    said = f"host {facts.owner} {facts.owner_says}"
    if facts.owner_says is not OwnerSays.NEEDS_NOTHING:
        return Judgement(False, said, "look at it, and at that host")
    if facts.runs_here:
        return Judgement(False, f"{said}, and a guest of it runs here", "look at both guests: one is too many")
    return Judgement(True, said, "remove it")


def is_finding(kind: str, facts: Facts) -> bool:
    """Whether it is worth telling: what every instance has, and what an operation works with, is not."""
    if facts.operation is not None:
        return False
    return not (kind in _ORDINARY and (facts.in_store or facts.move is not None))


def words_of_move(move: Move, now: float) -> str:
    """An open move, and what it waits for."""
    where = f"to host {move.other}" if move.side is Side.SOURCE else f"from host {move.other}"
    if move.status is MigrationStatus.FINISHED:
        since = f" since {now - move.finished_at:.0f} s" if move.finished_at else ""
        return f"migration {move.migration.uuid} {where} waits{since} for confirm or revert"
    return f"migration {move.migration.uuid} {where} is {move.status}"


def of_move(move: Move, now: float) -> Finding:
    """An open move as a finding."""
    decided = move.status is MigrationStatus.FINISHED
    return Finding(
        kind="move",
        instance=move.instance.uuid,
        where=move.migration.uuid,
        reason=words_of_move(move, now),
        kept=True,
        remedy="confirm or revert it" if decided else f"it goes on by itself with host {move.other}",
    )


def of_operation(operation: Operation) -> Finding | None:
    """An open operation as a finding, where it waits for something."""
    if not operation.waiting_for:
        return None
    return Finding(
        kind="operation",
        instance=operation.instance,
        where=operation.uuid,
        reason=f"{operation.kind} in {operation.phase} waits: {operation.waiting_for}",
        kept=True,
        remedy="it goes on by itself when that is there",
    )


def of_lock(name: str) -> Finding:
    """An image lock that hinders nobody."""
    return Finding(
        kind="lock", where=name, reason="nobody holds it, and no image goes with it", safe=True, remedy="remove it"
    )


class Examiner:
    """Gathers facts. One for each look: what a host said, or that it was silent, is asked once."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._records: dict[str, Instance] = {record.uuid: record for record in core.driver.list_records()}
        self._guests: dict[str, GuestInfo] = {guest.uuid: guest for guest in core.driver.list_instances()}
        self._silent: set[str] = set()
        self._needed: dict[str, set[str]] = {}
        self._known: dict[str, Facts] = {}

    def leftovers(self) -> list[Leftover]:
        """Everything of any instance on this host."""
        return self._core.driver.list_leftovers()

    def findings(self, leftovers: Iterable[Leftover]) -> list[Finding]:
        """Those of ``leftovers`` that are worth telling."""
        found = []
        for left in leftovers:
            facts = self.facts(left.uuid)
            if not is_finding(left.kind, facts):
                continue
            judged = judge(facts)
            found.append(
                Finding(
                    kind=left.kind,
                    instance=left.uuid,
                    where=left.where,
                    reason=judged.reason,
                    safe=judged.safe,
                    kept=judged.kept,
                    remedy=judged.remedy,
                )
            )
        return found

    def facts(self, uuid: str, chain: str | None = None) -> Facts:
        """What is known of an instance. Asks its owner where only that decides.

        :param chain: an operation that does not count: the one that asks.
        """
        if uuid not in self._known:
            self._known[uuid] = self._gather(uuid, chain)
        return self._known[uuid]

    def _gather(self, uuid: str, chain: str | None) -> Facts:
        core = self._core

        def look(tx: Tx) -> tuple[bool, str | None, list[Move], bool, str | None]:
            entries = [e for e in journal.open_entries(tx, uuid) if e.chain != chain]
            busy = f"{entries[0].uuid} ({entries[0].kind}, {entries[0].phase})" if entries else None
            store = core.store
            return (
                store.find(tx, uuid) is not None, busy, core.moves.of(tx, uuid),
                store.is_deleted(tx, uuid), store.went_to(tx, uuid),
            )  # fmt: skip

        in_store, busy, moves, deleted, went_to = core.database.read(look)
        record, guest = self._records.get(uuid), self._guests.get(uuid)
        owner = went_to or (record.host if record else None) or (guest.owner if guest else None)
        settled = in_store or busy is not None or moves or deleted or owner in (None, core.host)
        says = OwnerSays.NOT_ASKED
        if not settled and owner is not None:
            owner, says = self._ask(uuid, owner)
        return Facts(
            this_host=core.host,
            in_store=in_store,
            operation=busy,
            move=words_of_move(moves[0], time.time()) if moves else None,
            deleted=deleted,
            runs_here=guest is not None and (guest.silent or guest.power_state not in _OFF),
            owner=owner,
            owner_says=says,
        )

    def _ask(self, uuid: str, host: str) -> tuple[str, OwnerSays]:
        """Follow the trail of who has it, and ask the last one. Silence says nothing."""
        peers = self._core.quick_peers
        for _ in range(MOST_HOPS):
            if host in self._silent:
                return host, OwnerSays.SILENT
            try:
                record = peers.get_instance(uuid, host=host)
                if record.host != host:
                    return host, OwnerSays.DOES_NOT_OWN
                return host, self._asked(uuid, host)
            except errors.InstanceMoved as exc:
                host = str(exc.kwargs["host"])
                if host == self._core.host:
                    return host, OwnerSays.DOES_NOT_OWN
            except errors.Refused as exc:
                if isinstance(exc, errors.MessageUndeliverable):
                    return self._is_silent(host)
                return host, OwnerSays.DOES_NOT_OWN
            except errors.ComputeError:
                return self._is_silent(host)
        return host, OwnerSays.DOES_NOT_OWN

    def _is_silent(self, host: str) -> tuple[str, OwnerSays]:
        self._silent.add(host)
        return host, OwnerSays.SILENT

    def _asked(self, uuid: str, host: str) -> OwnerSays:
        peers, here = self._core.quick_peers, self._core.host
        moves = [s.migration for s in peers.list_migrations(host=host) if s.migration.instance == uuid]
        if any(here in (move.source_host, move.dest_host) for move in moves):
            return OwnerSays.NEEDS_IT
        mine = self._core.driver.get_available_resource().instances_id
        theirs = peers.get_host_state(host=host).instances_id
        if not mine or not theirs or mine == theirs:
            return OwnerSays.SHARES
        return OwnerSays.NEEDS_NOTHING


_OFF = frozenset({PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.NOSTATE})
