"""File systems of ephemeral and swap disks: which one, and making it.

What is made follows from kind, size and label alone, where the program lets it (ext2 to ext4, vfat, swap): the same
program makes the same bytes on every host, so that an overlay that moves finds its base there.
The names of bases come from a fixed table and two numbers, never from what a tenant wrote (CVE-2013-6437).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compute_worker import errors
from compute_worker.images import files
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.disks.process import Limits

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

_LIMITS = Limits(cpu_seconds=120, address_space_bytes=2 << 30)
_EPOCH = {"E2FSPROGS_FAKE_TIME": "1577836800"}
"""What e2fsprogs takes for the time of day."""


@dataclass(frozen=True, slots=True)
class _Maker:
    program: str
    options: tuple[str, ...]
    label: tuple[str, ...]
    """The option that takes the label; empty: it takes none."""
    identity: tuple[str, ...] = ()
    """Options that leave nothing to chance; ``{uuid}`` and ``{serial}`` are the file system's."""


_EXT = ("-U", "{uuid}", "-E", "hash_seed={uuid}")
_MAKERS = {
    "ext2": _Maker("mkfs.ext2", ("-q", "-F"), ("-L",), _EXT),
    "ext3": _Maker("mkfs.ext3", ("-q", "-F"), ("-L",), _EXT),
    "ext4": _Maker("mkfs.ext4", ("-q", "-F"), ("-L",), _EXT),
    "xfs": _Maker("mkfs.xfs", ("-q", "-f"), ("-L",)),
    "vfat": _Maker("mkfs.vfat", (), ("-n",), ("--invariant", "-i", "{serial}")),
    "ntfs": _Maker("mkfs.ntfs", ("--force", "--fast", "--quiet"), ("--label",)),
    "swap": _Maker("mkswap", (), ("-L",), ("-U", "{uuid}")),
}

FORMATS = tuple(name for name in _MAKERS if name != "swap")
"""Every ``guest_format`` an ephemeral disk may ask for, where its program is installed."""

_BY_OS_TYPE = {"linux": (), "windows": ("ntfs", "vfat")}


def available_formats() -> frozenset[str]:
    """The formats whose program this host has."""
    return frozenset(name for name, maker in _MAKERS.items() if process.find_program(maker.program))


def choose_format(
    os_type: str | None, guest_format: str | None, default: str, available: Collection[str]
) -> tuple[str, str]:
    """The file system of an ephemeral disk, and why.

    :raises compute_worker.errors.InvalidBDMFormat: nobody here can make it.
    """
    if guest_format is not None:
        if guest_format not in FORMATS or guest_format not in available:
            raise errors.InvalidBDMFormat(fmt=guest_format[:64])
        return guest_format, "asked for by guest_format"
    for name in _BY_OS_TYPE.get((os_type or "").lower(), ()):
        if name in available:
            return name, f"usual for os_type {os_type!r}"
    if default not in FORMATS or default not in available:
        raise errors.InvalidBDMFormat(
            f"file system {default!r} (libvirt.default_ephemeral_format) cannot be made on this host", fmt=default
        )
    return default, "the host's default"


def base_name(size_gb: int, fs: str, index: int = 0) -> str:
    """Name in ``_base``. The first disk's is nova's; further ones differ by their label, which is in the bytes."""
    return f"ephemeral_{size_gb}_{fs}" + (f"_{index}" if index else "")


def swap_base_name(size_mb: int) -> str:
    """Name in ``_base`` of a swap disk."""
    return f"swap_{size_mb}"


def make(path: Path, fs: str, size_bytes: int, label: str, job: Job) -> None:
    """Make ``path`` a sparse file of ``size_bytes`` with a file system (or swap area).

    :raises compute_worker.errors.CommandFailed: mkfs did not like it.
    :raises compute_worker.errors.DiskFull: no room even for its metadata.
    """
    maker = _MAKERS[fs]
    with files.disk_errors(path):
        files.create_private(path)
        os.truncate(path, size_bytes)
    made_of = uuid.uuid5(uuid.NAMESPACE_OID, f"{fs} {size_bytes} {label}")
    identity = [word.format(uuid=made_of, serial=made_of.hex[:8]) for word in maker.identity]
    words: list[str | Path] = [maker.program, *maker.options, *identity, *maker.label, label, path]
    process.run(words, job, limits=_LIMITS, writes=path, environment=_EPOCH)
