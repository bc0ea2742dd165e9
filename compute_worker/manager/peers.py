"""How two hosts agree: they tell and they ask, and a host that is silent has said nothing (``protocol.md`` 7)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import msgspec

from compute_worker import errors
from compute_worker.manager.core import Core
from compute_worker.moves import Move
from compute_worker.objects import (
    Accepted,
    DiskInfo,
    HostState,
    Instance,
    MigrateData,
    Migration,
    MigrationState,
    OperationAnswer,
)
from compute_worker.operations.kinds import Do, Result, Step
from compute_worker.operations.run import Run
from compute_worker.states import OperationState

LOG = logging.getLogger(__name__)
T = TypeVar("T")
_SLOWEST = 12
"""Times ``peer_ask_interval`` between two questions, at most."""


class Peers(Protocol):
    """Messages that workers send each other; :class:`compute_worker.rpc.client.ComputeAPI` is one.

    :raises PeerUnavailable: no answer: whether the message was served is not known.
    :raises MessageUndeliverable: nobody ever listened as that host.
    """

    def prep_resize(
        self, instance: Instance, migration: Migration, clean_shutdown: bool = ..., *, host: str, **options: Any
    ) -> Accepted:
        """Ask a destination to take the instance."""
        ...

    def resize_instance(
        self,
        instance: str,
        migration: Migration,
        clean_shutdown: bool = ...,
        machine_arch: str = ...,
        journal_id: str = ...,
        *,
        host: str,
        **options: Any,
    ) -> Accepted:
        """Ask the source to begin."""
        ...

    def finish_resize(
        self, instance: Instance, migration: Migration, disk_info: DiskInfo, *, host: str, **options: Any
    ) -> Accepted:
        """Hand over to the destination."""
        ...

    def confirm_resize(self, instance: str, migration: str, *, host: str, **options: Any) -> Accepted:
        """Ask the destination to decide; tell the source that it has."""
        ...

    def finish_revert_resize(
        self, instance: str, migration: str, attempt: int = ..., *, host: str, **options: Any
    ) -> Accepted:
        """Hand back to the source."""
        ...

    def terminate_instance(self, instance: str, *, host: str, **options: Any) -> Accepted:
        """A delete wins on every host."""
        ...

    def get_hypervisor(self, *, host: str) -> dict[str, Any]:
        """What a source's hypervisor is."""
        ...

    def check_can_live_migrate_destination(
        self, instance: Instance, migration: Migration, disk_over_commit: bool = ..., *, host: str
    ) -> MigrateData:
        """Whether the guest could run there."""
        ...

    def check_can_live_migrate_source(
        self, instance: Instance, migration: Migration, data: MigrateData, *, host: str
    ) -> MigrateData:
        """Whether the guest may leave, and which disks must travel."""
        ...

    def pre_live_migration(
        self,
        instance: Instance,
        migration: Migration,
        data: MigrateData,
        disk_info: DiskInfo,
        journal_id: str = ...,
        operation: str | None = ...,
        *,
        host: str,
    ) -> MigrateData:
        """Ask the destination to prepare; asked again it goes on."""
        ...

    def settle_operation(
        self, message: str, instance: str, settle: str, attempt: int = ..., revoke: bool = ..., *, host: str
    ) -> OperationAnswer:
        """What became of a command; one that never came is refused from now on."""
        ...

    def get_migration(self, migration: str, side: str = ..., *, host: str) -> MigrationState:
        """One side of a move."""
        ...

    def list_migrations(self, open_only: bool = ..., *, host: str) -> list[MigrationState]:
        """The sides of moves that a host has."""
        ...

    def get_instance(self, instance: str, *, host: str) -> Instance:
        """One instance; InstanceMoved says where it went."""
        ...

    def get_host_state(self, *, host: str) -> HostState:
        """What a host says of itself."""
        ...

    def answer_peer(self, migration: str, request: dict[str, Any], *, host: str) -> dict[str, Any]:
        """A question of the source's driver to the destination's."""
        ...

    def peer_changed(self, instance: str, *, host: str) -> None:
        """Something about an instance has changed: look. No answer is waited for."""
        ...


class Verdict(StrEnum):
    """What a peer's answer means for whoever waits for it."""

    WAIT = "wait"
    YES = "yes"
    """It decided for the move: it owns the instance."""
    NO = "no"
    """It never will: what was handed over may be taken back."""


