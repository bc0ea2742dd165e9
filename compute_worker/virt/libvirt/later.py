"""What this driver cannot do: moves between hosts, and snapshots. Each is refused before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from compute_worker.errors import NotSupported
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration
from compute_worker.virt.driver import ComputeDriver, HostResources, Job, Part, Peer


def _refuse(what: str) -> NoReturn:
    raise NotSupported(what=f"{what} with the libvirt driver")


class Unsupported(ComputeDriver):
    """The refused half of the contract.

    :raises NotSupported: from every method.
    """

    def migrate_disk_and_power_off(
        self, instance: Instance, migration: Migration, timeout: float, retry_interval: float, peer: Peer
    ) -> list[Part]:
        """Refused."""
        _refuse("resize and cold migration")

    def answer_peer(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Refused."""
        _refuse("resize and cold migration")

    def finish_migration(self, instance: Instance, migration: Migration, disk_info: DiskInfo) -> list[Part]:
        """Refused."""
        _refuse("resize and cold migration")

    def confirm_migration(self, instance: Instance, migration: Migration, job: Job) -> None:
        """Refused."""
        _refuse("resize and cold migration")

    def set_aside(self, instance: Instance, migration: Migration) -> list[Part]:
        """Refused."""
        _refuse("resize and cold migration")

    def finish_revert_migration(self, instance: Instance, migration: Migration) -> list[Part]:
        """Refused."""
        _refuse("resize and cold migration")

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
