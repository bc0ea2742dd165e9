"""The cache of base images, ``_base``: made once a host, raw, whole or not there.

A base is ``<sha1 of the image id>_<digest of what else was declared>``, the same on every host. All work on one happens
under its lock, so that one download serves however many ask. What is half-done is ``<name>.part`` (the download) and
``<name>.raw.part`` (its conversion).

A base is safe from :meth:`ImageCache.prune` once a record of an instance names it (``InstancesDirectory.used_bases``):
callers write that record *before* they ask for the base. Pruning looks at the records under the base's lock: either it
sees that record, or it is through before the base is asked for, and the base is fetched anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compute_worker import errors
from compute_worker.images import fetch, files, inspect
from compute_worker.images.locks import NamedLocks
from compute_worker.images.store import ImageStores
from compute_worker.objects import CachedImage, ImageMeta
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.libvirt.disks.qemu_img import ImageInfo, QemuImg

if TYPE_CHECKING:
    from compute_worker.config import Images
    from compute_worker.virt.driver import Job

CONVERTING = "converting image"
_NAME = re.compile(r"([0-9a-f]{40})_[0-9a-f]{12}\Z|(?:ephemeral|swap)_[0-9a-z_]{1,64}\Z")
_EXACT = frozenset({"qcow2", "vmdk", "vhdx", "vdi"})
"""Formats whose virtual size qemu computes as the inspector does; a vhd's is rounded to its geometry."""
_VMDK_TYPES = frozenset({"monolithicSparse", "streamOptimized"})


@dataclass(frozen=True, slots=True)
class Base:
    """A base that is there. Its bytes are a raw disk of ``size_bytes``."""

    name: str
    path: Path
    size_bytes: int


def base_name(image: ImageMeta) -> str:
    """Name of an image's base. It follows from the declaration alone, so that every host finds the same; another
    store, format or checksum is another base, so that nobody is served what was let in under other conditions."""
    declared = "\0".join((image.store or "", image.disk_format, image.checksum_algorithm or "", image.checksum or ""))
    digest = hashlib.sha256(declared.encode()).hexdigest()[:12]
    return f"{_image_digest(image.id)}_{digest}"


def _image_digest(image_id: str) -> str:
    return hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()


