"""What this driver cannot do: live migration, and snapshots. Each is refused before anything is touched."""

from __future__ import annotations

from typing import NoReturn

from compute_worker.errors import NotSupported
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration
from compute_worker.virt.driver import ComputeDriver, HostResources, Job, Part


def _refuse(what: str) -> NoReturn:
    raise NotSupported(what=f"{what} with the libvirt driver")


class Unsupported(ComputeDriver):
    """The refused half of the contract.

    :raises NotSupported: from every method.
    """

    def check_can_live_migrate_destination(
        self, instance: Instance, migration: Migration, source: HostResources, disk_over_commit: bool
    ) -> MigrateData:
        """Refused."""
        _refuse("live migration")

    def check_can_live_migrate_source(self, instance: Instance, migration: Migration, data: MigrateData) -> MigrateData:
        """Refused."""
        _refuse("live migration")

    def pre_live_migration(
        self, instance: Instance, migration: Migration, data: MigrateData, disk_info: DiskInfo
    ) -> list[Part]:
        """Refused."""
        _refuse("live migration")

    def live_migration(self, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        """Refused."""
        _refuse("live migration")

    def live_migration_abort(self, instance: Instance) -> None:
        """Refused."""
        _refuse("live migration")

    def live_migration_force_complete(self, instance: Instance, postcopy: bool) -> None:
        """Refused."""
        _refuse("live migration")

    def post_live_migration(self, instance: Instance, migration: Migration, data: MigrateData) -> None:
        """Refused."""
        _refuse("live migration")

    def post_live_migration_at_destination(self, instance: Instance, migration: Migration) -> None:
        """Refused."""
        _refuse("live migration")

    def rollback_live_migration_at_source(self, instance: Instance, migration: Migration) -> None:
        """Refused."""
        _refuse("live migration")

    def rollback_live_migration_at_destination(
        self, instance: Instance, migration: Migration, data: MigrateData | None
    ) -> None:
        """Refused."""
        _refuse("live migration")

    def snapshot(self, instance: Instance, image_id: str, live: bool) -> list[Part]:
        """Refused."""
        _refuse("snapshots")
