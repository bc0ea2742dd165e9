"""Live migration, the destination's side: make ready what the guest will find, keep it when it came, else remove it.

Everything made here lies in a directory that is marked as the migration's (``migration.json``), and only such a
directory is ever removed. Where both hosts see one instances directory it is the source's own: nothing is made in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from compute_worker import errors, objects
from compute_worker.images import files
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job, NullJob, Part
from compute_worker.virt.libvirt import livemigration_postcopy, livemigration_probe, livemigration_tls
from compute_worker.virt.libvirt.accounts import guest_user
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.instance_dir import Arrival
from compute_worker.virt.libvirt.livemigration_disks import ArrivingDisks, Plan
from compute_worker.virt.libvirt.spawn import make_part
from compute_worker.virt.libvirt.transfer.address import in_url
from compute_worker.virt.libvirt.transfer.arrivals import Arrivals

_ARRIVAL = "migration.json"


class LiveMigrationDestination:
    """Guests that come here while they run. Thread-safe for different instances."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        self._settings = deeds.settings
        self._disks = deeds.disks
        self._directory = deeds.disks.directory
        self._arrivals = Arrivals(deeds.disks.directory)
        self._arriving = ArrivingDisks(deeds)

    # --- pre_live_migration -------------------------------------------------------------------------------------

    def parts(self, instance: Instance, migration: Migration, data: MigrateData, info: DiskInfo) -> list[Part]:
        """``make_directory, fetch_images, create_disks, plug_vifs, open_target``."""
        return [
            make_part(
                "make_directory",
                lambda job: self._make_directory(instance, migration, data, info, job),
                lambda job: self._remove_ours(instance.uuid, migration),
            ),
            make_part(
                "fetch_images",
                lambda job: self._arriving.fetch(instance, migration, data, info, job),
                lambda job: self._disks.discard_partials(instance),
            ),
            make_part("create_disks", lambda job: self._arriving.create(instance, migration, data, job)),
            make_part("plug_vifs", lambda job: self._deeds.plug_vifs(instance, job)),
            make_part("open_target", lambda job: self._open(instance, data, job)),
        ]

    def _make_directory(
        self, instance: Instance, migration: Migration, data: MigrateData, info: DiskInfo, job: Job
    ) -> None:
        """The guest can run here as it is, and the directory is this migration's.

        :raises Unschedulable: its processor or machine type is not to be had here.
        :raises NotSupported: guests must come by TLS here, and it would not.
        :raises DestinationDiskExists: the instance has a directory here that is not this migration's.
        """
        job.check()
        self._compare(data, job)
        livemigration_tls.demand(self._settings, data.native_tls)
        livemigration_probe.remove(self._directory.root, data.probe)
        uuid = instance.uuid
        if data.shared_instance_path:
            if self._directory.read_disk_info(uuid) is None:
                reason = f"host {migration.source_host} says that its directory is shared, and {uuid} is not seen here"
                raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
            return
        if data.disk_over_commit:
            self._need_room(sum(disk.allocated_bytes for disk in info.disks))
        moving = msgspec.structs.replace(instance, migration=migration.uuid)
        self._arrivals.begin(moving, migration)
        bases = {base.name: base.digest for base in data.bases if base.digest}
        arrival = Arrival(migration.uuid, migration.attempt, data.machine, bases=bases)
        self._directory.write_arrival(uuid, arrival)
        self._directory.write_use(uuid, self._arriving.use(data))

    def _compare(self, data: MigrateData, job: Job) -> None:
        facts = self._deeds.host.facts()
        if data.machine and facts.machine_types and data.machine not in facts.machine_types:
            raise errors.Unschedulable(
                f"host {self._settings.host}: its hypervisor does not know the guest's machine type {data.machine}"
            )
        if not data.cpu_xml:
            return
        fits, why = self._deeds.host.compare_guest_cpu(data.cpu_xml, data.machine)
        if not fits:
            raise errors.Unschedulable(f"host {self._settings.host}: the guest's processor: {why}")
        job.explain(f"the guest's processor: {why}")

    def _need_room(self, needed: int) -> None:
        with files.disk_errors(self._directory.root):
            found = os.statvfs(self._directory.root)
        if needed > found.f_bavail * found.f_frsize:
            raise errors.DiskFull(path=str(self._directory.root))

    def _open(self, instance: Instance, data: MigrateData, job: Job) -> Mapping[str, Any]:
        """What the source must know to come."""
        user = guest_user(self._deeds.host.capabilities_xml())
        problem = livemigration_postcopy.problem(user[0] if user else None, self._deeds.host.facts().hypervisor_version)
        if problem:
            job.explain(f"no post-copy to this host: {problem}")
        inbound, uuid = self._settings.live_migration.inbound_addr, instance.uuid
        plan = Plan() if data.shared_instance_path else self._arriving.plan(uuid)
        told = msgspec.structs.replace(
            data,
            disks=plan.travelling,
            full_copy=plan.full,
            post_copy=not problem,
            listen_address=inbound or None,
            migrate_uri=f"tcp://{in_url(inbound)}" if inbound else None,
            graphics_listen=self._settings.libvirt.graphics_listen,
            instance_path=str(self._directory.path(uuid)),
            base_path=str(self._directory.base),
            probe="",
            probe_content="",
            cpu_xml="",
            bases=[],
            files={},
        )
        return {"migrate_data": objects.encode(told)}

    # --- afterwards ---------------------------------------------------------------------------------------------

    def post(self, instance: Instance, migration: Migration) -> None:
        """The guest that came is defined, recorded and marked as this host's; what only its coming needed goes.

        :raises GuestFailed: it is not here, or has not come yet.
        """
        uuid = instance.uuid
        with self._deeds.needed(uuid) as guest:
            state = guest.state()
        if state.in_migration and state.power is not PowerState.RUNNING:
            raise errors.GuestFailed(instance=uuid, reason="its migration to this host has not ended")
        record = msgspec.structs.replace(instance, host=migration.dest_host)
        job = NullJob()
        self._deeds.plug_vifs(record, job)
        self._directory.write_record(record)
        self._deeds.define(record, job)
        self._deeds.save_record(record)
        self._arrivals.settle(instance)
        with files.disk_errors(self._directory.path(uuid)):
            if self._directory.arrival(uuid, migration.uuid) is not None:
                (self._directory.path(uuid) / _ARRIVAL).unlink(missing_ok=True)

    def rollback(self, instance: Instance, migration: Migration) -> None:
        """Nothing of the migration is here. Asked only when the source's flight is over.

        :raises InvalidState: the guest is here: it came.
        """
        uuid = instance.uuid
        guest = self._deeds.guest(uuid)
        try:
            state, kept = guest.state(), guest.is_persistent()
        except errors.InstanceNotFound:
            state, kept = None, False
        if state is not None and (kept or state.power is PowerState.RUNNING or state.in_postcopy):
            raise errors.InvalidState(
                instance=uuid,
                command="rollback_live_migration_at_destination",
                attribute="power_state",
                state=str(state.power),
            )
        if state is not None:
            guest.destroy()
        self._disks.discard_partials(instance)
        self._remove_ours(uuid, migration)

    def _remove_ours(self, uuid: str, migration: Migration) -> None:
        if self._deeds.power(uuid) is PowerState.RUNNING:
            raise errors.HypervisorBusy(reason=f"instance {uuid} runs here: its disks are not removed")
        ours = self._arrivals.owner(uuid) == migration.uuid
        if ours or self._directory.arrival(uuid, migration.uuid) is not None:
            self._directory.remove(uuid)