class ImageCache:
    """The bases of one host."""

    def __init__(
        self, directory: InstancesDirectory, stores: ImageStores, qemu_img: QemuImg, settings: Images
    ) -> None:
        self._directory = directory
        self._stores = stores
        self._qemu_img = qemu_img
        self._settings = settings
        self._locks = NamedLocks(directory.locks)

    @property
    def max_bytes(self) -> int:
        """Largest image this host takes."""
        return self._settings.max_image_gb << 30

    def ensure(self, image: ImageMeta, job: Job, limit_bytes: int | None = None) -> Base:
        """The image's base, fetched and converted where it is not there. Blocks as long as that takes.

        :param limit_bytes: root disk of the flavor; ``None``: no flavor limits it.
        :raises compute_worker.errors.ImageStoreUnavailable: what has arrived is kept for the next call.
        :raises compute_worker.errors.FlavorDiskTooSmall: nothing of it is kept, unless it was cached before.
        :raises compute_worker.errors.ImageUnacceptable: nothing of it is kept.
        :raises compute_worker.errors.DiskFull: nothing of it is kept.
        """
        name = base_name(image)
        path = self._directory.base / name
        with self._locks.hold(name, job):
            if path.exists():
                self._remove_parts(name)
            else:
                with self._cleaned(name):
                    self._fetch(image, name, job, limit_bytes)
            size = inspect.check_base(path, image.id)
            self._check_size(image, size, limit_bytes)
            self._touch(name)
        return Base(name, path, size)

    def ensure_generated(self, name: str, make: Callable[[Path], None], job: Job) -> Base:
        """A base that is made here: ``make`` writes it to the path it is given."""
        if not _NAME.match(name):
            raise ValueError(f"not the name of a base: {name!r}")
        path = self._directory.base / name
        with self._locks.hold(name, job):
            if path.exists():
                self._remove_parts(name)
            else:
                with self._cleaned(name), files.disk_errors(path):
                    part = self._part(name)
                    make(part)
                    self._publish(part, path)
            self._touch(name)
            return Base(name, path, path.stat().st_size)

    def adopt(self, name: str, sent: Path, job: Job) -> None:
        """Make a whole file that another host sent the base ``name``; where that is there already, drop the file.

        Called again it finds it done; if the process dies inside, ``sent`` or the base is there, whole.
        """
        if not _NAME.match(name):
            raise ValueError(f"not the name of a base: {name!r}")
        path = self._directory.base / name
        with self._locks.hold(name, job), files.disk_errors(path):
            if sent.exists() and not path.exists():
                files.give_to_group(sent, self._directory.group, 0o640 if self._directory.group else 0o644)
                files.fsync(sent)
                os.link(sent, path)
                files.fsync(path.parent)
            sent.unlink(missing_ok=True)
            self._remove_parts(name)
            self._touch(name)

    def discard_partial(self, name: str) -> None:
        """Drop what an unfinished base left, unless another operation is at it."""
        with self._locks.try_hold(name) as held:
            if held:
                self._remove_parts(name)
                if not (self._directory.base / name).exists():
                    self._locks.forget(name)

    def stale_locks(self, remove: bool = False) -> list[str]:
        """Locks that nobody holds and that neither a base nor its beginnings go with; with ``remove`` they go."""
        found = []
        for name in sorted(self._locks.names()):
            with self._locks.try_hold(name) as held:
                paths = (self._directory.base / name, self._part(name), self._raw_part(name))
                if not held or any(os.path.lexists(path) for path in paths):
                    continue
                found.append(name)
                if remove:
                    self._locks.forget(name)
        return found

    def prune(self, used_images: set[str], now: float | None = None) -> list[str]:
        """Remove bases, and unfinished downloads, that no record here names, no ``used_images`` (ids) names and nobody
        used for ``remove_unused_base_images_after`` seconds. Returns their names. On shared storage: none, since other
        hosts' guests may stand on them.

        :raises compute_worker.errors.Broken: an instance's record is unreadable; nothing was removed.
        """
        if files.is_shared(self._directory.base):
            return []
        before = (time.time() if now is None else now) - self._settings.remove_unused_base_images_after
        kept = {_image_digest(image_id) for image_id in used_images}
        return [name for name in sorted(self._names()) if self._prune_one(name, kept, before)]

    def list_bases(self) -> list[CachedImage]:
        """Every whole base, by name.

        :raises compute_worker.errors.Broken: an instance's record is unreadable, so nobody can say what is in use.
        """
        used, found = self._directory.used_bases(), []
        for name in sorted(self._names()):
            path = self._directory.base / name
            with suppress(FileNotFoundError):
                seen = path.stat()
                found.append(
                    CachedImage(
                        name=name,
                        size_bytes=seen.st_size,
                        allocated_bytes=seen.st_blocks * 512,
                        used_at=self._locks.last_used(name),
                        in_use=name in used,
                    )
                )
        return found

    # --- inside -------------------------------------------------------------------------------------------------

    def _fetch(self, image: ImageMeta, name: str, job: Job, limit_bytes: int | None) -> None:
        store = self._stores.get(image.store)
        facts = fetch.agree(image, store.stat(image.id), self.max_bytes)
        part = self._part(name)
        if image.disk_format in inspect.PLAIN and facts.size_bytes is not None:
            self._check_size(image, facts.size_bytes, limit_bytes)
        fetch.fetch(
            store, image, facts, part, job, max_bytes=self.max_bytes, attempts=self._settings.download_attempts
        )
        found = inspect.inspect(part, image.id, image.disk_format, job)
        self._check_size(image, found.virtual_size_bytes, limit_bytes)
        plain = image.disk_format in inspect.PLAIN
        ready = part if plain else self._convert(image, found, name, job, limit_bytes)
        # An image inside the image would become dangerous here: it is looked for before the base gets its name.
        inspect.check_base(ready, image.id)
        self._publish(ready, self._directory.base / name)
        part.unlink(missing_ok=True)

    def _convert(
        self, image: ImageMeta, found: inspect.Inspection, name: str, job: Job, limit_bytes: int | None
    ) -> Path:
        part, target = self._part(name), self._raw_part(name)
        fmt = inspect.QEMU_NAMES.get(found.disk_format, found.disk_format)
        try:
            info = self._qemu_img.info(part, fmt, job)
        except errors.CommandFailed as exc:
            raise errors.ImageUnacceptable(image=image.id, reason=exc.message) from None
        self._must_agree(image, found, info, part)
        self._check_size(image, info.virtual_size_bytes, limit_bytes)
        with files.disk_errors(target):
            files.create_private(target)
        try:
            self._qemu_img.convert(part, fmt, target, "raw", info.virtual_size_bytes, job, CONVERTING)
        except errors.CommandFailed as exc:
            raise errors.ImageUnacceptable(image=image.id, reason=exc.message) from None
        return target

    @staticmethod
    def _must_agree(image: ImageMeta, found: inspect.Inspection, info: ImageInfo, part: Path) -> None:
        """Two readers of one header must see the same image, or one of them is being lied to."""
        problem = None
        extents = info.details.get("extents") or []
        if found.disk_format in _EXACT and info.virtual_size_bytes != found.virtual_size_bytes:
            problem = f"qemu-img sees a disk of {info.virtual_size_bytes} bytes, its header {found.virtual_size_bytes}"
        elif info.backing:
            problem = "it has a backing file"
        elif info.details.get("data-file"):
            problem = "it has an external data file"
        elif info.encrypted:
            problem = "it is encrypted"
        elif found.disk_format == "vmdk" and info.details.get("create-type") not in _VMDK_TYPES:
            problem = "its VMDK type is not allowed"
        elif any(extent.get("filename") != str(part) for extent in extents):
            problem = "its extents are other files"
        if problem:
            raise errors.ImageUnacceptable(image=image.id, reason=problem)

    def _check_size(self, image: ImageMeta, size: int, limit_bytes: int | None) -> None:
        if limit_bytes is not None and size > limit_bytes:
            raise errors.FlavorDiskTooSmall(image=image.id, needed=size, given=limit_bytes)
        if size > self.max_bytes:
            raise errors.ImageUnacceptable(
                image=image.id, reason=f"its disk has {size} bytes, this host takes {self.max_bytes} (max_image_gb)"
            )

    def _publish(self, part: Path, path: Path) -> None:
        with files.disk_errors(path):
            files.give_to_group(part, self._directory.group, 0o640 if self._directory.group else 0o644)
            files.publish(part, path)

    def _touch(self, name: str) -> None:
        self._locks.touch(name)
        # For an operator who looks; the hypervisor may own the base by now, so that we may not.
        with suppress(OSError):
            os.utime(self._directory.base / name)

    @contextmanager
    def _cleaned(self, name: str) -> Iterator[None]:
        """Leave nothing half-done behind an error, except what a retry goes on from. The lock is held."""
        try:
            yield
        except BaseException as exc:
            if not (isinstance(exc, errors.Retryable) and self._part(name).exists()):
                self._remove_parts(name)
                # Else a caller could fill the directory with locks of images that do not exist.
                self._locks.forget(name)
            raise

    def _part(self, name: str) -> Path:
        return self._directory.base / f"{name}.part"

    def _raw_part(self, name: str) -> Path:
        return self._directory.base / f"{name}.raw.part"

    def _remove_parts(self, name: str) -> None:
        for path in (self._part(name), self._raw_part(name)):
            with files.disk_errors(path):
                path.unlink(missing_ok=True)

    def _names(self) -> set[str]:
        with files.disk_errors(self._directory.base):
            found = {entry.removesuffix(".part").removesuffix(".raw") for entry in os.listdir(self._directory.base)}
        return {name for name in found if _NAME.match(name)}

    def _prune_one(self, name: str, kept: set[str], before: float) -> bool:
        match = _NAME.match(name)
        if match is None or match[1] in kept:
            return False
        paths = [self._directory.base / name, self._part(name), self._raw_part(name)]
        with self._locks.try_hold(name) as held:
            if not held:
                return False
            last = max([self._locks.last_used(name), *(p.stat().st_mtime for p in paths if p.exists())])
            # Records are read under the lock: whoever wants this base has written one before asking for the lock.
            if last > before or name in self._directory.used_bases():
                return False
            for path in paths:
                with files.disk_errors(path):
                    path.unlink(missing_ok=True)
            self._locks.forget(name)
            return True
