"""Bases under disks that move: whether the destination has the same bytes, and how it gets them where it has not.

An overlay is worth nothing without its base. The base of an image is known by its name, which follows from what was
declared of the image, and by its size; ephemeral and swap bases were made on the source, so that their bytes are
compared. What the destination cannot have from its image store the source sends, before the guest is shut down.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from compute_worker import errors
from compute_worker.images import files, inspect
from compute_worker.objects import Bytes, Disk, DiskInfo, ImageId, ImageMeta, Instance
from compute_worker.virt.libvirt.disks.builder import COPIED, KERNEL, RAMDISK, blank_of, boot_images
from compute_worker.virt.libvirt.disks.cache import base_name
from compute_worker.virt.libvirt.transfer.extents import data_extents

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job
    from compute_worker.virt.libvirt.disks.builder import DiskBuilder
    from compute_worker.virt.libvirt.disks.instance_dir import Arrival

PREFIX = "base."
"""Before the name of a base that the source sends into the instance's directory."""
_BLOCK = 1 << 16
_ZEROS = bytes(_BLOCK)
_MADE_HERE = re.compile(r"(ephemeral|swap)_")


class Standing(msgspec.Struct, frozen=True):
    """A base as the source has it. ``digest``: see :func:`content_digest`; empty: not needed so far."""

    name: ImageId
    size_bytes: Bytes
    digest: str = ""


