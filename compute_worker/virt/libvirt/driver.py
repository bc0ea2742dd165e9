"""The libvirt driver: QEMU and KVM guests of one host, behind the contract of every driver.

It keeps nothing in memory but the connection and what it learned of the host. libvirtd that goes away is waited for:
calls raise ``HypervisorUnavailable`` until it is back, and ``EventKind.CONNECTED`` says that it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.images.store import ImageStore
from compute_worker.objects import CachedImage, Diagnostics, DiskInfo, Instance, MigrateData, Migration
from compute_worker.states import PowerState
from compute_worker.virt.driver import (
    ComputeDriver,
    DriverEvent,
    EventKind,
    GuestInfo,
    HostResources,
    Job,
    JobStatistics,
    Leftover,
    Part,
    Peer,
    SnapshotRequest,
    SpawnRequest,
)
from compute_worker.virt.libvirt.accounts import blocked_at, groups_of, guest_user
from compute_worker.virt.libvirt.coldmove_destination import ColdMoveDestination
from compute_worker.virt.libvirt.coldmove_source import ColdMoveSource
from compute_worker.virt.libvirt.coldmove_verdict import ColdMoveVerdict
from compute_worker.virt.libvirt.console import Console
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.instance_dir import RESIZE
from compute_worker.virt.libvirt.driver_events import STAYED, translate
from compute_worker.virt.libvirt.events import Event
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.host import Host
from compute_worker.virt.libvirt.livemigration_checks import LiveMigrationChecks
from compute_worker.virt.libvirt.livemigration_destination import LiveMigrationDestination
from compute_worker.virt.libvirt.livemigration_source import LiveMigrationSource
from compute_worker.virt.libvirt.power import Power
from compute_worker.virt.libvirt.resources import Resources, can_direct_io
from compute_worker.virt.libvirt.snapshot_parts import Snapshots
from compute_worker.virt.libvirt.spawn import Spawner
from compute_worker.virt.libvirt.transfer.precopy import Precopy
from compute_worker.virt.libvirt.transfer.receiver import Receiver

LOG = logging.getLogger(__name__)
PROGRAMS = {"qemu-img": "qemu-utils", "setpriv": "util-linux", "prlimit": "util-linux"}
"""What every instance needs, with Debian's package."""
_MIGRATIONS = frozenset({"migration_in", "migration_out"})


