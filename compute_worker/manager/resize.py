"""Messages of a cold migration or resize: each method checks, accepts in one commit, and answers."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from compute_worker import errors, objects
from compute_worker.manager import resize_destination, resize_force, resize_source, resize_verdict
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.manager.lifecycle import Expiry
from compute_worker.manager.settler import Settler
from compute_worker.messages import Context, command, query
from compute_worker.moves import Move, Side
from compute_worker.objects import (
    Accepted,
    DiskInfo,
    HostName,
    Instance,
    Key,
    Migration,
    MigrationState,
    Name,
    OperationAnswer,
    Uuid,
)
from compute_worker.operations.database import Tx
from compute_worker.operations.service import Operations
from compute_worker.states import MigrationStatus

Attempt = Annotated[int, Meta(ge=1, le=1000)]
SideName = Annotated[str, Meta(pattern=r"^(source|destination)\Z")]
MessageName = Annotated[str, Meta(pattern=r"^[a-z_]{1,64}\Z")]


class ResizeEndpoint:
    """Commands and questions of moves. ``prep_resize``, ``confirm_resize`` and ``revert_resize`` are a conductor's;
    the others go between workers."""

    def __init__(self, core: Core, operations: Operations, switch: HostSwitch, settler: Settler) -> None:
        self._settler = settler
        self._core = core
        self._operations = operations
        self._switch = switch

    # --- a conductor's ------------------------------------------------------------------------------------------

    @command
    def prep_resize(
        self,
        context: Context,
        instance: Instance,
        migration: Migration,
        clean_shutdown: bool = True,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """At the destination: take the instance, with ``migration.new_flavor`` where it is given. The whole move
        follows: the guest is stopped, its disks come here, it starts here (RESIZED), or runs on where it was.

        Refused with ``reschedulable``: this host cannot take it. Then, and when it fails later for such a reason, the
        hosts of ``migration.alternates`` are asked in order.
        """
        try:
            return self._prep(context, instance, migration, clean_shutdown, Wish(operation, expires_at, check_only))
        except errors.Unschedulable:
            if not migration.alternates or check_only:
                raise
        args = {
            "instance": objects.encode(instance),
            "migration": objects.encode(migration),
            "clean_shutdown": clean_shutdown,
        }
        wish = Wish(operation, expires_at, check_only)
        return self._accept(context, "prep_resize_elsewhere", wish, lambda tx: False, migration, "prep_resize", args)

    def _prep(
        self, context: Context, instance: Instance, migration: Migration, clean_shutdown: bool, wish: Wish
    ) -> Accepted:
        resize_destination.check(self._core, instance, migration)
        full = msgspec.structs.replace(
            migration,
            status=MigrationStatus.PRE_MIGRATING,
            old_flavor=instance.flavor,
            new_flavor=migration.new_flavor or instance.flavor,
        )
        default = time.time() + self._core.settings.compute.command_expiry_build
        wish = Wish(wish.operation, default if wish.expires_at is None else wish.expires_at, wish.check_only)

        def admit(tx: Tx) -> bool:
            # A command without a uuid of its own is the chain's all the same: the migration's stands for it.
            move = Move(
                migration=full,
                side=Side.DESTINATION,
                instance=instance,
                operation=wish.operation or migration.uuid,
                clean_shutdown=clean_shutdown,
            )
            return resize_destination.admit(self._core, self._switch, tx, move)

        args = {"instance": objects.encode(instance), "migration": objects.encode(full)}
        wish = Wish(wish.operation or migration.uuid, wish.expires_at, wish.check_only)
        return self._accept(context, "prep_resize", wish, admit, migration, None, args)

    @command
    def confirm_resize(
        self,
        context: Context,
        instance: Uuid,
        migration: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Keep the instance where it is and drop the copy at the source. By either host; the destination decides.

        :raises MigrationNotFinished: it was reverted, or is not finished.
        """
        core, wish = self._core, Wish(operation, expires_at, check_only)
        if core.database.read(lambda tx: core.moves.find(tx, migration, Side.DESTINATION)) is not None:
            kind = resize_verdict.CONFIRM

            def admit(tx: Tx) -> bool:
                return resize_verdict.decide(core, tx, instance, migration, kind)
        else:
            kind = "drop_resize"

            def admit(tx: Tx) -> bool:
                return resize_verdict.admit_drop(core, tx, instance, migration)

        return accept(
            self._operations,
            context,
            kind,
            wish,
            admit,
            instance=instance,
            message=resize_verdict.CONFIRM,
            chain=migration,
        )

    @command
    def revert_resize(
        self,
        context: Context,
        instance: Uuid,
        migration: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """At the destination: give the instance back to the source as it was. What it wrote since is lost.

        :raises MigrationNotFinished: it was confirmed, or is not finished.
        """
        core = self._core
        return accept(
            self._operations,
            context,
            resize_verdict.REVERT,
            Wish(operation, expires_at, check_only),
            lambda tx: resize_verdict.decide(core, tx, instance, migration, resize_verdict.REVERT),
            instance=instance,
            chain=migration,
        )

    @command
    def take_back_instance(
        self,
        context: Context,
        instance: Uuid,
        migration: Uuid,
        destination_is_off: bool = False,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """At the source: run the instance here again, though the destination has not said no. Only for a destination
        that is off for good: refused while it answers. What it may have been there since is set aside when it returns.

        :raises InvalidState: ``destination_is_off`` is not said, the destination answers, or nothing was handed over.
        """
        core = self._core
        resize_force.require_silent(core, migration, destination_is_off)
        finished = core.moves.get(migration, Side.SOURCE).status is MigrationStatus.FINISHED
        answer = accept(
            self._operations,
            context,
            resize_verdict.BACK if finished else "take_back_instance",
            Wish(operation, expires_at, check_only),
            lambda tx: resize_force.admit(core, tx, instance, migration, finished),
            instance=instance,
            message="take_back_instance",
            chain=migration,
        )
        self._operations.wake(instance)
        return answer

    @command
    def forget_host(
        self,
        context: Context,
        forget: HostName,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Close every move with a host that never returns: what was handed to it is taken back, what came from it is
        confirmed by whoever asks for it, and deletes wait for it no longer. Refused while it answers."""
        core = self._core
        resize_force.require_host_silent(core, forget)
        touched: list[str] = []

        def admit(tx: Tx) -> bool:
            touched.extend(resize_force.forget(core, tx, forget))
            return True

        answer = accept(
            self._operations,
            context,
            "forget_host",
            Wish(operation, expires_at, check_only),
            admit,
            args={"forget": forget},
        )
        for uuid in touched:
            self._operations.wake(uuid)
        return answer

    # --- between workers ----------------------------------------------------------------------------------------

    @command
    def resize_instance(
        self,
        context: Context,
        instance: Uuid,
        migration: Migration,
        clean_shutdown: bool = True,
        machine_arch: Name = "",
        journal_id: Name = "",
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """From the destination to the source: stop the guest, set it aside, send its disks, hand over."""
        if migration.source_host != self._core.host or migration.instance != instance or operation is None:
            problem = f"migration {migration.uuid} does not leave host {self._core.host} with instance {instance}"
            raise errors.InvalidCommand(method="resize_instance", problem=problem)
        named = operation

        def admit(tx: Tx) -> bool:
            record = self._core.store.require(tx, instance)
            move = Move(
                migration=msgspec.structs.replace(migration, status=MigrationStatus.MIGRATING),
                side=Side.SOURCE,
                instance=record,
                operation=named,
                journal_id=journal_id,
                clean_shutdown=clean_shutdown,
            )
            return resize_source.admit(self._core, tx, move, machine_arch)

        wish = Wish(operation, expires_at, check_only)
        return self._accept(context, "resize_instance", wish, admit, migration)

    @command
    def finish_resize(
        self,
        context: Context,
        instance: Instance,
        migration: Migration,
        disk_info: DiskInfo,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """From the source to the destination: everything is there; decide. From now on the source asks and waits."""

        def admit(tx: Tx) -> bool:
            core = self._core
            core.store.forbid_deleted(tx, instance.uuid)
            if core.moves.find(tx, migration.uuid, Side.DESTINATION) is None and resize_destination.remember(
                core, tx, operation or migration.uuid, instance, migration, disk_info
            ):
                return True
            move = core.moves.require(tx, migration.uuid, Side.DESTINATION)
            if move.migration.attempt != migration.attempt or move.closed or move.instance.uuid != instance.uuid:
                raise errors.MigrationNotFinished(migration=migration.uuid, status=move.status.value)
            if not move.handed_over and move.status is MigrationStatus.PRE_MIGRATING:
                core.moves.change(
                    tx,
                    migration.uuid,
                    Side.DESTINATION,
                    MigrationStatus.POST_MIGRATING,
                    handed_over=True,
                    instance=instance,
                    disk_info=disk_info,
                )
            return True

        wish = Wish(operation, expires_at, check_only)
        args = {"migration": migration.uuid, "attempt": migration.attempt}
        answer = self._accept(context, "finish_resize", wish, admit, migration, None, args)
        self._operations.wake(instance.uuid)
        return answer

    @command
    def finish_revert_resize(
        self,
        context: Context,
        instance: Uuid,
        migration: Uuid,
        attempt: Attempt = 1,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """From the destination to the source: bring back what was set aside; decide."""
        return accept(
            self._operations,
            context,
            resize_verdict.BACK,
            Wish(operation, expires_at, check_only),
            lambda tx: resize_verdict.admit_back(self._core, tx, instance, migration),
            instance=instance,
            chain=migration,
            attempt=attempt,
        )

    @query
    def settle_operation(
        self,
        context: Context,
        message: MessageName,
        instance: Uuid,
        settle: Uuid,
        attempt: Attempt = 1,
        revoke: bool = False,
    ) -> OperationAnswer:
        """What became of a peer's command. One that never came is refused from now on; ``revoke`` ends one that is not
        past its COMMIT."""
        answer = self._operations.settle(message, instance, settle, attempt, revoke)
        return resize_force.completed(self._core, answer, message, instance)

    @query
    def get_migration(self, context: Context, migration: Uuid, side: SideName = "destination") -> MigrationState:
        """One side of a move, as this host knows it."""
        move = self._core.moves.get(migration, Side(side))
        return resize_force.state_of(self._core, move)

    @query
    def list_migrations(self, context: Context, open_only: bool = True) -> list[MigrationState]:
        """The sides of moves that this host has, in order of change."""
        moves = self._core.moves.list(open_only)
        copies = resize_force.copies_of(self._core, moves)
        return [resize_force.state_of(self._core, move, copies) for move in moves]

    @query
    def answer_peer(self, context: Context, migration: Uuid, request: dict[Key, Any]) -> dict[str, Any]:
        """A question of the source's driver to this host's, about a move to this host that is not committed."""
        move = self._core.moves.get(migration, Side.DESTINATION)
        if move.status is not MigrationStatus.PRE_MIGRATING:
            raise errors.MigrationNotFinished(migration=migration, status=move.status.value)
        arriving = resize_destination.arriving(move)
        return dict(self._core.driver.answer_peer(arriving, move.migration, request))

    @query
    def peer_changed(self, context: Context, instance: Uuid) -> None:
        """Something about an instance has changed at a peer: whatever waits for it asks now."""
        self._operations.wake(instance)
        self._settler.wake(instance)

    def _accept(
        self,
        context: Context,
        kind: str,
        wish: Wish,
        admit: Any,
        migration: Migration,
        message: str | None = None,
        args: dict[str, Any] | None = None,
    ) -> Accepted:
        return accept(
            self._operations,
            context,
            kind,
            wish,
            admit,
            instance=migration.instance,
            args=args,
            message=message,
            chain=migration.uuid,
            attempt=migration.attempt,
        )