def content_digest(path: Path, job: Job) -> str:
    """sha256 of a file's size and of its blocks that are not all zeros: the same wherever its holes are."""
    digest = hashlib.sha256()
    with files.disk_errors(path), open(path, "rb") as source:
        size, at = os.fstat(source.fileno()).st_size, 0
        digest.update(size.to_bytes(8, "big"))
        for begin, end in data_extents(source.fileno(), 0, size):
            at = max(at, begin // _BLOCK * _BLOCK)
            while at < end:
                job.check()
                block = os.pread(source.fileno(), _BLOCK, at)
                if block != _ZEROS[: len(block)]:
                    digest.update(at.to_bytes(8, "big") + block)
                at += _BLOCK
    return digest.hexdigest()


def made_here(name: str) -> bool:
    """Whether a base is one that a host made by itself, of no image."""
    return _MADE_HERE.match(name) is not None


class MovingBases:
    """The bases of disks that leave this host or come to it."""

    def __init__(self, disks: DiskBuilder) -> None:
        self._disks = disks
        self._base = disks.directory.base

    # --- source -------------------------------------------------------------------------------------------------

    def standing(self, info: DiskInfo, job: Job) -> list[Standing]:
        """Every base that the disks stand on here.

        :raises compute_worker.errors.Broken: one is missing.
        """
        found = []
        for name in sorted({disk.backing for disk in info.disks if disk.backing}):
            path = self._base / name
            with files.disk_errors(path):
                size = path.stat().st_size
            found.append(Standing(name, size, content_digest(path, job) if made_here(name) else ""))
        return found

    def with_digest(self, standing: Standing, job: Job) -> Standing:
        """The same, digest and all."""
        digest = standing.digest or content_digest(self._base / standing.name, job)
        return msgspec.structs.replace(standing, digest=digest)

    def offered(self, standing: list[Standing], directory: Path) -> dict[str, Path]:
        """Files that the destination may want beside the disks of an instance whose directory is ``directory``: none
        but these are ever sent."""
        boot = {name: directory / name for name in (KERNEL, RAMDISK)}
        return {**boot, **{PREFIX + one.name: self._base / one.name for one in standing}}

    # --- destination --------------------------------------------------------------------------------------------

    def names(self, standing: list[Standing]) -> list[str]:
        """Every name that these bases may have here."""
        return [name for one in standing for name in dict.fromkeys((one.name, _copied(one.name, one.digest)))]

    def wanted(self, instance: Instance, info: DiskInfo, standing: list[Standing], job: Job) -> dict[str, str]:
        """What the source must send beside the disks, by file name, and why.

        :raises compute_worker.errors.MigrationFailed: a base here has the same name and cannot be the same.
        """
        directory = self._disks.directory.path(instance.uuid)
        disks = {disk.backing: disk for disk in info.disks if disk.backing}
        reasons = {PREFIX + one.name: self._lacking(instance, disks[one.name], one, job)
                   for one in standing if one.name in disks}  # fmt: skip
        for name, meta in boot_images(instance.image):
            reasons[name] = "" if (self._base / base_name(meta)).exists() else self._absent(meta)
        return {name: why for name, why in reasons.items() if why and not (directory / name).exists()}

    def settle(self, instance: Instance, arrival: Arrival, job: Job) -> None:
        """Every base is there, and every disk stands on its own: the ones that were sent get their place, others come
        from the image store or are made. Kernel and ramdisk too.

        :raises compute_worker.errors.MigrationFailed: what was sent or made is not what the source has.
        """
        directory = self._disks.directory
        info = directory.read_disk_info(instance.uuid)
        if info is None:
            raise errors.Broken(f"instance {instance.uuid} has no disks on this host (no disk.info)")
        for disk in info.disks:
            if disk.backing is not None:
                self._adopt(instance, disk, disk.backing, arrival, job)
        self._disks.restore_bases(instance, job)
        for name, digest in arrival.bases.items():
            self._must_be(instance, name, digest, job)

    # --- inside -------------------------------------------------------------------------------------------------

    def _lacking(self, instance: Instance, disk: Disk, one: Standing, job: Job) -> str:
        """Why the source must send the base; empty: it need not."""
        if made_here(one.name):
            return self._lacking_made(disk, one, job)
        path = self._base / one.name
        if path.exists():
            if path.stat().st_size != one.size_bytes:
                problem = f"base {one.name} has {path.stat().st_size} bytes here and {one.size_bytes} at the source"
                raise errors.MigrationFailed(migration=instance.migration, reason=problem)
            return ""
        if base_name(instance.image) != one.name:
            return "no image gives it any more"
        return self._absent(instance.image)

    def _lacking_made(self, disk: Disk, one: Standing, job: Job) -> str:
        present = [path for name in self.names([one]) if (path := self._base / name).exists()]
        if not present and not COPIED.search(one.name):
            try:
                present.append(self._disks.blank_base(blank_of(disk, one.name), job).path)
            except (errors.CommandFailed, KeyError, ValueError, IndexError) as exc:
                return f"it cannot be made here ({exc})"
        if any(content_digest(path, job) == one.digest for path in present):
            return ""
        return "it is not here" if not present else "the one made here has other bytes"

    def _absent(self, meta: ImageMeta) -> str:
        try:
            self._disks.stores.get(meta.store).stat(meta.id)
        except errors.ComputeError as exc:
            return str(exc)
        return ""

    def _adopt(self, instance: Instance, disk: Disk, backing: str, arrival: Arrival, job: Job) -> None:
        directory, digest = self._disks.directory, arrival.bases.get(backing, "")
        sent = directory.path(instance.uuid) / (PREFIX + backing)
        name = self._name_here(backing, digest, job)
        if sent.exists():
            if not digest or content_digest(sent, job) != digest:
                problem = f"base {backing} is not what the source has"
                raise errors.MigrationFailed(migration=arrival.migration, reason=problem)
            inspect.check_base(sent, instance.image.id)
            self._disks.cache.adopt(name, sent, job)
            job.explain(f"{name} came from the source")
        if name != backing:
            path = directory.path(instance.uuid) / disk.name
            self._disks.qemu_img.point_to(path, os.path.relpath(self._base / name, path.parent), "raw", job)
            self._replace(instance.uuid, disk.name, name)

    def _name_here(self, backing: str, digest: str, job: Job) -> str:
        """What the base is called here: another name where its own is taken by other bytes."""
        path = self._base / backing
        if not made_here(backing) or not digest or not path.exists() or content_digest(path, job) == digest:
            return backing
        return _copied(backing, digest)

    def _replace(self, uuid: str, disk_name: str, backing: str) -> None:
        info = self._disks.directory.read_disk_info(uuid)
        if info is None:
            return
        disks = [
            msgspec.structs.replace(disk, backing=backing) if disk.name == disk_name else disk for disk in info.disks
        ]
        self._disks.directory.write_disk_info(uuid, msgspec.structs.replace(info, disks=disks))

    def _must_be(self, instance: Instance, name: str, digest: str, job: Job) -> None:
        info = self._disks.directory.read_disk_info(instance.uuid)
        used = {disk.backing for disk in info.disks} if info is not None else set()
        path = self._base / name
        if made_here(name) and name in used and content_digest(path, job) != digest:
            problem = f"base {name} has other bytes here than at the source"
            raise errors.MigrationFailed(migration=instance.migration, reason=problem)


def _copied(name: str, digest: str) -> str:
    if not made_here(name) or not digest or COPIED.search(name):
        return name
    return f"{name}_x{digest[:12]}"
