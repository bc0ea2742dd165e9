"""Live migration on the fake driver: the simulated hypervisors do it, the driver prepares, watches and cleans up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from compute_worker import liveprogress
from compute_worker.config import Settings
from compute_worker.errors import (
    DestinationDiskExists,
    GuestFailed,
    InstanceExists,
    InstanceNotFound,
    InsufficientResources,
    InvalidState,
    MigrationFailed,
    NotSupported,
    PeerUnavailable,
    Unschedulable,
)
from compute_worker.objects import DiskInfo, Instance, MigrateData, Migration, encode
from compute_worker.states import PowerState
from compute_worker.virt.convergence import GIB, Action, Decision, History, Policy, decide
from compute_worker.virt.driver import EventKind, HostResources, Job, JobStatistics, Part
from compute_worker.virt.fake_base import FakeBase, disk_info_of
from compute_worker.virt.simulated.files import DELETED
from compute_worker.virt.simulated.flight import MIGRATING, Flight
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.model import File

LOOK_SECONDS = 0.5


class _Watched:
    """A flight that is looked at: told to its job, and steered as the policy says."""

    def __init__(self, flight: Flight, job: Job, policy: Policy) -> None:
        self._flight, self._job, self._policy = flight, job, policy
        self._history = History()
        self._began = time.monotonic()
        self.why_aborted = ""

    def look(self) -> None:
        """Tell and steer, once."""
        stats = self._flight.statistics()
        liveprogress.report(self._job, stats)
        self._history = self._history.seen(stats, time.monotonic() - self._began)
        decision = decide(self._history, self._policy)
        if decision.action is Action.WAIT:
            return
        self._act(decision)
        self._history = self._history.did(decision)
        self._job.explain(f"{decision.action}: {decision.reason}")

    def _act(self, decision: Decision) -> None:
        if decision.action is Action.DOWNTIME:
            self._flight.permit(decision.downtime_ms / 1000)
        elif decision.action is Action.ABORT:
            self.why_aborted = decision.reason
            self._flight.abort()
        else:
            self._flight.force(decision.action is Action.POSTCOPY)


class LiveMoves(FakeBase):
    """``check_can_live_migrate_*`` to ``rollback_live_migration_*``."""

    _settings: Settings

    def check_can_live_migrate_destination(
        self, instance: Instance, migration: Migration, source: HostResources, disk_over_commit: bool
    ) -> MigrateData:
        """By processor model, version, architecture, memory and disk."""
        uuid = instance.uuid
        with self._connection.call("check_destination", uuid) as host:
            if host.domain(uuid) is not None:
                raise InstanceExists(instance=uuid)
            self._check_compatible(host, source)
            used = sum(s.domain.memory_mb for s in host.slots.values() if s.domain is not None and s.domain.alive)
            if instance.flavor.memory_mb > host.memory_mb - used:
                raise InsufficientResources(
                    host=host.name,
                    resource="memory_mb",
                    requested=instance.flavor.memory_mb,
                    free=host.memory_mb - used,
                )
            free_gb = host.disk_gb - host.allocated() / (1 << 30)
            wanted_gb = instance.flavor.root_gb + instance.flavor.ephemeral_gb
            if not disk_over_commit and wanted_gb > free_gb:
                raise InsufficientResources(host=host.name, resource="disk_gb", requested=wanted_gb, free=free_gb)
            return MigrateData(migration=migration.uuid, block_migration=True, listen_address=host.name)

    def check_can_live_migrate_source(self, instance: Instance, migration: Migration, data: MigrateData) -> MigrateData:
        """All disks travel; the guest must be alive."""
        uuid = instance.uuid
        with self._connection.call("check_source", uuid) as host:
            power = host.power_of(uuid)
            if power not in (PowerState.RUNNING, PowerState.PAUSED):
                raise InvalidState(instance=uuid, command="live_migration", attribute="power_state", state=str(power))
            if migration.dest_host == host.name:
                raise NotSupported(what="live migration to the same host")
            disks = disk_info_of(host.directory(uuid) or {}, instance.image.id).disks
            return msgspec.structs.replace(data, block_migration=True, disks=disks)

    def pre_live_migration(
        self, instance: Instance, migration: Migration, data: MigrateData, disk_info: DiskInfo
    ) -> list[Part]:
        """``fetch_images, create_disks, plug_vifs, open_target``."""
        uuid = instance.uuid
        marked = msgspec.structs.replace(instance, migration=migration.uuid)

        def create(job: Job) -> None:
            self._create_empty(marked, disk_info, job)

        def open_target(job: Job) -> Mapping[str, Any]:
            target = msgspec.structs.replace(data, migrate_uri=f"fake://{self.simulated.name}")
            return {"migrate_data": encode(target)}

        return [
            self.fetch_part(instance),
            Part("create_disks", create, lambda j: self._remove_prepared(uuid, migration)),
            Part("plug_vifs", lambda j: self.plug_vifs(instance), lambda j: self.unplug_vifs(uuid)),
            Part("open_target", open_target, lambda j: None),
        ]

    def live_migration(self, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        """Attaches to a flight of the same migration, in the air or landed; else one takes off."""
        uuid = instance.uuid
        flight = self._attach(uuid, migration, data, job)
        flight.watch(job.wake)

        def abort() -> None:
            flight.abort()

        watched = _Watched(flight, job, self._policy(instance, data))
        with job.on_cancel(abort):
            while not flight.done.wait(LOOK_SECONDS):
                watched.look()
                self._connection.check()
        liveprogress.report(job, flight.statistics())
        if flight.state == "completed":
            return
        if flight.state == "cancelled":
            job.check()
        raise MigrationFailed(migration=migration.uuid, reason=watched.why_aborted or flight.reason, instance=uuid)

    def live_migration_abort(self, instance: Instance) -> None:
        """Ends well when nothing flies."""
        uuid = instance.uuid
        with self._connection.call("migration_abort", uuid):
            flight = self._flight(uuid)
            if flight is not None and not flight.done.is_set() and not flight.abort():
                raise InvalidState(
                    instance=uuid,
                    command="live_migration_abort",
                    attribute="migration status",
                    state="running (post-copy)",
                )

    def live_migration_force_complete(self, instance: Instance, postcopy: bool) -> None:
        """At the next step of the flight."""
        uuid = instance.uuid
        with self._connection.call("migration_force", uuid):
            flight = self._flight(uuid)
            if flight is None or flight.done.is_set():
                raise InvalidState(
                    instance=uuid,
                    command="live_migration_force_complete",
                    attribute="migration status",
                    state=flight.state if flight else "none",
                )
            flight.force(postcopy)

    def get_job_statistics(self, uuid: str) -> JobStatistics:
        """Of the last flight from here."""
        with self._connection.call("get_job_statistics", uuid):
            flight = self._flight(uuid)
            return flight.statistics() if flight is not None else JobStatistics(type="none")

    def post_live_migration(self, instance: Instance, migration: Migration, data: MigrateData) -> None:
        """Never touches a guest that runs here."""
        uuid = instance.uuid
        with self._connection.call("post_live_migration", uuid) as host:
            if host.power_of(uuid) is PowerState.RUNNING:
                raise InvalidState(
                    instance=uuid, command="post_live_migration", attribute="power_state", state="running"
                )
        self.undefine(uuid)
        self.unplug_vifs(uuid)
        self.delete_files(uuid, (DELETED, ""))

    def post_live_migration_at_destination(self, instance: Instance, migration: Migration) -> None:
        """Persistent, with this host as owner."""
        uuid = instance.uuid
        record = msgspec.structs.replace(instance, host=migration.dest_host)
        self.plug_vifs(instance)
        with self._connection.call("persist", uuid) as host:
            domain = self.need_domain(host, uuid)
            if domain.migrating and domain.power is not PowerState.RUNNING:
                raise GuestFailed(instance=uuid, reason="its migration to this host has not ended")
            domain.persistent = True
            self.stamp(host, domain, record)
            self.write_disks(host, record, {})

    def rollback_live_migration_at_source(self, instance: Instance, migration: Migration) -> None:
        """A guest that only the migration stopped runs on."""
        uuid = instance.uuid
        flight = self._flight(uuid)
        if flight is not None and not flight.done.is_set():
            flight.abort()
            flight.done.wait()
        self.plug_vifs(instance)
        with self._connection.call("rollback", uuid) as host:
            domain = host.domain(uuid)
            if domain is None:
                return
            domain.migrating = False
            if domain.power is PowerState.PAUSED and domain.reason == MIGRATING:
                host.power(domain, PowerState.RUNNING, "migration failed", EventKind.RESUMED)

    def rollback_live_migration_at_destination(
        self, instance: Instance, migration: Migration, data: MigrateData | None
    ) -> None:
        """A guest that runs here is no leftover: then nothing is removed.

        :raises InvalidState: it runs here.
        """
        uuid = instance.uuid
        with self._connection.call("rollback", uuid) as host:
            domain = host.domain(uuid)
            if domain is not None and (domain.persistent or domain.power is PowerState.RUNNING):
                raise InvalidState(
                    instance=uuid,
                    command="rollback_live_migration_at_destination",
                    attribute="power_state",
                    state=str(domain.power),
                )
        self.undefine(uuid)
        self.unplug_vifs(uuid)
        self._remove_prepared(uuid, migration)

    # --- helpers ------------------------------------------------------------------------------------------------

    def _flight(self, uuid: str) -> Flight | None:
        flight = self.simulated.cell.flights.get(uuid)
        return flight if flight is not None and flight.source is self.simulated else None

    def _attach(self, uuid: str, migration: Migration, data: MigrateData, job: Job) -> Flight:
        with self._connection.call("live_migration", uuid, job) as host:
            flight = self._flight(uuid)
            ours = flight is not None and flight.migration == migration.uuid
            if flight is not None and ours and (flight.state == "completed" or not flight.done.is_set()):
                return flight
            domain = host.domain(uuid)
            if domain is None:
                raise InstanceNotFound(instance=uuid, host=host.name)
            if not domain.alive:
                raise MigrationFailed(migration=migration.uuid, reason="the guest does not run", instance=uuid)
            dest = host.cell.hosts.get(migration.dest_host)
            if dest is None or not (dest.powered and dest.reachable and dest.hypervisor_up):
                raise PeerUnavailable(host=migration.dest_host)
            names = [disk.name for disk in data.disks]
            if any(name not in (dest.directory(uuid) or {}) for name in names):
                raise MigrationFailed(
                    migration=migration.uuid, reason=f"{dest.name} has no disks for it", instance=uuid
                )
            job.check()
            flight = Flight(host, dest, uuid, migration.uuid, names)
            flight.start()
            return flight

    def _policy(self, instance: Instance, data: MigrateData) -> Policy:
        options = self._settings.live_migration
        size = (instance.flavor.memory_mb << 20) + sum(disk.allocated_bytes for disk in data.disks)
        return Policy(
            size_gib=size / GIB,
            max_downtime_ms=options.max_downtime_ms,
            downtime_steps=options.downtime_steps,
            downtime_delay=options.downtime_delay,
            post_copy=options.permit_post_copy,
            completion_timeout=options.completion_timeout,
            timeout_action=options.timeout_action,
            progress_timeout=options.progress_timeout,
        )

    @staticmethod
    def _check_compatible(host: SimulatedHost, source: HostResources) -> None:
        for what, ours, theirs in (
            ("hypervisor", "fake", source.hypervisor_type),
            ("architecture", host.machine_arch, source.machine_arch),
            ("processor model", host.cpu_model, source.cpu_model),
        ):
            if theirs and ours != theirs:
                raise Unschedulable(f"host {host.name}: its {what} is {ours}, the source's {theirs}")
        if source.hypervisor_version > host.version:
            raise Unschedulable(
                f"host {host.name}: its hypervisor ({host.version}) is older than the source's "
                f"({source.hypervisor_version})"
            )

    def _create_empty(self, instance: Instance, disk_info: DiskInfo, job: Job) -> None:
        uuid = instance.uuid
        job.check()
        with self._connection.call("create_disks", uuid, job, files=True) as host:
            there = host.directory(uuid)
            record = self.record_of(host, uuid) if there else None
            if record is not None and record.migration != instance.migration:
                raise DestinationDiskExists(instance=uuid, path=host.path(uuid))
            disks = {
                disk.name: File(b"", disk.format, disk.virtual_size_bytes, disk.backing)
                for disk in disk_info.disks
                if disk.name not in (there or {})
            }
            self.write_disks(host, instance, disks)

    def _remove_prepared(self, uuid: str, migration: Migration) -> None:
        with self._connection.call("remove_copy", uuid, files=True) as host:
            record = self.record_of(host, uuid)
            if host.directory(uuid) is not None and (record is None or record.migration == migration.uuid):
                host.remove_directory(uuid)
                host.effect(uuid, "delete")
