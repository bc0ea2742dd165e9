"""The disks that a live migration fills: made empty at the destination, on the bases that they have at the source.

A base is the same one when its image says so (a root disk's) or its bytes do (one that a host made by itself: an
ephemeral or swap disk's; never whatever happens to lie under that name, CVE-2013-7130). Where one cannot be had here
all disks are made on nothing, and travel whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Disk, DiskInfo, Instance, MigrateData, Migration
from compute_worker.virt.driver import Job
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.bases import PREFIX, MovingBases, Standing, content_digest, made_here
from compute_worker.virt.libvirt.disks.instance_dir import ImageUse
from compute_worker.virt.libvirt.livemigration_checks import unpack
from compute_worker.virt.libvirt.transfer.arrivals import Arrival

_CLUSTER = 65_536
_PLAN = "live_migration.part"


class Plan(msgspec.Struct, frozen=True):
    """How the disks are made here, as decided once: ``travelling`` by libvirt, ``sent`` with the request. ``full``: on
    nothing, as a base is not to be had."""

    travelling: list[Disk] = []
    sent: list[Disk] = []
    full: bool = False


class ArrivingDisks:
    """Disks of guests that come here while they run."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        self._disks = deeds.disks
        self._directory = deeds.disks.directory
        self._bases = MovingBases(deeds.disks)

    def use(self, data: MigrateData) -> ImageUse:
        """The bases that no cleaning may take away meanwhile."""
        return ImageUse(bases=self._bases.names(_standing(data)))

    def plan(self, uuid: str) -> Plan:
        """What :meth:`fetch` decided.

        :raises Broken: it was not called.
        """
        with files.disk_errors(self._plan_path(uuid)):
            return msgspec.json.decode(self._plan_path(uuid).read_bytes(), type=Plan)

    def fetch(
        self, instance: Instance, migration: Migration, data: MigrateData, info: DiskInfo, job: Job
    ) -> Mapping[str, Any] | None:
        """What the disks stand on is here, as far as it can be had; how each is made is on record.

        :raises MigrationFailed: what the two answers of the source say of its disks differs; a kernel cannot be had.
        """
        if data.shared_instance_path:
            return None
        sent = _sent(migration, data, info)
        standing = _standing(data)
        lacking = self._bases.wanted(instance, DiskInfo(disks=data.disks), standing, job)
        for name, why in lacking.items():
            if not name.startswith(PREFIX):
                reason = f"{name} is not on its destination and cannot be had there ({why}): migrate it cold"
                raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
            job.explain(f"{name.removeprefix(PREFIX)}: {why}: whole disks travel instead")
        found = {} if lacking else {one.name: self._base(instance, one, job) for one in standing}
        full = not all(found.get(disk.backing) for disk in data.disks if disk.backing is not None)
        made = [_on(disk, "" if full else found.get(disk.backing or "", "")) for disk in data.disks]
        # On record before any is made: whoever goes on after a death makes the same ones.
        plan = Plan(made, sent, full)
        files.write_atomic(self._plan_path(instance.uuid), msgspec.json.encode(plan))
        return {"full_copy": full}

    def create(
        self, instance: Instance, migration: Migration, data: MigrateData, job: Job
    ) -> Mapping[str, Any] | None:
        """Empty disks of the right size and format, the config drive as it is, kernel and ramdisk, ``disk.info`` and
        ``console.log``.

        :raises MigrationFailed: the directory is not this migration's.
        """
        uuid = instance.uuid
        if data.shared_instance_path:
            return None
        job.check()
        if self._directory.arrival(uuid, migration.uuid) is None:
            reason = f"{self._directory.path(uuid)} is not its own"
            raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
        plan = self.plan(uuid)
        if self._directory.read_disk_info(uuid) is None:
            for disk in plan.travelling:
                self._make(uuid, disk, job)
            for disk in plan.sent:
                self._write(uuid, disk, data.files[disk.name])
            info = DiskInfo(disks=[*plan.travelling, *plan.sent], image=instance.image.id)
            self._directory.write_disk_info(uuid, self._directory.measured(uuid, info))
        self._disks.restore_bases(instance, job)
        self._deeds.touch_console(uuid)
        return {"disks": [disk.name for disk in (*plan.travelling, *plan.sent)]}

    # --- inside -------------------------------------------------------------------------------------------------

    def _plan_path(self, uuid: str) -> Path:
        return self._directory.path(uuid) / _PLAN

    def _base(self, instance: Instance, one: Standing, job: Job) -> str:
        """The base's name here, fetched where it must be; empty: it cannot be had with the same bytes."""
        if not made_here(one.name):
            if not (self._directory.base / one.name).exists():
                self._disks.cache.ensure(instance.image, job)
            path = self._directory.base / one.name
            return one.name if path.exists() and path.stat().st_size == one.size_bytes else ""
        for name in self._bases.names([one]):
            path = self._directory.base / name
            if path.exists() and content_digest(path, job) == one.digest:
                return name
        return ""

    def _make(self, uuid: str, disk: Disk, job: Job) -> None:
        """Anew whatever is there: one that libvirt wrote to before is not empty."""
        path = self._directory.path(uuid) / disk.name
        with files.disk_errors(path):
            files.create_private(path)
            if disk.format == "raw":
                os.truncate(path, disk.virtual_size_bytes)
            else:
                backing = os.path.relpath(self._directory.base / disk.backing, path.parent) if disk.backing else None
                size, over = disk.virtual_size_bytes, disk.backing_format
                self._disks.qemu_img.create_blind(path, size, _CLUSTER, backing, over, job)
            self._disks.own(path)
            files.fsync(path)

    def _write(self, uuid: str, disk: Disk, packed: str) -> None:
        path = self._directory.path(uuid) / disk.name
        files.write_atomic(path, unpack(packed, disk.virtual_size_bytes))
        self._disks.own(path)


def _sent(migration: Migration, data: MigrateData, info: DiskInfo) -> list[Disk]:
    """The disks that come with the request: all that libvirt does not bring.

    :raises MigrationFailed: a disk is not what ``disk.info`` says, or nobody brings it.
    """
    told = {disk.name: disk for disk in info.disks}
    for name in told:
        # Not one of the records that lie beside disks.
        Arrival(Path(), name, migration.uuid)
    for disk in data.disks:
        here = told.get(disk.name)
        if here is None or (here.format, here.virtual_size_bytes) != (disk.format, disk.virtual_size_bytes):
            reason = f"{disk.name} is not what the source's disk.info says"
            raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
    rest = [disk for disk in info.disks if disk.name not in {one.name for one in data.disks}]
    lacking = [disk.name for disk in rest if disk.name not in data.files or disk.format != "raw"]
    if lacking or not data.disks:
        reason = f"nobody brings {', '.join(lacking) or 'a disk'}"
        raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
    return rest


def _standing(data: MigrateData) -> list[Standing]:
    return [Standing(base.name, base.size_bytes, base.digest) for base in data.bases]


def _on(disk: Disk, base: str) -> Disk:
    """The disk on that base; empty: on nothing."""
    if not base:
        return msgspec.structs.replace(disk, backing=None, backing_format=None)
    return msgspec.structs.replace(disk, backing=base)
