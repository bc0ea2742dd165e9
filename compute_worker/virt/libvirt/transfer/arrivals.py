"""Files of an instance while they arrive: ``<name>.part``, its journal of windows, and the mark that says whose.

::

    <instances>/<uuid>/incoming.part        uuid of the migration that everything here comes by
    <instances>/<uuid>/<name>.part          bytes as they come; sparse
    <instances>/<uuid>/<name>.windows.part  which windows of it are there and flushed
    <instances>/<uuid>/<name>               whole, compared, on the disk
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Instance, Migration
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory

MARK = "incoming.part"
_RECORDS = frozenset(
    {"instance.json", "disk.info", "images.json", "migration.json", "libvirt.xml", "console.log", "incoming"}
)
_GRAIN = 4096


class Arrival:
    """The files of one disk that arrives."""

    def __init__(self, directory: Path, name: str, migration: str) -> None:
        if name in _RECORDS or name.endswith((".part", ".windows")):
            raise errors.InvalidCommand(method="answer_peer", problem=f"{name!r} is not a disk's name")
        self.migration = migration
        self.final = directory / name
        self.part = directory / f"{name}.part"
        self.journal = directory / f"{name}.windows.part"

    @property
    def present(self) -> Path:
        """The whole file where it is, else the part.

        :raises compute_worker.errors.MigrationFailed: neither is there.
        """
        for path in (self.final, self.part):
            if os.path.lexists(path):
                return path
        raise errors.MigrationFailed(migration=self.migration, reason=f"{self.final.name} has not begun to arrive")

    def make_part(self, size: int | None) -> None:
        """The part is there; with a ``size`` it has that, and holes where nothing came. A larger one is cut."""
        with files.disk_errors(self.part):
            if not os.path.lexists(self.part):
                files.create_private(self.part)
                files.fsync(self.part.parent)
            if not stat.S_ISREG(self.part.lstat().st_mode):
                raise errors.Broken(f"{self.part} is not a plain file: remove it")
            if size is not None:
                # QEMU counts in sectors: a size that is no multiple would lose or grow its end.
                os.truncate(self.part, -(-size // _GRAIN) * _GRAIN)

    def cut(self, size: int) -> None:
        """The part ends where the file at the source does."""
        if os.path.lexists(self.part) and self.part.lstat().st_size > size:
            with files.disk_errors(self.part):
                os.truncate(self.part, size)

    def publish(self, size: int | None, group: str) -> None:
        """The part becomes the file, durably; its owner and mode are those of a disk made here."""
        with files.disk_errors(self.final):
            if not os.path.lexists(self.part) and size in (None, self.final.lstat().st_size):
                self.journal.unlink(missing_ok=True)
                return
            if size is not None:
                self.cut(size)
            if size not in (None, self.part.lstat().st_size):
                reason = f"{self.part} has {self.part.lstat().st_size} bytes instead of {size}"
                raise errors.MigrationFailed(migration=self.migration, reason=reason)
            files.give_to_group(self.part, group, 0o660 if group else 0o600)
            files.publish(self.part, self.final)
            self.journal.unlink(missing_ok=True)

    def remove(self) -> None:
        """Nothing of the file is there."""
        with files.disk_errors(self.final):
            for path in (self.journal, self.part, self.final):
                path.unlink(missing_ok=True)
            if self.final.parent.is_dir():
                files.fsync(self.final.parent)


class Arrivals:
    """Directories of instances that come by a migration."""

    def __init__(self, directory: InstancesDirectory) -> None:
        self.directory = directory

    def begin(self, instance: Instance, migration: Migration) -> Path:
        """The instance's directory, made and marked as this migration's, with its record.

        :raises compute_worker.errors.DestinationDiskExists: it is there and came by no migration, or by another.
        """
        uuid = instance.uuid
        path = self.directory.path(uuid)
        if os.path.lexists(path) and self.owner(uuid) != migration.uuid and not self._just_begun(path):
            raise errors.DestinationDiskExists(instance=uuid, path=str(path))
        self.directory.create(uuid)
        if self.owner(uuid) != migration.uuid:
            # The mark is first: a directory without one is never this migration's, whatever its record says.
            files.write_atomic(path / MARK, migration.uuid.encode())
        # Written by its path: write_record prefers neither of two directories on one host.
        record = msgspec.structs.replace(instance, migration=migration.uuid)
        data = msgspec.json.format(msgspec.json.encode(record), indent=2)
        if not (path / "instance.json").exists():
            files.write_atomic(path / "instance.json", data)
        return path

    @staticmethod
    def _just_begun(path: Path) -> bool:
        """Whether a process died between making the directory and marking it."""
        return path.is_dir() and not path.is_symlink() and set(os.listdir(path)) <= {f"{MARK}.part"}

    def owner(self, uuid: str) -> str | None:
        """The migration that the directory is marked for."""
        try:
            return (self.directory.path(uuid) / MARK).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def ours(self, instance: Instance, migration: Migration) -> Path:
        """The instance's directory.

        :raises compute_worker.errors.MigrationFailed: it is not marked as this migration's.
        """
        path = self.directory.path(instance.uuid)
        if self.owner(instance.uuid) != migration.uuid:
            raise errors.MigrationFailed(migration=migration.uuid, reason=f"{path} is not where its disks arrive")
        return path

    def remove_file(self, instance: Instance, migration: Migration, name: str) -> None:
        """Remove this migration's copy of a file, and the directory when no disk is left in it."""
        if self.owner(instance.uuid) != migration.uuid:
            return
        path = self.directory.path(instance.uuid)
        Arrival(path, name, migration.uuid).remove()
        if set(os.listdir(path)) <= {MARK, "instance.json"}:
            self.directory.remove(instance.uuid)

    def remove_all(self, instance: Instance, migration: Migration) -> None:
        """Remove what came by this migration. A directory that is not marked as its own stays as it is."""
        if self.owner(instance.uuid) == migration.uuid:
            self.directory.remove(instance.uuid)

    def settle(self, instance: Instance) -> None:
        """The directory is the instance's from now on: the mark and everything half-written go."""
        self.directory.remove_parts(instance.uuid)
