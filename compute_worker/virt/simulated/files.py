"""The files of a simulated host: instance directories, base images, and the room there is for them."""

from __future__ import annotations

import hashlib
import time
from contextlib import AbstractContextManager, nullcontext

from compute_worker.errors import DiskFull
from compute_worker.virt.simulated.disk import Persistence
from compute_worker.virt.simulated.model import Directory, File, Slot

RECORD = "instance.json"
DISK_INFO = "disk.info"
CONSOLE = "console.log"
RESIZE = "_resize"
DELETED = "_del"
PART = ".part"
PLAIN = frozenset({RECORD, DISK_INFO, CONSOLE})
"""Files in an instance directory that are no disks."""


def base_name(image_id: str) -> str:
    """Name of an image in ``_base``."""
    return hashlib.sha1(image_id.encode(), usedforsecurity=False).hexdigest()


class HostFiles:
    """What is on the host's disk. Its methods are called under the cell's lock."""

    def __init__(self, name: str, persistence: Persistence | None) -> None:
        self.name = name
        self.base: dict[str, File] = {}
        self.slots: dict[str, Slot] = {}
        self.disk_limit_bytes: int | None = None
        """Room for what is written; beyond it a write ends half done with DiskFull. ``None``: endless."""
        self._persistence = persistence

    def path(self, uuid: str, suffix: str = "") -> str:
        """A directory's name, for people."""
        return f"{self.name}:instances/{uuid}{suffix}"

    def slot(self, uuid: str) -> Slot:
        """Everything of one instance; empty where there is nothing."""
        return self.slots.get(uuid) or Slot(uuid=uuid)

    def together(self) -> AbstractContextManager[None]:
        """A death of the process leaves all changes made within, or none of them."""
        return self._persistence.together() if self._persistence is not None else nullcontext()

    def changed(self, slot: Slot) -> None:
        """Keep ``slot`` as it is now."""
        if slot.empty:
            self.slots.pop(slot.uuid, None)
        else:
            self.slots[slot.uuid] = slot
        if self._persistence is not None:
            self._persistence.save_slot(slot)

    def directory(self, uuid: str, suffix: str = "") -> Directory | None:
        """The files of an instance directory, or ``None``."""
        slot = self.slots.get(uuid)
        return slot.directories.get(suffix) if slot is not None else None

    def home(self, uuid: str) -> tuple[str, Directory] | None:
        """The directory that holds an instance, with its suffix: its own, else the one set aside."""
        for suffix in ("", RESIZE):
            directory = self.directory(uuid, suffix)
            if directory is not None:
                return suffix, directory
        return None

    def write(self, uuid: str, files: Directory, suffix: str = "") -> None:
        """Put files into a directory, made where it is missing; all appear whole or, with no room, one as ``.part``.

        :raises DiskFull: there is no room.
        """
        slot = self.slot(uuid)
        directory = slot.directories.setdefault(suffix, {})
        for name, file in files.items():
            previous = directory.get(name)
            self._need(len(file.data) - (len(previous.data) if previous else 0), slot, directory, name, file)
            directory[name] = file
        self.changed(slot)

    def remove(self, uuid: str, name: str, suffix: str = "") -> None:
        """Remove a file, where it is."""
        slot = self.slot(uuid)
        if slot.directories.get(suffix, {}).pop(name, None) is not None:
            self.changed(slot)

    def rename(self, uuid: str, old: str, new: str) -> bool:
        """Rename a directory by suffix, over what has that name. False where there is none."""
        slot = self.slot(uuid)
        directory = slot.directories.pop(old, None)
        if directory is None:
            return False
        slot.directories[new] = directory
        self.changed(slot)
        return True

    def remove_directory(self, uuid: str, suffix: str = "") -> None:
        """Remove a directory, where it is."""
        slot = self.slot(uuid)
        if slot.directories.pop(suffix, None) is not None:
            self.changed(slot)

    def write_base(self, name: str, file: File) -> None:
        """Put a base image (or its ``.part``) into the cache.

        :raises DiskFull: there is no room.
        """
        if self.disk_limit_bytes is not None and self.allocated() + len(file.data) > self.disk_limit_bytes:
            raise DiskFull(path=f"{self.name}:_base/{name}")
        file.used_at = time.time()
        self.base[name] = file
        self._base_changed()

    def touch_base(self, name: str) -> None:
        """Somebody used it now. (Kept over a restart only with the next change: that is early enough.)"""
        self.base[name].used_at = time.time()

    def rename_base(self, name: str) -> None:
        """``<name>.part`` is whole: it becomes ``<name>``."""
        self.base[name] = self.base.pop(name + PART)
        self._base_changed()

    def remove_base(self, name: str) -> None:
        """Remove a base image, where it is."""
        if self.base.pop(name, None) is not None:
            self._base_changed()

    def allocated(self) -> int:
        """Bytes of all that was written on this host."""
        disks = (f for s in self.slots.values() for d in s.directories.values() for f in d.values())
        return sum(len(f.data) for f in disks) + sum(len(f.data) for f in self.base.values())

    def content(self, file: File) -> bytes:
        """What a guest reads from a disk: the base image's bytes and its own."""
        base = self.base[file.backing].data if file.backing else b""
        return base + file.data

    def _base_changed(self) -> None:
        if self._persistence is not None:
            self._persistence.save_base(self.base)

    def _need(self, more: int, slot: Slot, directory: Directory, name: str, file: File) -> None:
        if self.disk_limit_bytes is None or more <= 0 or self.allocated() + more <= self.disk_limit_bytes:
            return
        part = name if name.endswith(PART) else name + PART
        directory[part] = File(file.data[: len(file.data) // 2], file.format, file.size, file.backing)
        self.changed(slot)
        raise DiskFull(path=self.path(slot.uuid), instance=slot.uuid)
