"""That libvirt was asked to move a guest: ``live_migration.json`` beside its disks, at the source."""

from __future__ import annotations

from pathlib import Path

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Migration
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory

_NAME = "live_migration.json"


class Begun(msgspec.Struct, frozen=True):
    """One flight. ``paused``: the guest was stopped, by an operator or the policy, so that it ends."""

    migration: str
    attempt: int = 1
    paused: bool = False


class Records:
    """The records of a host's instances."""

    def __init__(self, directory: InstancesDirectory) -> None:
        self._directory = directory

    def begun(self, uuid: str, migration: Migration) -> bool:
        """Whether this attempt of this migration was begun."""
        found = self.read(uuid)
        return found is not None and (found.migration, found.attempt) == (migration.uuid, migration.attempt)

    def read(self, uuid: str) -> Begun | None:
        """The last flight that was begun and not settled.

        :raises Broken: the record is unreadable.
        """
        path = self._path(uuid)
        with files.disk_errors(path):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        try:
            return msgspec.json.decode(data, type=Begun)
        except msgspec.DecodeError as exc:
            raise errors.Broken(f"{path} is not readable ({str(exc)[:200]}): remove it") from None

    def write(self, uuid: str, begun: Begun) -> None:
        """Durable when this returns."""
        files.write_atomic(self._path(uuid), msgspec.json.encode(begun))

    def forget(self, uuid: str) -> None:
        """It is settled. Ends well when there is none."""
        path = self._path(uuid)
        with files.disk_errors(path):
            if path.parent.is_dir():
                path.unlink(missing_ok=True)

    def _path(self, uuid: str) -> Path:
        return self._directory.path(uuid) / _NAME
