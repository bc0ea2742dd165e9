"""Live migration, the source's side: let go of the guest, or keep it.

Whether a migration was begun is on record (``live_migration.json`` beside the disks) before libvirt is asked: called
again after a death, this joins what is in the air, and begins nothing anew on disks at the destination that an earlier
flight has written to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import msgspec

from compute_worker import errors, liveprogress
from compute_worker.objects import Instance, MigrateData, Migration
from compute_worker.states import PowerState, VmState
from compute_worker.virt.driver import Job, JobStatistics, NullJob
from compute_worker.virt.libvirt import livemigration_plan, xml_builder
from compute_worker.virt.libvirt.coldmove_verdict import forget_precopy
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.instance_dir import DELETED
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.livemigration_flight import OUTGOING, Flight, look
from compute_worker.virt.libvirt.livemigration_plan import Itinerary, Luggage
from compute_worker.virt.libvirt.livemigration_record import Begun, Records
from compute_worker.virt.libvirt.livemigration_xml import Journey, Place, rewrite, targets
from compute_worker.virt.libvirt.transfer.precopy import Precopy

LOG = logging.getLogger(__name__)
_END_SECONDS = 30.0
"""An aborted job has ended by then."""


class LiveMigrationSource:
    """Guests that leave while they run. Thread-safe for different instances.

    :param forget: ends what else this driver keeps of an instance that goes.
    """

    def __init__(self, deeds: Deeds, warm: Precopy, forget: Callable[[str], None]) -> None:
        self._deeds = deeds
        self._settings = deeds.settings
        self._directory = deeds.disks.directory
        self._warm = warm
        self._forget = forget
        self._records = Records(deeds.disks.directory)

    # --- the move -----------------------------------------------------------------------------------------------

    def migrate(self, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        """See :meth:`compute_worker.virt.driver.ComputeDriver.live_migration`.

        :raises MigrationFailed: the guest is here as before.
        :raises GuestFailed: it is neither here nor known to have arrived: it ended meanwhile, or its post-copy broke.
        :raises HypervisorUnavailable: libvirt is not to be asked: called again this goes on.
        :raises Cancelled: the guest is here as before.
        """
        guest = self._deeds.guest(instance.uuid)
        where, _ = look(guest)
        begun = self._records.begun(instance.uuid, migration)
        if where == "gone":
            liveprogress.report(job, self._last(guest))
            return
        if where == "flying":
            job.explain("it is in the air already: joined")
            self._fly(guest, instance, migration, data, None, job)
        elif where == "broken":
            self._recover(guest, instance, migration, data, job)
        elif where == "here" and not begun:
            self._begin(guest, instance, migration, data, job)
        else:
            self._landed(guest, instance, migration, "it ended while nobody watched", job)

    def _begin(self, guest: Guest, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        job.check()
        self._drop_checkpoints(guest)
        journey = self._itinerary(guest, instance, migration, data)
        job.explain(f"to {journey.uri}, disks: {', '.join(disk.name for disk in data.disks) or 'none travel'}")
        if self._settings.live_migration.permit_post_copy and not journey.post_copy:
            job.explain("without post-copy: the guest is paused, or its destination cannot take it so")
        self._records.write(instance.uuid, Begun(migration.uuid, migration.attempt))
        self._fly(guest, instance, migration, data, journey, job)

    def _drop_checkpoints(self, guest: Guest) -> None:
        """Bitmaps and checkpoints do not travel, and libvirt lets no guest go that has some."""
        forget_precopy(self._deeds, self._warm, guest.uuid)
        for name in guest.checkpoints():
            guest.delete_checkpoint(name)

    def _itinerary(self, guest: Guest, instance: Instance, migration: Migration, data: MigrateData) -> Itinerary:
        uuid = instance.uuid
        here = Place(str(self._directory.path(uuid)), str(self._directory.base))
        there = Place(data.instance_path or here.instance, data.base_path or here.base)
        journey = Journey(here, there, data.disks, data.graphics_listen or "")
        marked = msgspec.structs.replace(instance, migration=migration.uuid)
        metadata = xml_builder.metadata(marked, self._deeds.host.name)
        live, defined = (guest.xml(migratable=True, secure=True, inactive=inactive) for inactive in (False, True))
        luggage = Luggage(
            live_xml=rewrite(live, instance, journey, metadata),
            persistent_xml=rewrite(defined, instance, journey, metadata),
            targets=targets(live, here, [disk.name for disk in data.disks]),
            paused=guest.power_state() is PowerState.PAUSED,
            hypervisor_version=self._deeds.host.facts().hypervisor_version,
        )
        if len(luggage.targets) != len(data.disks):
            reason = f"the guest has {len(luggage.targets)} of the {len(data.disks)} disks that are to travel"
            raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
        return livemigration_plan.itinerary(self._settings.live_migration, migration, data, luggage)

    def _fly(
        self,
        guest: Guest,
        instance: Instance,
        migration: Migration,
        data: MigrateData,
        journey: Itinerary | None,
        job: Job,
    ) -> None:
        options = self._settings.live_migration
        size = (instance.flavor.memory_mb << 20) + sum(disk.allocated_bytes for disk in data.disks)
        assumed = journey or Itinerary("", 0, {}, options.permit_post_copy, options.permit_auto_converge)
        emulated = self._deeds.host.facts().domain_type == "qemu"
        policy = livemigration_plan.policy(options, assumed, size, emulated=emulated)
        flight = Flight(guest, journey, policy, job, self._deeds.host.subscribe, lambda: self._hold(guest))
        said = flight.run()
        if isinstance(said, errors.HypervisorUnavailable):
            raise said
        if journey is not None and said is None:
            last = self._last(guest)
            liveprogress.report(job, last)
            LOG.info("instance %s: it has arrived: %s", guest.uuid, livemigration_plan.summary(last))
            return
        why = flight.why_aborted or (str(said) if said is not None else "libvirt does not say why")
        self._landed(guest, instance, migration, why, job)

    def _last(self, guest: Guest) -> JobStatistics:
        try:
            return guest.job_stats(completed=True)
        except errors.ComputeError:
            return JobStatistics(type="none")

    def _landed(self, guest: Guest, instance: Instance, migration: Migration, why: str, job: Job) -> None:
        """It is over, and libvirt says where the guest is. Returns when it arrived."""
        where, state = look(guest)
        if where == "gone":
            liveprogress.report(job, self._last(guest))
            return
        if where == "here":
            job.check()
            raise errors.MigrationFailed(migration=migration.uuid, reason=why, instance=instance.uuid)
        if where == "broken":
            self._broken(instance, why)
        found = f"it is {state.state} ({state.reason})" if state is not None else "it is not defined any more"
        if where == "flying":
            raise errors.HypervisorBusy(reason=f"the migration of instance {instance.uuid} is still in the air ({why})")
        raise errors.GuestFailed(instance=instance.uuid, reason=f"{found} on host {self._deeds.host.name}: {why}")

    def _broken(self, instance: Instance, why: str) -> NoReturn:
        reason = (
            f"its post-copy was interrupted ({why}): it stands still, its memory on both hosts; it goes on when they "
            "reach each other. Restart neither host, nor its hypervisor"
        )
        raise errors.GuestFailed(instance=instance.uuid, reason=reason)

    def _recover(self, guest: Guest, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        """Go on with a post-copy that was interrupted."""
        job.explain("its post-copy was interrupted: libvirt is asked to go on with it")
        journey = self._itinerary(guest, instance, migration, data)
        flags = journey.flags | livemigration_plan.RESUME
        self._fly(guest, instance, migration, data, replace(journey, flags=flags), job)

    # --- steering -----------------------------------------------------------------------------------------------

    def abort(self, instance: Instance) -> None:
        """See :meth:`compute_worker.virt.driver.ComputeDriver.live_migration_abort`."""
        guest = self._deeds.guest(instance.uuid)
        where, state = look(guest)
        if where == "broken" or (state is not None and state.in_postcopy):
            raise errors.InvalidState(
                instance=instance.uuid,
                command="live_migration_abort",
                attribute="migration status",
                state="running (post-copy)",
            )
        if where == "flying":
            guest.abort_job()

    def force_complete(self, instance: Instance, postcopy: bool) -> None:
        """See :meth:`compute_worker.virt.driver.ComputeDriver.live_migration_force_complete`."""
        uuid = instance.uuid
        guest = self._deeds.guest(uuid)
        where, state = look(guest)
        if where != "flying":
            raise errors.InvalidState(
                instance=uuid, command="live_migration_force_complete", attribute="migration status", state=where
            )
        if state is not None and state.in_postcopy:
            return
        if postcopy:
            self._start_postcopy(guest)
            return
        self._hold(guest)

    def _hold(self, guest: Guest) -> None:
        """It stands still until it is there; on record first, so that it runs again where it does not get there."""
        begun = self._records.read(guest.uuid)
        if begun is not None:
            self._records.write(guest.uuid, msgspec.structs.replace(begun, paused=True))
        guest.pause()

    def _start_postcopy(self, guest: Guest) -> None:
        try:
            guest.start_postcopy()
        except errors.GuestFailed as exc:
            if self._settings.live_migration.permit_post_copy:
                raise
            raise errors.NotSupported(
                f"instance {guest.uuid}: its migration was begun without post-copy"
                f" (live_migration.permit_post_copy): {exc.message}"
            ) from None

    def statistics(self, uuid: str) -> JobStatistics:
        """Of the job that runs, else of the last one that ended, else type ``none``."""
        guest = self._deeds.guest(uuid)
        running = guest.job_stats()
        return running if running.type != "none" else guest.job_stats(completed=True)

    # --- afterwards ---------------------------------------------------------------------------------------------

    def post(self, instance: Instance, migration: Migration, data: MigrateData) -> None:
        """Nothing of the instance is here; a directory that both hosts see stays.

        :raises InvalidState: the guest runs here.
        """
        uuid = instance.uuid
        if self._deeds.power(uuid) is PowerState.RUNNING:
            raise errors.InvalidState(
                instance=uuid, command="post_live_migration", attribute="power_state", state="running"
            )
        self._deeds.undefine(uuid)
        self._forget(uuid)
        if data.shared_instance_path or self._is_theirs(uuid, migration):
            self._records.forget(uuid)
            return
        for suffix in (DELETED, ""):
            self._directory.remove(uuid, suffix)

    def _is_theirs(self, uuid: str, migration: Migration) -> bool:
        """Whether the directory is the one that the destination has taken over."""
        try:
            record = self._directory.read_record(uuid)
        except errors.Broken:
            return False
        return record is not None and record.host == migration.dest_host

    def rollback(self, instance: Instance, migration: Migration) -> None:
        """The guest goes on here; one that stood still for the migration alone runs again.

        :raises HypervisorBusy: the migration does not end.
        """
        uuid = instance.uuid
        guest = self._deeds.guest(uuid)
        self._end(guest)
        self._deeds.plug_vifs(instance, NullJob())
        begun = self._records.read(uuid)
        where, state = look(guest)
        if where == "here" and state is not None and state.power is PowerState.PAUSED:
            forced = begun is not None and begun.paused and instance.vm_state is not VmState.PAUSED
            if state.reason in ("migration", "starting_up") or forced:
                guest.resume()
        self._records.forget(uuid)

    def _end(self, guest: Guest) -> None:
        deadline = time.monotonic() + _END_SECONDS
        while look(guest)[0] == "flying":
            guest.abort_job()
            if NullJob().wait(lambda: look(guest)[0] != "flying", 1.0):
                return
            if time.monotonic() > deadline:
                raise errors.HypervisorBusy(reason=f"the migration of instance {guest.uuid} does not end ({OUTGOING})")
