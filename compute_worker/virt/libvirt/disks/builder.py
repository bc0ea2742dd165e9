"""The disks of an instance: images brought here, disks made, everything removed. What the driver's parts call.

Each method finds its own half-done work: a file without ``.part`` is whole, and once ``disk.info`` is there no disk is
touched again, for the guest may have written to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from compute_worker import errors
from compute_worker.images import files, inspect
from compute_worker.images.store import ImageStores
from compute_worker.objects import Disk, DiskInfo, ImageMeta, Instance
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks import backends, configdrive, ephemeral
from compute_worker.virt.libvirt.disks.cache import Base, ImageCache, base_name
from compute_worker.virt.libvirt.disks.instance_dir import RESIZE, ImageUse, InstancesDirectory
from compute_worker.virt.libvirt.disks.plan import GIB, MIB, BlankDisk, DiskPlan, plan
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg

if TYPE_CHECKING:
    from compute_worker.config import Settings
    from compute_worker.virt.driver import Job

ROOT = "disk"
CONFIG = "disk.config"
KERNEL = "kernel"
RAMDISK = "ramdisk"
COPIED = re.compile(r"_x[0-9a-f]{12}\Z")
"""End of a base's name that was made on another host, where the one made here has other bytes."""


class DiskBuilder:
    """Disks of this host's instances. Thread-safe for different instances."""

    def __init__(self, settings: Settings) -> None:
        self._libvirt = settings.libvirt
        self._group = settings.libvirt.disk_owner_group
        self.directory = InstancesDirectory(settings.instances_path, self._group)
        self.stores = ImageStores(settings.images)
        self.qemu_img = QemuImg(settings.images.qemu_img_cpu_seconds, settings.images.qemu_img_memory_mb)
        self.cache = ImageCache(self.directory, self.stores, self.qemu_img, settings.images)
        self.backend = backends.load(settings.libvirt.images_type, self.qemu_img)
        self._available = ephemeral.available_formats()

    def prepare(self) -> None:
        """Make the directories of this host (for ``init_host``)."""
        self.directory.prepare()

    def check(self, instance: Instance, request: SpawnRequest) -> DiskPlan:
        """The disks ``instance`` would get; touches nothing and asks nobody.

        :raises compute_worker.errors.Refused: see :func:`compute_worker.virt.libvirt.disks.plan.plan`; also an image
            store that is not installed.
        """
        self.stores.get(instance.image.store)
        return self.planned(instance, request)

    def planned(self, instance: Instance, request: SpawnRequest) -> DiskPlan:
        """The same of an instance whose root disk is there: its image store is not looked for."""
        return plan(instance, request, self._libvirt.default_ephemeral_format, self._available)

    def prepare_images(self, instance: Instance, job: Job) -> list[Base]:
        """Bring kernel, ramdisk and the root disk's base to this host. Blocks as long as that takes; progress in bytes.

        The instance's directory is made and its ``images.json`` says what is used, so that no cleaning takes it away.

        :raises compute_worker.errors.ImageStoreUnavailable: tried again, it goes on where it stopped.
        :raises compute_worker.errors.ImageUnacceptable: also ``ImageNotFound``, ``FlavorDiskTooSmall``, checksum.
        """
        image = instance.image
        names = self._base_names(instance)
        self.check(instance, SpawnRequest())
        root_bytes = instance.flavor.root_gb * GIB or None
        if root_bytes is not None and image.min_disk_gb * GIB > root_bytes:
            raise errors.FlavorDiskTooSmall(image=image.id, needed=image.min_disk_gb * GIB, given=root_bytes)
        wanted = [*((meta, None) for _, meta in boot_images(image)), (image, root_bytes)]
        self.directory.create(instance.uuid)
        self.directory.write_use(instance.uuid, ImageUse(bases=names))
        return [self.cache.ensure(meta, job, limit) for meta, limit in wanted]

    def undo_prepare_images(self, instance: Instance) -> None:
        """Remove downloads that did not end, and the instance's directory unless its disks are finished (those are
        :meth:`remove`'s); whole bases stay for the next instance."""
        self.discard_partials(instance)
        if self.directory.read_disk_info(instance.uuid) is None:
            self.directory.remove(instance.uuid)

    def discard_partials(self, instance: Instance) -> None:
        """Remove downloads of the instance's images that did not end."""
        for name in self._base_names(instance):
            self.cache.discard_partial(name)

    def prefetch(self, instance: Instance, job: Job) -> None:
        """Bring the instance's images here before it comes itself. One that cannot be had now is said and is no error:
        the host that the instance is on has it."""
        for meta in (*(meta for _, meta in boot_images(instance.image)), instance.image):
            try:
                self.cache.ensure(meta, job)
            except (errors.ImageNotFound, errors.ImageStoreUnavailable) as exc:
                job.explain(f"{exc}: it will be asked of the host that the instance is on")

    def create_disks(self, instance: Instance, request: SpawnRequest, job: Job) -> DiskInfo:
        """Make every disk, ``disk.info`` last. Does what :meth:`prepare_images` did where it is missing.

        Called again after it ended: returns ``disk.info`` and touches nothing.

        :raises compute_worker.errors.DiskFull: the caller undoes.
        """
        made = self.directory.read_disk_info(instance.uuid)
        if made is not None:
            return made
        wanted = self.check(instance, request)
        root = self.prepare_images(instance, job)[-1]
        self.directory.remove_parts(instance.uuid)
        self._boot_files(instance, job)
        disks = [self._root_disk(instance, root, job)]
        disks += [self.make_blank(instance, blank, job) for blank in wanted.blanks]
        if wanted.config_drive:
            disks.append(self._config_drive(instance, request, job))
        info = self.directory.measured(instance.uuid, DiskInfo(disks=disks, image=instance.image.id))
        self.directory.write_disk_info(instance.uuid, info)
        return info

    def restore_bases(self, instance: Instance, job: Job) -> None:
        """Bring back bases that the instance's disks stand on and that are gone, and kernel and ramdisk, before it is
        started.

        :raises compute_worker.errors.Broken: there is no ``disk.info``, or the image no longer gives that base.
        """
        info = self.directory.read_disk_info(instance.uuid)
        if info is None:
            raise errors.Broken(f"instance {instance.uuid} has no disks on this host (no disk.info)")
        for disk in info.disks:
            if disk.backing is not None:
                self._restore(instance, disk, disk.backing, job)
        self._boot_files(instance, job)

    def disk_info(self, uuid: str, suffix: str = "") -> DiskInfo | None:
        """``disk.info`` with the bytes allocated now; ``None`` where there is none."""
        info = self.directory.read_disk_info(uuid, suffix)
        return self.directory.measured(uuid, info, suffix) if info is not None else None

    def remove(self, uuid: str) -> None:
        """Remove every directory of the instance. Ends well when there is nothing; called again, it goes on."""
        for suffix in ("", RESIZE):
            self.directory.remove(uuid, suffix)

    # --- inside -------------------------------------------------------------------------------------------------

    def _base_names(self, instance: Instance) -> list[str]:
        """Every base that the instance's disks, kernel and ramdisk are made from."""
        images = [*(meta for _, meta in boot_images(instance.image)), instance.image]
        try:
            blanks = self.check(instance, SpawnRequest()).blanks
        except errors.Refused:
            # Refused before anything was made.
            blanks = ()
        return [*(base_name(meta) for meta in images), *(blank.base for blank in blanks)]

    def own(self, path: Path) -> None:
        """Give a file of an instance that came from elsewhere the group and mode that one made here has."""
        shared_mode = 0o640 if path.name in (CONFIG, KERNEL, RAMDISK) else 0o660
        with files.disk_errors(path):
            files.give_to_group(path, self._group, shared_mode if self._group else 0o600)

    def _make(self, path: Path, make: Callable[[Path], None], shared_mode: int = 0o660) -> None:
        """``path`` by ``make``, unless it is there: written as ``.part``, given to its group, synced, renamed."""
        if path.exists():
            return
        part = path.with_name(path.name + ".part")
        with files.disk_errors(path):
            try:
                files.create_private(part)
                make(part)
                files.give_to_group(part, self._group, shared_mode if self._group else 0o600)
                files.publish(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _root_disk(self, instance: Instance, base: Base, job: Job) -> Disk:
        size = instance.flavor.root_gb * GIB or -(-base.size_bytes // 512) * 512
        path = self.directory.path(instance.uuid) / ROOT

        def make(part: Path) -> None:
            if not (self.backend.supports_clone and self.backend.clone(instance.image, part, size, job)):
                self.backend.make(part, base.path, size, job)

        self._make(path, make)
        return self.backend.describe(ROOT, base.path, size)

    def make_blank(self, instance: Instance, blank: BlankDisk, job: Job) -> Disk:
        """Make an ephemeral or swap disk, unless it is there."""
        job.explain(f"{blank.name}: {blank.fs}, {blank.reason}")
        directory = self.directory.path(instance.uuid)
        base = self.blank_base(blank, job)
        self._make(directory / blank.name, lambda part: self.backend.make(part, base.path, blank.size_bytes, job))
        return self.backend.describe(blank.name, base.path, blank.size_bytes, blank.label)

    def blank_base(self, blank: BlankDisk, job: Job) -> Base:
        """The base of an ephemeral or swap disk, made here where it is not there."""
        return self.cache.ensure_generated(
            blank.base, lambda part: ephemeral.make(part, blank.fs, blank.size_bytes, blank.label, job), job
        )

    def _config_drive(self, instance: Instance, request: SpawnRequest, job: Job) -> Disk:
        path = self.directory.path(instance.uuid) / CONFIG
        self._make(path, lambda part: configdrive.build(part, instance, request, job), shared_mode=0o640)
        return Disk(
            name=CONFIG, format="raw", virtual_size_bytes=path.stat().st_size, label=configdrive.LABEL
        )

    def _boot_files(self, instance: Instance, job: Job) -> None:
        directory = self.directory.path(instance.uuid)
        for name, meta in boot_images(instance.image):
            if not (directory / name).exists():
                base = self.cache.ensure(meta, job)
                self._copy(base, directory / name, job)

    def _copy(self, base: Base, path: Path, job: Job) -> None:
        self._make(path, lambda part: backends.sparse_copy(base.path, part, job), shared_mode=0o640)

    def _restore(self, instance: Instance, disk: Disk, backing: str, job: Job) -> None:
        if os.path.lexists(self.directory.base / backing):
            inspect.check_base(self.directory.base / backing, instance.image.id)
            return
        if disk.name == ROOT:
            found = self.cache.ensure(instance.image, job).name
        else:
            found = self._restore_blank(instance, disk, backing, job)
        if found != backing:
            raise errors.Broken(
                f"instance {instance.uuid}: {disk.name} stands on {backing}, which is gone; its image now gives {found}"
            )
        job.explain(f"{backing} was missing under {disk.name}: made again")

    def _restore_blank(self, instance: Instance, disk: Disk, backing: str, job: Job) -> str:
        if COPIED.search(backing):
            raise errors.Broken(
                f"instance {instance.uuid}: {disk.name} stands on {backing}, which came from another host and is gone"
            )
        return self.blank_base(blank_of(disk, backing), job).name


def boot_images(image: ImageMeta) -> list[tuple[str, ImageMeta]]:
    """The images that ``image`` is booted by, with the file each becomes: kernel, ramdisk, or none."""
    wanted = [(KERNEL, image.kernel_id, "aki"), (RAMDISK, image.ramdisk_id, "ari")]
    return [
        (name, ImageMeta(id=image_id, store=image.store, disk_format=fmt))
        for name, image_id, fmt in wanted
        if image_id is not None
    ]


def blank_of(disk: Disk, backing: str) -> BlankDisk:
    """What an ephemeral or swap disk was made from, by the name of its base; the disk may have grown since."""
    kind, number, *rest = backing.split("_")
    fs, size_bytes = ("swap", int(number) * MIB) if kind == "swap" else (rest[0], int(number) * GIB)
    return BlankDisk(disk.name, backing, fs, size_bytes, disk.label or "ephemeral0", "as it was made")