@dataclass(frozen=True, slots=True)
class Question:
    """Which command of which host: the parts of its key."""

    host: str
    message: str
    instance: str
    operation: str
    attempt: int = 1


def decide(answer: OperationAnswer, journal_id: str, one_directory: bool = False) -> tuple[Verdict, str]:
    """What an answer means, and why.

    :param journal_id: the journal that had accepted the command, where that is known.
    :param one_directory: both sides work on the same files: what is being undone there is still at them.
    """
    if not answer.known:
        if journal_id and answer.journal_id != journal_id and not answer.clean:
            return Verdict.WAIT, "it has lost its journal and still has something of the instance"
        return Verdict.NO, "it never came there, and is refused from now on"
    if answer.committed:
        return Verdict.YES, "it is committed there"
    if answer.state in (OperationState.UNDONE, OperationState.REFUSED):
        return Verdict.NO, reason_of(answer)
    if answer.state is OperationState.UNDOING and not one_directory:
        return Verdict.NO, reason_of(answer)
    return Verdict.WAIT, f"it is in {answer.phase}"


def reason_of(answer: OperationAnswer) -> str:
    """The error that an answer carries, in words."""
    return str((answer.error or {}).get("message", f"it is {answer.state}"))


def ask(core: Core, question: Question, revoke: bool = False, *, quick: bool = False) -> OperationAnswer:
    """Ask once.

    :param quick: two seconds without an answer are silence, as a guest hangs on it.
    :raises PeerUnavailable: no answer, or none that says what became of it: its journal has no room, say. It may have
        decided all the same.
    """
    asked, host = core.quick_peers if quick else core.peers, question.host
    try:
        return reached(
            host,
            lambda: asked.settle_operation(
                question.message, question.instance, question.operation, question.attempt, revoke, host=host
            ),
        )
    except errors.PeerUnavailable:
        raise
    except errors.ComputeError as exc:
        raise errors.PeerUnavailable(f"host {host} cannot say what became of it: {exc}", host=host) from exc


def reached(host: str, call: Callable[[], T]) -> T:
    """``call()``. A host that was there before and has no queue now is one that does not answer: its broker was wiped.

    :raises PeerUnavailable: no answer.
    """
    try:
        return call()
    except errors.MessageUndeliverable as exc:
        raise errors.PeerUnavailable(host=host) from exc


def await_verdict(
    core: Core,
    run: Run,
    question: Question,
    move: Callable[[], Move],
    *,
    cancellable: bool = False,
    journal_id: str = "",
) -> tuple[bool, OperationAnswer, str]:
    """Ask until the other host has decided; others get the slot and the instance's line meanwhile.

    Not ``cancellable``: a cancel is passed on to the other host, and its answer counts.

    Returns whether it decided for it, the answer and the reason. By force of an operator (``Move.forced``) it is a no.
    """
    run.step_aside()
    interval = core.settings.compute.peer_ask_interval
    slowest = interval * _SLOWEST
    while True:
        if cancellable:
            run.check()
        now = move()
        if now.forced:
            return False, OperationAnswer(known=False), "an operator said that the other host is off and stays off"
        seen, cancelled = run.nudges, run.cancel_requested
        try:
            answer = ask(core, question, revoke=cancelled and not cancellable)
        except errors.PeerUnavailable as exc:
            run.waiting_for = str(exc)
        else:
            verdict, why = decide(answer, journal_id, now.one_directory)
            if verdict is not Verdict.WAIT:
                run.waiting_for = None
                return verdict is Verdict.YES, answer, why
            run.waiting_for = f"host {question.host}: {why}"
            run.report(run.phase, peer=question.host, peer_phase=answer.phase)
        rest(run, interval, seen, cancelled)
        interval = min(interval * 1.5, slowest)


def rest(run: Run, interval: float, seen: int, cancelled: bool) -> None:
    """So many seconds, unless it is nudged or cancelled since it was looked at."""
    run.sleep(interval, until=lambda: run.nudges != seen or run.cancel_requested != cancelled)


def asked(run: Run, host: str, call: Callable[[], T]) -> T:
    """``call()`` for an operation that goes on only with an answer: while there is none it holds neither its slot nor
    its instance's line.

    :raises PeerUnavailable: no answer, or the host has no room or something else to do with the instance first.
    """
    try:
        return reached(host, call)
    except (errors.InstanceBusy, errors.HostFull) as exc:
        run.step_aside()
        raise errors.PeerUnavailable(str(exc), host=host) from exc
    except errors.PeerUnavailable:
        run.step_aside()
        raise


