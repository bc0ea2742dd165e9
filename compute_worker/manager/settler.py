"""What nobody may have told this host about its moves: asked for, and acted on, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
import uuid

import msgspec

from compute_worker import errors
from compute_worker.manager import peers, resize_verdict
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.messages import Context
from compute_worker.moves import Move, Side
from compute_worker.objects import Accepted, MigrationState
from compute_worker.operations.database import Closed
from compute_worker.operations.service import Admit, Operations
from compute_worker.states import MigrationStatus, OperationState

LOG = logging.getLogger(__name__)
_SLOWEST = 12


def decide(move: Move, there: MigrationState | None, now: float, window: float) -> tuple[str | None, str]:
    """Which operation begins by itself about one side of a move, and why.

    :param there: the other side, where it was asked and has answered.
    :param window: ``resize_confirm_window``.
    """
    if move.status is not MigrationStatus.FINISHED or move.forced:
        return None, f"it is {move.status}"
    if move.side is Side.DESTINATION:
        if window and move.finished_at is not None and now - move.finished_at > window:
            return resize_verdict.CONFIRM, f"it was not reverted within {window:g} s"
        return None, "it waits for a decision"
    if move.same_host or there is None:
        return None, "the destination has not been heard of"
    if there.migration.status in (MigrationStatus.CONFIRMING, MigrationStatus.CONFIRMED):
        return "drop_resize", f"host {move.other} has confirmed it"
    return None, f"at host {move.other} it is {there.migration.status}"


class Settler:
    """Asks about moves that wait for a decision of another host, more and more seldom, and at once when told."""

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations
        self._woken = threading.Event()
        self._guard = threading.Lock()
        self._told: set[str] = set()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="settler", daemon=True)
        self._due: dict[tuple[str, Side], tuple[float, float]] = {}

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread; one that waits for an answer is left to the end of the process."""
        self._stopped = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def wake(self, instance: str) -> None:
        """Something has changed at a peer about an instance: ask now. Its other moves are not asked about."""
        with self._guard:
            self._told.add(instance)
        self._woken.set()

    def _loop(self) -> None:
        due, interval = 0.0, self._core.settings.compute.peer_ask_interval
        while not self._stopped:
            with self._guard:
                told, self._told = self._told, set()
            try:
                for instance in told:
                    self._look_again(instance)
                if time.monotonic() >= due:
                    due = time.monotonic() + interval
                    self._look_at_all(self._core.moves.list())
            except Closed:
                return
            except Exception:
                LOG.exception("moves that wait for a decision could not be looked at")
            self._woken.wait(max(0.0, due - time.monotonic()))
            self._woken.clear()

    def _look_again(self, instance: str) -> None:
        for move in self._core.database.read(lambda tx: self._core.moves.of(tx, instance)):
            self._due.pop((move.migration.uuid, move.side), None)
            self._look(move)

    def _look_at_all(self, moves: list[Move]) -> None:
        there = {(move.migration.uuid, move.side) for move in moves}
        for key in self._due.keys() - there:
            del self._due[key]
        for move in moves:
            self._look(move)

    def _look(self, move: Move) -> None:
        if self._stopped or move.status is not MigrationStatus.FINISHED:
            return
        there = self._ask(move) if move.side is Side.SOURCE and not move.same_host else None
        kind, why = decide(move, there, time.time(), self._core.settings.compute.resize_confirm_window)
        if kind is not None:
            self._begin(move, kind, why)

    def _ask(self, move: Move) -> MigrationState | None:
        key, first = (move.migration.uuid, move.side), self._core.settings.compute.peer_ask_interval
        due, interval = self._due.get(key, (0.0, first))
        if time.monotonic() < due:
            return None
        self._due[key] = (time.monotonic() + interval, min(interval * 2, first * _SLOWEST))
        try:
            return self._core.quick_peers.get_migration(move.migration.uuid, Side.DESTINATION.value, host=move.other)
        except errors.MigrationNotFound:
            if not peers.has_forgotten(self._core, move):
                return None
            confirmed = msgspec.structs.replace(move.migration, status=MigrationStatus.CONFIRMED)
            return MigrationState(migration=confirmed, side=Side.DESTINATION.value, operation=move.operation)
        except errors.ComputeError as exc:
            LOG.debug("migration %s: host %s: %s", move.migration.uuid, move.other, exc)
            return None

    def _begin(self, move: Move, kind: str, why: str) -> None:
        instance, migration = move.instance.uuid, move.migration.uuid
        LOG.info("instance %s: migration %s: %s: %s begins", instance, migration, why, kind)
        admit: Admit
        if kind == resize_verdict.CONFIRM:
            admit = lambda tx: resize_verdict.decide(self._core, tx, instance, migration, kind)  # noqa: E731
        else:
            admit = lambda tx: resize_verdict.admit_drop(self._core, tx, instance, migration)  # noqa: E731
        context = Context(request_id=f"req-{uuid.uuid4()}", message_id=str(uuid.uuid4()))
        # One operation however often it is found due, and on both hosts; another, where that one was undone.
        operation = str(uuid.uuid5(uuid.UUID(migration), "confirm"))

        def send(operation: str) -> Accepted:
            return accept(
                self._operations,
                context,
                kind,
                Wish(operation, None, False),
                admit,
                instance=instance,
                message=resize_verdict.CONFIRM,
                chain=migration,
            )

        try:
            if send(operation).state is OperationState.UNDONE:
                send(str(uuid.uuid4()))
        except errors.Refused as exc:
            LOG.warning("instance %s: %s was refused: %s", instance, kind, exc)
