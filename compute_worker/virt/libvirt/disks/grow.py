"""Disks that arrived become what the instance's flavor says: decided first, then done disk by disk.

Nothing here looks into a guest's file system, which the guest grows by itself, and no disk ever becomes smaller.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Disk, DiskInfo, Flavor, Instance
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks.builder import CONFIG, ROOT
from compute_worker.virt.libvirt.disks.plan import GIB, BlankDisk, DiskPlan

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job
    from compute_worker.virt.libvirt.disks.builder import DiskBuilder

SWAP = "disk.swap"
CONVERTED = ".converted"
"""A whole conversion of a disk that has not taken its place yet."""
_PHASE = "converting disk"


@dataclass(frozen=True, slots=True)
class Growth:
    """What is to be done, in this order. Disks by name; sizes in bytes."""

    drop: tuple[str, ...] = ()
    """Swap that the flavor no longer has, or has in another size."""
    make: tuple[BlankDisk, ...] = ()
    convert: tuple[str, ...] = ()
    resize: tuple[tuple[str, int], ...] = ()


def decide(instance: Instance, info: DiskInfo, wanted: DiskPlan, backend_format: str) -> Growth:
    """What turns the disks of ``info`` into those of ``instance``.

    :param wanted: ephemeral and swap disks of the instance's flavor.
    :param backend_format: what this host keeps new disks as; a raw disk becomes qcow2 where that is qcow2.
    :raises FlavorDiskTooSmall: a disk is larger than the flavor's: nothing of it may be cut off.
    """
    blanks = {blank.name: blank for blank in wanted.blanks}
    drop, resize = [], []
    for disk in info.disks:
        size = _wanted_size(instance, disk, blanks)
        if disk.name == SWAP and size != disk.virtual_size_bytes:
            drop.append(disk.name)
        elif size < disk.virtual_size_bytes:
            raise _too_small(instance, disk, size)
        elif size > disk.virtual_size_bytes:
            resize.append((disk.name, size))
    kept = {disk.name: disk for disk in info.disks if disk.name not in drop}
    return Growth(
        drop=tuple(drop),
        make=tuple(blank for name, blank in blanks.items() if name not in kept),
        convert=tuple(
            name for name, disk in kept.items() if (disk.format, backend_format) == ("raw", "qcow2") and name != CONFIG
        ),
        resize=tuple(resize),
    )


def _wanted_size(instance: Instance, disk: Disk, blanks: dict[str, BlankDisk]) -> int:
    if disk.name == ROOT:
        return instance.flavor.root_gb * GIB or disk.virtual_size_bytes
    if disk.name == CONFIG:
        return disk.virtual_size_bytes
    return blanks[disk.name].size_bytes if disk.name in blanks else 0


def _too_small(instance: Instance, disk: Disk, size: int) -> errors.FlavorDiskTooSmall:
    return errors.FlavorDiskTooSmall(
        f"instance {instance.uuid}: {disk.name} has {disk.virtual_size_bytes} bytes, flavor {instance.flavor.name} "
        f"gives {size}: a disk cannot shrink, choose a larger flavor",
        image=instance.image.id,
        needed=disk.virtual_size_bytes,
        given=size,
        instance=instance.uuid,
    )


class Grower:
    """Grows disks of this host's instances that nobody has open."""

    def __init__(self, disks: DiskBuilder) -> None:
        self._disks = disks

    def check(self, instance: Instance, info: DiskInfo, flavor: Flavor | None = None) -> Growth:
        """What :meth:`grow` would do for ``flavor`` (default: the instance's); touches nothing.

        :raises FlavorDiskTooSmall: see :func:`decide`.
        :raises Refused: the instance's ephemeral disks or swap are beyond the flavor.
        """
        target = instance if flavor is None else msgspec.structs.replace(instance, flavor=flavor)
        return decide(target, info, self._disks.planned(target, SpawnRequest()), self._disks.backend.format)

    def grow(self, instance: Instance, job: Job) -> DiskInfo:
        """The disks are as :meth:`check` decides, and ``disk.info`` says so.

        If the process dies inside, ``disk.info`` is still right for every disk that is there, and calling it again
        goes on.

        :raises FlavorDiskTooSmall: and nothing was changed.
        :raises DiskFull: no room; the disks are as whole as they were.
        """
        info = self._read(instance.uuid)
        for disk in info.disks:
            self._end_conversion(instance.uuid, disk.name)
        growth = self.check(instance, self._read(instance.uuid))
        for name in growth.drop:
            self._drop(instance.uuid, name)
        for name in growth.convert:
            self._convert(instance.uuid, name, job)
        for name, size in growth.resize:
            self._resize(instance.uuid, name, size, job)
        for blank in growth.make:
            made = self._disks.make_blank(instance, blank, job)
            self._write(instance.uuid, [*self._read(instance.uuid).disks, made])
        return self._read(instance.uuid)

    # --- inside -------------------------------------------------------------------------------------------------

    def _read(self, uuid: str) -> DiskInfo:
        info = self._disks.directory.read_disk_info(uuid)
        if info is None:
            raise errors.Broken(f"instance {uuid} has no disks on this host (no disk.info)")
        return info

    def _write(self, uuid: str, disks: list[Disk]) -> None:
        info = msgspec.structs.replace(self._read(uuid), disks=disks)
        self._disks.directory.write_disk_info(uuid, self._disks.directory.measured(uuid, info))

    def _change(self, uuid: str, name: str, **changes: object) -> None:
        disks = self._read(uuid).disks
        self._write(uuid, [msgspec.structs.replace(d, **changes) if d.name == name else d for d in disks])

    def _drop(self, uuid: str, name: str) -> None:
        path = self._disks.directory.path(uuid) / name
        with files.disk_errors(path):
            path.unlink(missing_ok=True)
            files.fsync(path.parent)
        self._write(uuid, [disk for disk in self._read(uuid).disks if disk.name != name])

    def _resize(self, uuid: str, name: str, size: int, job: Job) -> None:
        path = self._disks.directory.path(uuid) / name
        disk = next(disk for disk in self._read(uuid).disks if disk.name == name)
        self._disks.qemu_img.resize(path, disk.format, size, job)
        with files.disk_errors(path):
            files.fsync(path)
        self._change(uuid, name, virtual_size_bytes=size)
        job.explain(f"{name} grew from {disk.virtual_size_bytes} to {size} bytes")

    def _convert(self, uuid: str, name: str, job: Job) -> None:
        """A guest may have written the header of any format over its raw disk: so the raw one is gone before
        ``disk.info`` says qcow2, and no moment exists at which its bytes could be taken for a qcow2 (CVE-2016-2140)."""
        path = self._disks.directory.path(uuid) / name
        whole = path.with_name(name + CONVERTED)
        part = whole.with_name(whole.name + ".part")
        disk = next(disk for disk in self._read(uuid).disks if disk.name == name)
        with files.disk_errors(path):
            try:
                files.create_private(part)
                self._disks.qemu_img.convert(path, "raw", part, "qcow2", disk.virtual_size_bytes, job, _PHASE)
                files.publish(part, whole)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        self._end_conversion(uuid, name)
        job.explain(f"{name} became qcow2, as this host keeps its disks (libvirt.images_type)")

    def _end_conversion(self, uuid: str, name: str) -> None:
        path = self._disks.directory.path(uuid) / name
        whole = path.with_name(name + CONVERTED)
        with files.disk_errors(path):
            if not whole.exists():
                return
            if next(disk for disk in self._read(uuid).disks if disk.name == name).format == "raw":
                path.unlink(missing_ok=True)
                files.fsync(path.parent)
                self._change(uuid, name, format="qcow2", backing=None, backing_format=None)
            os.rename(whole, path)
            files.fsync(path.parent)
        self._disks.own(path)