def has_forgotten(core: Core, move: Move) -> bool:
    """Whether a destination that does not know a finished move any more has confirmed it, so long ago that its side is
    pruned: the instance is an ordinary one there, or was, and has gone on or was deleted. One that lost its journal has
    found the instance beside its disks, still under the move: it is told of it again."""
    try:
        there = core.quick_peers.get_instance(move.instance.uuid, host=move.other)
    except (errors.InstanceMoved, errors.InstanceDeleted):
        return True
    except errors.ComputeError:
        return False
    if there.migration != move.migration.uuid:
        return True
    remind(core, move)
    return False


def remind(core: Core, move: Move) -> None:
    """Tell a destination that has lost its journal of a move that it had finished: it can be confirmed and reverted
    there again (:func:`compute_worker.manager.resize_destination.remember`)."""
    leaving = msgspec.structs.replace(move.instance, migration=move.migration.uuid)
    info = move.disk_info or DiskInfo()
    try:
        core.peers.finish_resize(leaving, move.migration, info, host=move.other, operation=move.operation)
    except errors.ComputeError as exc:
        LOG.warning("migration %s: host %s has lost it, and cannot be told: %s", leaving.migration, move.other, exc)
    else:
        LOG.warning("migration %s: host %s had lost it with its journal, and was told", leaving.migration, move.other)


def nudge(core: Core, host: str, instance: str) -> None:
    """Tell a host that something about an instance has changed. It asks then; it would ask sooner or later anyway."""
    try:
        core.peers.peer_changed(instance, host=host)
    except errors.ComputeError as exc:
        LOG.debug("instance %s: host %s was not told: %s", instance, host, exc)


def superseded_by(core: Core, instance: Instance, move: Move) -> str | None:
    """Whether the other side of a move that is not closed has a newer copy of the instance (``protocol.md`` 8): the
    reason, or ``None``. A host that does not answer within 2 s has said nothing: the guest starts.

    :raises Retryable: it answers that it cannot say it now: it is not silent.
    """
    if move.same_host:
        return None
    other = "source" if move.side == "destination" else "destination"
    try:
        there = core.quick_peers.get_migration(move.migration.uuid, other, host=move.other)
    except errors.PeerUnavailable:
        return None
    except errors.Retryable:
        raise
    except errors.ComputeError:
        return None
    if there.generation <= instance.generation:
        return None
    return f"host {move.other} took the instance over by force (generation {there.generation})"


class Patience:
    """How long a destination may be silent while its source keeps a guest off for it and may still take it back.

    :param seconds: from the question on whose silence made a step fail, with no answer since.
    """

    def __init__(self, host: str, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._seconds = seconds
        self._clock = clock
        self._asked: float | None = None
        self._since: float | None = None

    def asks(self) -> None:
        """It is asked something."""
        self._asked = self._clock()

    def heard(self) -> None:
        """It has answered."""
        self._since = None

    def failed(self, migration: str) -> None:
        """A step failed for want of an answer.

        :raises MigrationFailed: that has been so for too long.
        """
        now = self._clock()
        if self._since is None:
            self._since = now if self._asked is None else self._asked
        silent = now - self._since
        if silent >= self._seconds:
            reason = f"host {self._host} has been silent for {silent:.0f} s, and nothing was handed over"
            raise errors.MigrationFailed(migration=migration, reason=reason)

    def step(self, step: Step) -> Step:
        """``step``, which is tried again only so long."""

        def do(run: Run) -> Result:
            try:
                return step.do(run)
            except errors.PeerUnavailable:
                self.failed(run.chain)
                raise

        return Do(step.name, do, step.undo, cancellable=step.cancellable)


def peer_of(core: Core, move: Move, patience: Patience) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """How the driver at the source asks the one at the destination."""
    host, uuid = move.migration.dest_host, move.migration.uuid

    def ask(request: Mapping[str, Any]) -> Mapping[str, Any]:
        patience.asks()
        answer = reached(host, lambda: core.peers.answer_peer(uuid, dict(request), host=host))
        patience.heard()
        return answer

    return ask
