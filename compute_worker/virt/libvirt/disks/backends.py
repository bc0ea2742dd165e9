"""Image backends: how a disk of an instance is made from its base.

A backend is an entry point of ``compute_worker.image_backends`` and is constructed as ``Backend(qemu_img)``. ``raw``
and ``qcow2`` keep disks as files. A backend that keeps them elsewhere (rbd, lvm) says ``supports_clone`` and makes the
root disk by :meth:`ImageBackend.clone`, without a download, where the image store is the same system.
"""

from __future__ import annotations

import abc
import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Disk, ImageMeta

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job
    from compute_worker.virt.libvirt.disks.qemu_img import QemuImg

NAMESPACE = "compute_worker.image_backends"
PHASE = "copying base image"
_FICLONE = 0x40049409
"""ioctl of linux/fs.h: share all extents with another file."""
_COPY_BYTES = 64 << 20


class ImageBackend(abc.ABC):
    """One way to keep disks. ``format`` is what ``disk.info`` and the domain say of them."""

    format: ClassVar[str]
    supports_clone: ClassVar[bool] = False

    def __init__(self, qemu_img: QemuImg) -> None:
        self.qemu_img = qemu_img

    @abc.abstractmethod
    def make(self, path: Path, base: Path, size_bytes: int, job: Job) -> None:
        """Make at ``path`` a disk of ``size_bytes`` with the content of ``base`` (raw, not larger).

        ``path`` is a ``.part`` that the caller gives its name afterwards; if the process dies inside, it is garbage.
        """

    @abc.abstractmethod
    def describe(self, name: str, base: Path, size_bytes: int, label: str | None = None) -> Disk:
        """The line of ``disk.info`` for what :meth:`make` made."""

    def clone(self, image: ImageMeta, path: Path, size_bytes: int, job: Job) -> bool:
        """Make the root disk from the image inside the storage itself. False: it cannot, and the image is fetched."""
        return False


class Qcow2Backend(ImageBackend):
    """Copy-on-write overlays over the base. The overlay names its base relative to itself, so that it stays right
    when its directory is renamed or travels to a host that keeps instances elsewhere."""

    format: ClassVar[str] = "qcow2"

    def make(self, path: Path, base: Path, size_bytes: int, job: Job) -> None:
        """One qemu-img; a few milliseconds whatever the size."""
        self.qemu_img.create_overlay(path, size_bytes, os.path.relpath(base, path.parent), "raw", job)

    def describe(self, name: str, base: Path, size_bytes: int, label: str | None = None) -> Disk:
        """Backed by ``base``."""
        return Disk(
            name=name,
            format="qcow2",
            virtual_size_bytes=size_bytes,
            backing=base.name,
            backing_format="raw",
            label=label,
        )


class RawBackend(ImageBackend):
    """Whole raw files: a shared copy (reflink) where the file system can, else a copy of what is allocated."""

    format: ClassVar[str] = "raw"

    def make(self, path: Path, base: Path, size_bytes: int, job: Job) -> None:
        """Copies at the speed of the disk."""
        sparse_copy(base, path, job)
        with files.disk_errors(path):
            os.truncate(path, size_bytes)

    def describe(self, name: str, base: Path, size_bytes: int, label: str | None = None) -> Disk:
        """Backed by nothing."""
        return Disk(name=name, format="raw", virtual_size_bytes=size_bytes, label=label)


def load(name: str, qemu_img: QemuImg) -> ImageBackend:
    """The backend ``name``.

    :raises compute_worker.errors.Broken: no such backend is installed.
    """
    from stevedore import driver, exception

    try:
        made: ImageBackend = driver.DriverManager(NAMESPACE, name).driver(qemu_img)
    except exception.NoMatches:
        raise errors.Broken(f"no image backend {name!r} (libvirt.images_type) is installed in {NAMESPACE}") from None
    return made


def sparse_copy(source: Path, target: Path, job: Job, phase: str = PHASE) -> None:
    """Copy a file's data, not its holes, into ``target`` (made if need be), reporting ``phase`` in bytes.

    :raises compute_worker.errors.DiskFull: no room for it.
    """
    with files.disk_errors(target), open(source, "rb") as old, open(target, "wb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
        size, at = os.fstat(old.fileno()).st_size, 0
        os.ftruncate(new.fileno(), size)
        while (extent := _next_extent(old.fileno(), at)) is not None:
            at, end = extent
            while at < end:
                job.check()
                at += _copy(old.fileno(), new.fileno(), at, min(end - at, _COPY_BYTES))
                job.report(phase, at, size)


def _next_extent(fd: int, at: int) -> tuple[int, int] | None:
    """Where data begins at or after ``at``, and where it ends; ``None`` when only a hole follows."""
    try:
        begin = os.lseek(fd, at, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return None
        raise
    return begin, os.lseek(fd, begin, os.SEEK_HOLE)


def _copy(source: int, target: int, at: int, count: int) -> int:
    try:
        copied = os.copy_file_range(source, target, count, at, at)
    except OSError as exc:
        if exc.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        # Two file systems that the kernel does not copy between.
        copied = os.pwrite(target, os.pread(source, min(count, 1 << 20), at), at)
    if copied == 0:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return copied