class LibvirtDriver(ComputeDriver):
    """A driver over the libvirt of ``settings.libvirt.connection_uri``.

    :param host: the connection; default: one made from the settings. For tests.
    """

    def __init__(self, settings: Settings, host: Host | None = None) -> None:
        options = settings.libvirt
        self._settings = settings
        self._host = host or Host(
            options.connection_uri,
            host=settings.host,
            domain_type=options.virt_type,
            keepalive=(options.keepalive_interval, options.keepalive_count),
        )
        self._deeds = Deeds(settings, self._host, DiskBuilder(settings))
        self._console = Console(self._host)
        self._receiver = Receiver(settings, self._deeds.disks.directory)
        self._spawner = Spawner(self._deeds, self._console, self._receiver.abandon)
        self._power = Power(self._deeds)
        warm = Precopy(settings, self._deeds.disks.directory, self._deeds.disks.qemu_img)
        self._source = ColdMoveSource(self._deeds, self._power, warm)
        self._verdict = ColdMoveVerdict(self._deeds, warm)
        self._destination = ColdMoveDestination(self._deeds, self._receiver)
        self._checks = LiveMigrationChecks(self._deeds)
        self._arriving = LiveMigrationDestination(self._deeds)
        self._leaving = LiveMigrationSource(self._deeds, warm, self._forget)
        self._snapshots = Snapshots(self._deeds)
        self._resources = Resources(self._host, Path(settings.instances_path))
        self._listeners: tuple[Callable[[DriverEvent], None], ...] = ()

    # --- the host -----------------------------------------------------------------------------------------------

    @property
    def available(self) -> bool:
        """Whether libvirt answered when we last heard of it."""
        return self._host.is_connected

    def init_host(self, host: str) -> None:
        """Make the directories, look at the file system, begin to connect.

        :raises Broken: a directory is not writable, a program is missing; says what to do.
        """
        for program, package in PROGRAMS.items():
            if process.find_program(program) is None:
                raise errors.Broken(f"{program} is missing: install it (Debian's package {package})")
        self._host.name = host
        self._deeds.disks.prepare()
        self._deeds.direct_io = can_direct_io(Path(self._settings.instances_path))
        if not self._deeds.direct_io and self._settings.libvirt.disk_cachemode == "none":
            LOG.warning(
                "%s cannot do direct I/O: disks use cache mode writeback instead of none", self._settings.instances_path
            )
        self._host.subscribe(self._on_event)
        self._host.start()

    def cleanup_host(self) -> None:
        """Disconnect; guests run on, and no disk arrives any more."""
        self._receiver.stop_all()
        self._host.close()

    def register_event_listener(self, callback: Callable[[DriverEvent], None]) -> None:
        """``callback`` gets every event from now on, from the connection's own thread, one at a time."""
        self._listeners = (*self._listeners, callback)

    def _on_event(self, event: Event) -> None:
        told = translate(event)
        if told is None:
            return
        if told.kind is EventKind.CONNECTED:
            self._introduce()
        if told.kind is EventKind.MIGRATED_IN and self._stayed(told.uuid):
            told = replace(told, kind=EventKind.RESUMED, detail=STAYED)
        for listener in self._listeners:
            listener(told)

    def _stayed(self, uuid: str) -> bool:
        """Whether a guest that libvirt says was resumed by a migration is one that did not leave."""
        try:
            return self._deeds.guest(uuid).state().reason == STAYED
        except errors.ComputeError:
            return False

    def _introduce(self) -> None:
        """Say in the log what this host is, and what would keep its guests from their disks."""
        try:
            facts = self._host.facts()
            LOG.info(
                "libvirt %d, %s %d on %s: guests are of type %s: %s",
                facts.libvirt_version,
                facts.hypervisor_type,
                facts.hypervisor_version,
                facts.arch,
                facts.domain_type,
                facts.domain_type_reason,
            )
            self._warn_of_closed_directories()
        except errors.ComputeError as exc:
            LOG.error("libvirt answers, but cannot be used: %s", exc)

    def _warn_of_closed_directories(self) -> None:
        user = guest_user(self._host.capabilities_xml())
        path = Path(self._settings.instances_path)
        closed = blocked_at(path, user[0], groups_of(*user)) if user else None
        if user and closed:
            LOG.warning(
                "guests run as user %d and cannot pass %s on the way to their disks in %s: make it searchable for them "
                "(chmod o+x, or their group and chmod g+x)",
                user[0],
                closed,
                path,
            )

    def get_available_resource(self) -> HostResources:
        """At most 10 s old."""
        return self._resources.get()

    def list_instances(self) -> list[GuestInfo]:
        """Every domain that libvirt has."""
        return list(self._infos())

    def _infos(self) -> Iterator[GuestInfo]:
        for guest in self._host.list_guests():
            try:
                yield self._info(guest)
            except errors.InstanceNotFound:
                LOG.debug("instance %s went away while it was looked at", guest.uuid)
            except (errors.HypervisorBusy, errors.Broken) as exc:
                # One guest whose qemu hangs must not keep all others from being looked at.
                yield GuestInfo(guest.uuid, PowerState.NOSTATE, reason=str(exc), silent=True)

    def _info(self, guest: Guest) -> GuestInfo:
        state, record = guest.state(), guest.metadata()
        return GuestInfo(
            uuid=guest.uuid,
            power_state=state.power,
            name=guest.name(),
            owner=record.owner if record else None,
            generation=(record.generation or 0) if record else 0,
            migration=record.migration if record else None,
            reason=f"{state.state}: {state.reason}",
            migrating=state.in_migration or guest.job_operation() in _MIGRATIONS,
        )

    def list_leftovers(self) -> list[Leftover]:
        """Directories, half-written files, and domains that carry our metadata."""
        found = self._deeds.disks.directory.list_leftovers()
        for guest in self._host.list_guests():
            try:
                if guest.metadata() is not None:
                    found.append(Leftover(guest.uuid, "domain", guest.name()))
            except errors.InstanceNotFound:
                LOG.debug("instance %s went away while it was looked at", guest.uuid)
            except (errors.HypervisorBusy, errors.Broken) as exc:
                LOG.warning("instance %s is left out of what is left over: %s", guest.uuid, exc)
        return found

    def list_records(self) -> list[Instance]:
        """Every ``instance.json``."""
        return self._deeds.disks.directory.list_records()

    def manage_image_cache(self, used_images: set[str]) -> list[str]:
        """Bases that nobody names and nobody used for long."""
        return self._deeds.disks.cache.prune(used_images)

    def stale_image_locks(self, remove: bool = False) -> list[str]:
        """Lock files of images that never came, or are gone."""
        return self._deeds.disks.cache.stale_locks(remove)

    # --- one instance -------------------------------------------------------------------------------------------

    def get_info(self, uuid: str) -> GuestInfo:
        """Asked of libvirt now."""
        return self._info(self._deeds.guest(uuid))

    def save_record(self, instance: Instance) -> None:
        """``instance.json``, and the metadata of the running guest and its definition."""
        self._deeds.save_record(instance)

    def check_spawn(self, instance: Instance, request: SpawnRequest) -> None:
        """From the command alone."""
        self._spawner.check(instance, request)

    def spawn(self, instance: Instance, request: SpawnRequest) -> list[Part]:
        """``fetch_images, create_disks, plug_vifs, define, start_paused``."""
        return self._spawner.parts(instance, request)

    def destroy(self, instance: Instance) -> list[Part]:
        """``power_off, undefine, unplug_vifs, delete_files``."""
        return self._spawner.destroy_parts(instance)

    def power_on(self, instance: Instance, job: Job) -> None:
        """From its disks."""
        self._power.on(instance, job)

    def power_off(self, instance: Instance, job: Job, timeout: float = 0, retry_interval: float = 10) -> bool:
        """By ACPI, then by its plug."""
        return self._power.off(instance, job, timeout, retry_interval)

    def pause(self, instance: Instance) -> None:
        """Processors stop."""
        self._power.pause(instance)

    def unpause(self, instance: Instance) -> None:
        """Processors run."""
        self._power.unpause(instance)

    def suspend(self, instance: Instance, job: Job) -> None:
        """libvirt's managed save."""
        self._power.suspend(instance, job)

    def resume(self, instance: Instance, job: Job) -> None:
        """From the managed save, else from its disks."""
        self._power.resume(instance, job)

    def get_console_output(self, instance: Instance, tail_bytes: int) -> bytes:
        """From ``console.log`` and what it rolled over into.

        :raises InstanceNotFound: the instance has no directory here.
        """
        path = self._deeds.instance_path(instance.uuid)
        if path is None:
            raise errors.InstanceNotFound(instance=instance.uuid, host=self._host.name)
        return self._console.tail(instance.uuid, path, tail_bytes)

    def get_diagnostics(self, instance: Instance) -> Diagnostics:
        """libvirt's statistics of the guest.

        :raises InstanceNotFound: there is no such guest.
        """
        return self._deeds.guest(instance.uuid).diagnostics()

    def get_instance_disk_info(self, instance: Instance) -> DiskInfo:
        """Of the directory in use, else of the one set aside.

        :raises InstanceNotFound: the instance has no finished disks here.
        """
        for suffix in ("", RESIZE):
            info = self._deeds.disks.disk_info(instance.uuid, suffix)
            if info is not None:
                return info
        raise errors.InstanceNotFound(instance=instance.uuid, host=self._host.name)

    # --- cold migration and resize ------------------------------------------------------------------------------

    def migrate_disk_and_power_off(
        self, instance: Instance, migration: Migration, timeout: float, retry_interval: float, peer: Peer
    ) -> list[Part]:
        """``precopy, power_off, set_aside, send_<disk>..., verify_copy``."""
        return self._source.parts(instance, migration, timeout, retry_interval, peer)

    def answer_peer(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Asked by the source's ``precopy``, ``send_<disk>`` and ``verify_copy``."""
        return self._destination.answer(instance, migration, request)

    def finish_migration(self, instance: Instance, migration: Migration, disk_info: DiskInfo) -> list[Part]:
        """``verify_disks, fetch_images, grow_disks, plug_vifs, define, start_paused``."""
        return self._destination.parts(instance, migration, disk_info)

    def confirm_migration(self, instance: Instance, migration: Migration, job: Job) -> None:
        """Files alone: the guest that runs here now is left as it is."""
        self._verdict.confirm(instance, migration, job)

    def set_aside(self, instance: Instance, migration: Migration) -> list[Part]:
        """``set_aside``."""
        return self._destination.set_aside(instance, migration)

    def finish_revert_migration(self, instance: Instance, migration: Migration) -> list[Part]:
        """``restore_files, plug_vifs, define, start_paused``."""
        return self._verdict.revert_parts(instance, migration)

    # --- live migration -----------------------------------------------------------------------------------------

    def check_can_live_migrate_destination(
        self, instance: Instance, migration: Migration, source: HostResources, disk_over_commit: bool
    ) -> MigrateData:
        """Hosts are compared; the guest itself is, when it is prepared for."""
        return self._checks.destination(instance, migration, source, disk_over_commit)

    def check_can_live_migrate_source(self, instance: Instance, migration: Migration, data: MigrateData) -> MigrateData:
        """Adds what the running guest is; asks libvirt and the file system."""
        return self._checks.source(instance, migration, data)

    def pre_live_migration(
        self, instance: Instance, migration: Migration, data: MigrateData, disk_info: DiskInfo
    ) -> list[Part]:
        """``make_directory, fetch_images, create_disks, plug_vifs, open_target``."""
        return self._arriving.parts(instance, migration, data, disk_info)

    def live_migration(self, instance: Instance, migration: Migration, data: MigrateData, job: Job) -> None:
        """By libvirt, from host to host."""
        self._leaving.migrate(instance, migration, data, job)

    def live_migration_abort(self, instance: Instance) -> None:
        """Ends well when nothing is in the air."""
        self._leaving.abort(instance)

    def live_migration_force_complete(self, instance: Instance, postcopy: bool) -> None:
        """At once.

        :raises InvalidState: nothing is in the air.
        """
        self._leaving.force_complete(instance, postcopy)

    def get_job_statistics(self, uuid: str) -> JobStatistics:
        """Of the job that runs, else of the last one that ended (not after post-copy: libvirt keeps none).

        :raises InstanceNotFound: there is no such guest.
        """
        return self._leaving.statistics(uuid)

    def post_live_migration(self, instance: Instance, migration: Migration, data: MigrateData) -> None:
        """Never touches a guest that runs here."""
        self._leaving.post(instance, migration, data)

    def post_live_migration_at_destination(self, instance: Instance, migration: Migration) -> None:
        """Defined anew from its record, with this host as owner."""
        self._arriving.post(instance, migration)

    def rollback_live_migration_at_source(self, instance: Instance, migration: Migration) -> None:
        """Ends what is in the air; lets a guest run that stood still for it."""
        self._leaving.rollback(instance, migration)

    def rollback_live_migration_at_destination(
        self, instance: Instance, migration: Migration, data: MigrateData | None
    ) -> None:
        """A guest that came is no leftover: then nothing is removed.

        :raises InvalidState: it is here.
        """
        self._arriving.rollback(instance, migration)

    # --- snapshot -----------------------------------------------------------------------------------------------

    def snapshot(self, instance: Instance, request: SnapshotRequest) -> list[Part]:
        """``create_image, freeze, upload, publish``. ``freeze`` says how the disk was brought to stand still.

        :raises NotSupported: no such image store.
        """
        return self._snapshots.parts(instance, request)

    def image_store(self, name: str | None) -> ImageStore:
        """As the host's images are configured."""
        return self._deeds.disks.stores.get(name)

    def list_cached_images(self) -> list[CachedImage]:
        """``_base``."""
        return self._deeds.disks.cache.list_bases()

    def _forget(self, uuid: str) -> None:
        self._console.forget(uuid)
        self._receiver.abandon(uuid)
