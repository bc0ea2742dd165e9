"""The instances directory: where everything of an instance lies, and how it comes and goes.

::

    <instances>/<uuid>/           disk, disk.local, disk.ephN, disk.swap, disk.config, kernel, ramdisk,
                                  console.log, libvirt.xml, disk.info, images.json, instance.json,
                                  migration.json (in what a move brings here)
    <instances>/<uuid>_resize/    set aside by a move, until it is confirmed
    <instances>/<uuid>_del/       being removed
    <instances>/_base/            base images, shared by overlays; raw
    <instances>/locks/            locks by name; their mtime says when a base was last used

Every name is made from a checked uuid, every record is written by fsync and rename.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import UUID_PATTERN, Disk, DiskInfo, Instance
from compute_worker.virt.driver import Leftover

RESIZE = "_resize"
DELETED = "_del"
_SUFFIXES = ("", RESIZE, DELETED)
_KINDS = {"": "directory", RESIZE: "resize", DELETED: "del"}
_UUID = re.compile(UUID_PATTERN)
_ENTRY = re.compile(UUID_PATTERN.replace(r"\Z", "") + r"(_resize|_del|)\Z")
_DIRECTORY_MODE = 0o711
"""The hypervisor's user walks through; nobody else can list."""

T = TypeVar("T")


class ImageUse(msgspec.Struct, frozen=True):
    """``images.json``: the bases an instance means to use, written before they are fetched, so that no cleaning takes
    them away between the fetch and ``disk.info``."""

    bases: list[str] = []


class Arrival(msgspec.Struct, frozen=True):
    """``migration.json``: this directory is what a migration brings here. It tells a copy from the instance's own
    directory where both hosts of a move see the same ones, and a late message of an earlier attempt from one of now."""

    migration: str
    attempt: int = 1
    machine: str = ""
    """Machine type the guest had at the source."""
    sending: str = ""
    """What state of the source's disks is being sent; another one: what has arrived is stale."""
    bases: dict[str, str] = {}
    """Digests of bases that the disks stand on at the source, as far as they were asked for."""
    overlays: dict[str, str] = {}
    """Disks that were made here and are filled, the same for a guest and not byte for byte; by name the point in time
    at the source that was sent first."""


