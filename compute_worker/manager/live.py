"""Messages of a live migration: each method checks, accepts in one commit, and answers."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from compute_worker import errors, liveprogress, objects
from compute_worker.manager import live_destination, live_source
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.manager.lifecycle import Expiry
from compute_worker.messages import Context, command, query
from compute_worker.moves import Move, Side
from compute_worker.objects import Accepted, DiskInfo, Instance, MigrateData, Migration, Name, Uuid
from compute_worker.operations.database import Tx
from compute_worker.operations.service import Operations
from compute_worker.states import MigrationStatus
from compute_worker.virt.driver import HostResources

LONGEST_WAIT = 50.0
"""Seconds that ``pre_live_migration`` waits for what it began; asked again it goes on waiting."""
Forcing = Annotated[str, Meta(pattern=r"^(postcopy|pause)\Z")]


class LiveMigrationEndpoint:
    """``live_migration`` and what steers it are a conductor's; the others go between workers."""

    def __init__(self, core: Core, operations: Operations, switch: HostSwitch) -> None:
        self._core = core
        self._operations = operations
        self._switch = switch

    # --- a conductor's ------------------------------------------------------------------------------------------

    @query
    def check_can_live_migrate_destination(
        self, context: Context, instance: Instance, migration: Migration, disk_over_commit: bool = False
    ) -> MigrateData:
        """At the destination: whether the guest could run here, and may leave there. Changes nothing.

        :raises Refused: with the reason.
        """
        core = self._core
        if migration.dest_host != core.host or migration.source_host == core.host:
            problem = f"migration {migration.uuid} does not come to host {core.host} from another"
            raise errors.InvalidCommand(method="check_can_live_migrate_destination", problem=problem)
        if instance.block_device_info.block_device_mapping:
            raise errors.NotSupported(what=f"a move of instance {instance.uuid} with volumes")
        facts = core.peers.get_hypervisor(host=migration.source_host)
        source: HostResources = objects.decode(facts, HostResources, "get_hypervisor")
        data = core.driver.check_can_live_migrate_destination(instance, migration, source, disk_over_commit)
        return core.peers.check_can_live_migrate_source(instance, migration, data, host=migration.source_host)

    @command
    def live_migration(
        self,
        context: Context,
        instance: Uuid,
        migration: Migration,
        disk_over_commit: bool = False,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """At the source: move the running guest to ``migration.dest_host``. It runs there, or goes on here.

        :raises InvalidState: it does not run.
        """
        if migration.source_host != self._core.host or migration.instance != instance:
            problem = f"migration {migration.uuid} does not leave host {self._core.host} with instance {instance}"
            raise errors.InvalidCommand(method="live_migration", problem=problem)
        if migration.dest_host == migration.source_host:
            raise errors.InvalidCommand(method="live_migration", problem="source and destination are one host")
        named = operation or migration.uuid
        full = msgspec.structs.replace(migration, migration_type="live-migration", status=MigrationStatus.QUEUED)

        def admit(tx: Tx) -> bool:
            record = self._core.store.require(tx, instance)
            move = Move(
                migration=full, side=Side.SOURCE, instance=record, operation=named, disk_over_commit=disk_over_commit
            )
            return live_source.admit(self._core, tx, move)

        default = time.time() + self._core.settings.compute.command_expiry_build
        wish = Wish(named, default if expires_at is None else expires_at, check_only)
        args = {"migration": objects.encode(full), "disk_over_commit": disk_over_commit}
        return self._accept(context, "live_migration", wish, admit, instance, full, args)

    @command
    def live_migration_abort(
        self,
        context: Context,
        instance: Uuid,
        migration: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """At the source: stop a live migration; the guest goes on here.

        :raises InvalidState: it is over, or in post-copy: its memory is on two hosts then, and it cannot be stopped.
        """
        core = self._core
        move = core.moves.get(migration, Side.SOURCE)
        self._refuse_in_postcopy(move, "live_migration_abort")
        rows: list[int] = []

        def admit(tx: Tx) -> bool:
            _require_open(core, tx, instance, migration)
            rows.extend(self._operations.cancel(tx, move.operation))
            return True

        wish = Wish(operation, expires_at, check_only)
        answer = self._immediate(context, "live_migration_abort", wish, admit, instance, {"migration": migration})
        if not check_only:
            self._operations.interrupt(rows)
        return answer

    @command
    def live_migration_force_complete(
        self,
        context: Context,
        instance: Uuid,
        migration: Uuid,
        how: Forcing = "pause",
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """At the source: finish a live migration at the guest's expense: by post-copy, or paused until it is over.

        Asked for before the guest is on its way, it is done once it is.

        :raises InvalidState: it is over, or in post-copy: it ends by itself.
        """
        self._refuse_in_postcopy(self._core.moves.get(migration, Side.SOURCE), "live_migration_force_complete")

        def admit(tx: Tx) -> bool:
            _require_open(self._core, tx, instance, migration)
            self._core.moves.change(tx, migration, Side.SOURCE, force=how)
            return True

        wish = Wish(operation, expires_at, check_only)
        args = {"migration": migration, "how": how}
        answer = self._immediate(context, "live_migration_force_complete", wish, admit, instance, args)
        self._operations.wake(instance)
        return answer

    # --- between workers ----------------------------------------------------------------------------------------

    @query
    def get_hypervisor(self, context: Context) -> dict[str, Any]:
        """What this host's hypervisor is: what a destination compares itself with."""
        facts: dict[str, Any] = objects.encode(self._core.driver.get_available_resource())
        return facts

    @query
    def check_can_live_migrate_source(
        self, context: Context, instance: Instance, migration: Migration, data: MigrateData
    ) -> MigrateData:
        """From the destination to the source: which disks must travel, and whether the guest may."""
        record = self._core.store.get(instance.uuid)
        return self._core.driver.check_can_live_migrate_source(record, migration, data)

    @query
    def pre_live_migration(
        self,
        context: Context,
        instance: Instance,
        migration: Migration,
        data: MigrateData,
        disk_info: DiskInfo,
        journal_id: Name = "",
        operation: Uuid | None = None,
    ) -> MigrateData:
        """From the source to the destination: claim, prepare, and say how to come. Journalled: asked again, it goes on
        waiting for the same operation, or answers what it had answered.

        :raises HypervisorUnavailable: it is not ready yet: ask again.
        :raises ComputeError: it failed; everything is undone.
        """
        core = self._core
        if operation is None or migration.dest_host != core.host or migration.instance != instance.uuid:
            raise errors.InvalidCommand(method="pre_live_migration", problem="it is not for this host")
        named = operation

        def admit(tx: Tx) -> bool:
            move = Move(
                migration=msgspec.structs.replace(migration, status=MigrationStatus.PREPARING),
                side=Side.DESTINATION,
                instance=instance,
                operation=named,
                disk_info=disk_info,
                migrate_data=data,
                journal_id=journal_id,
            )
            return live_destination.admit(core, self._switch, tx, move)

        args = {"migration": migration.uuid}
        wish = Wish(operation, None, False)
        self._accept(context, "pre_live_migration", wish, admit, instance.uuid, migration, args)
        return self._prepared(migration, named)

    def _refuse_in_postcopy(self, move: Move, command: str) -> None:
        if move.closed or not move.handed_over:
            return
        try:
            stats = self._core.driver.get_job_statistics(move.instance.uuid)
        except errors.InstanceNotFound:
            return
        if stats.postcopy and stats.type in liveprogress.RUNNING:
            uuid, status = move.instance.uuid, MigrationStatus.RUNNING_POSTCOPY.value
            raise errors.InvalidState(
                f"instance {uuid}: its migration is {status}: it runs at host {move.other} while its memory is still"
                f" on host {move.migration.source_host}; nothing but its end can be waited for",
                instance=uuid, command=command, attribute="migration status", state=status,
            )  # fmt: skip

    def _prepared(self, migration: Migration, operation: str) -> MigrateData:
        def said() -> MigrateData | None:
            move = self._core.moves.get(migration.uuid, Side.DESTINATION)
            return move.migrate_data if move.handed_over and not move.closed else None

        self._operations.wait(lambda: said() is not None or self._operations.get(operation).state.final, LONGEST_WAIT)
        data = said()
        if data is not None:
            return data
        found = self._operations.get(operation)
        if found.state.final:
            raise errors.from_dict(found.error or {})
        raise errors.HypervisorUnavailable(reason=f"host {self._core.host} is still preparing ({found.phase})")

    def _accept(
        self,
        context: Context,
        kind: str,
        wish: Wish,
        admit: Any,
        instance: str,
        migration: Migration,
        args: dict[str, Any],
    ) -> Accepted:
        return accept(
            self._operations,
            context,
            kind,
            wish,
            admit,
            instance=instance,
            args=args,
            chain=migration.uuid,
            attempt=migration.attempt,
        )

    def _immediate(
        self, context: Context, kind: str, wish: Wish, admit: Any, instance: str, args: dict[str, Any]
    ) -> Accepted:
        return accept(self._operations, context, kind, wish, admit, instance=instance, args=args)


def _require_open(core: Core, tx: Tx, instance: str, migration: str) -> None:
    move = core.moves.require(tx, migration, Side.SOURCE)
    if move.instance.uuid != instance:
        raise errors.MigrationNotFound(migration=migration)
    if move.closed:
        raise errors.InvalidState(f"instance {instance}: migration {migration} is {move.status}: it is over")