class InstancesDirectory:
    """The directory and its records. ``group``: who may walk through it, besides its owner; empty: everybody."""

    def __init__(self, root: str | Path, group: str = "") -> None:
        self.root = Path(root).absolute()
        self.base = self.root / "_base"
        self.locks = self.root / "locks"
        self.group = group

    def prepare(self) -> None:
        """Make what must be there. Called again: nothing.

        :raises compute_worker.errors.Broken: it cannot be written.
        """
        for path in (self.root, self.base):
            self._make(path, _DIRECTORY_MODE)
        self._make(self.locks, 0o700)

    def path(self, uuid: str, suffix: str = "") -> Path:
        """The instance's directory, there or not.

        :raises compute_worker.errors.InvalidCommand: not a uuid.
        """
        if not _UUID.match(uuid) or suffix not in _SUFFIXES:
            raise errors.InvalidCommand(method="disks", problem=f"not an instance uuid: {uuid!r}"[:200])
        return self.root / (uuid + suffix)

    def create(self, uuid: str) -> Path:
        """Make the instance's directory, durably. Called again: nothing."""
        path = self.path(uuid)
        self._make(path, _DIRECTORY_MODE)
        return path

    def _make(self, path: Path, mode: int) -> None:
        with files.disk_errors(path):
            if path.is_symlink():
                raise errors.Broken(f"{path} is a symbolic link: remove it, or configure where it points to")
            if not path.is_dir():
                path.mkdir(mode=mode, parents=path == self.root)
                files.fsync(path.parent)
            if self.group and mode == _DIRECTORY_MODE:
                files.give_to_group(path, self.group, 0o710)
            elif not path.stat().st_mode & 0o100:
                path.chmod(mode)

    # --- records ------------------------------------------------------------------------------------------------

    def write_disk_info(self, uuid: str, info: DiskInfo, suffix: str = "") -> None:
        """Write ``disk.info``: from then on formats, sizes and backing files are what it says."""
        self._write(uuid, suffix, "disk.info", info)

    def read_disk_info(self, uuid: str, suffix: str = "") -> DiskInfo | None:
        """``disk.info``, ``None`` where the disks were never finished.

        :raises compute_worker.errors.Broken: it is there and unreadable.
        """
        return self._read(uuid, suffix, "disk.info", DiskInfo)

    def write_use(self, uuid: str, use: ImageUse) -> None:
        """Write ``images.json``."""
        self._write(uuid, "", "images.json", use)

    def forget_use(self, uuid: str) -> None:
        """Remove a directory that holds nothing but ``images.json``: of an instance whose images were fetched early."""
        path = self.path(uuid)
        with files.disk_errors(path):
            if path.is_dir() and set(os.listdir(path)) == {"images.json"}:
                self.remove(uuid)

    def write_record(self, instance: Instance) -> None:
        """Write ``instance.json`` where the instance has a directory (or one set aside); elsewhere do nothing."""
        for suffix in ("", RESIZE):
            if self.path(instance.uuid, suffix).is_dir():
                self._write(instance.uuid, suffix, "instance.json", instance)
                return

    def write_arrival(self, uuid: str, arrival: Arrival) -> None:
        """Write ``migration.json``."""
        self._write(uuid, "", "migration.json", arrival)

    def arrival(self, uuid: str, migration: str | None = None, suffix: str = "") -> Arrival | None:
        """``migration.json``; ``None``: what is there did not come by ``migration`` (by none at all)."""
        found = self._read(uuid, suffix, "migration.json", Arrival)
        return found if found is not None and migration in (None, found.migration) else None

    def read_record(self, uuid: str, suffix: str = "") -> Instance | None:
        """``instance.json``, ``None`` where there is none."""
        return self._read(uuid, suffix, "instance.json", Instance)

    def list_records(self) -> list[Instance]:
        """Every readable record of this host, one an instance; the directory in use before the one set aside."""
        found: dict[str, Instance] = {}
        for uuid, suffix in sorted(self._entries()):
            if suffix == DELETED:
                continue
            try:
                record = self.read_record(uuid, suffix)
            except errors.Broken:
                continue
            if record is not None and record.uuid == uuid:
                found.setdefault(uuid, record)
        return list(found.values())

    def used_bases(self) -> set[str]:
        """Names in ``_base`` that some instance here uses or is about to use.

        :raises compute_worker.errors.Broken: a record is unreadable: then nobody can say, and nothing may be removed.
        """
        used: set[str] = set()
        for uuid, suffix in self._entries():
            if suffix == DELETED:
                continue
            info = self.read_disk_info(uuid, suffix)
            used |= {disk.backing for disk in info.disks if disk.backing} if info else set()
            use = self._read(uuid, suffix, "images.json", ImageUse)
            used |= set(use.bases) if use else set()
        return used

    def _write(self, uuid: str, suffix: str, name: str, value: msgspec.Struct) -> None:
        data = msgspec.json.format(msgspec.json.encode(value), indent=2)
        files.write_atomic(self.path(uuid, suffix) / name, data)

    def _read(self, uuid: str, suffix: str, name: str, type_: type[T]) -> T | None:
        path = self.path(uuid, suffix) / name
        with files.disk_errors(path):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        try:
            return msgspec.json.decode(data, type=type_)
        except msgspec.DecodeError as exc:
            problem = f"{path} is not readable ({str(exc)[:200]}): restore it or remove its directory"
            raise errors.Broken(problem) from None

    # --- coming and going ---------------------------------------------------------------------------------------

    def move(self, uuid: str, source: str, target: str) -> None:
        """Rename the instance's directory from one suffix to another, durably. Ends well when it was done before.

        :raises compute_worker.errors.DestinationDiskExists: both are there.
        """
        old, new = self.path(uuid, source), self.path(uuid, target)
        with files.disk_errors(old):
            if not os.path.lexists(old):
                return
            if os.path.lexists(new):
                raise errors.DestinationDiskExists(instance=uuid, path=str(new))
            os.rename(old, new)
            files.fsync(self.root)

    def remove(self, uuid: str, suffix: str = "") -> None:
        """Remove the instance's directory: renamed to ``_del`` first, so that a half-removed one is never taken for
        an instance; then its content. Follows no symbolic link. Ends well when there is nothing; if the process dies
        inside, calling it again goes on."""
        doomed = self.path(uuid, DELETED)
        with files.disk_errors(doomed):
            _delete(doomed)
            current = self.path(uuid, suffix)
            if suffix != DELETED and os.path.lexists(current):
                os.rename(current, doomed)
                files.fsync(self.root)
                _delete(doomed)
            files.fsync(self.root)

    def remove_parts(self, uuid: str) -> None:
        """Remove what a dead process left half-written in the instance's directory."""
        path = self.path(uuid)
        with files.disk_errors(path):
            for entry in path.iterdir() if path.is_dir() else ():
                if entry.name.endswith(".part"):
                    _delete(entry)

    def list_leftovers(self) -> list[Leftover]:
        """Everything here that belongs to an instance uuid, and half-written files in it."""
        found = []
        for uuid, suffix in sorted(self._entries()):
            path = self.path(uuid, suffix)
            found.append(Leftover(uuid=uuid, kind=_KINDS[suffix], where=str(path)))
            if path.is_dir() and not path.is_symlink():
                parts = sorted(entry for entry in path.iterdir() if entry.name.endswith(".part"))
                found += [Leftover(uuid=uuid, kind="part", where=str(entry)) for entry in parts]
        return found

    def measured(self, uuid: str, info: DiskInfo, suffix: str = "") -> DiskInfo:
        """``info`` with the bytes that each disk occupies now; a disk that is not there occupies none."""
        directory = self.path(uuid, suffix)

        def occupied(disk: Disk) -> int:
            try:
                return files.allocated_bytes(directory / disk.name)
            except FileNotFoundError:
                return 0

        disks = [msgspec.structs.replace(disk, allocated_bytes=occupied(disk)) for disk in info.disks]
        return msgspec.structs.replace(info, disks=disks)

    def _entries(self) -> Iterator[tuple[str, str]]:
        with files.disk_errors(self.root):
            for name in os.listdir(self.root):
                match = _ENTRY.match(name)
                if match:
                    yield name.removesuffix(match[1]) if match[1] else name, match[1]


def _delete(path: Path) -> None:
    """Remove a file, a link or a tree; rmtree works by descriptors and follows no link."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
