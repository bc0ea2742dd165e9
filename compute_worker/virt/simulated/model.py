"""What a simulated host is made of: files, memory, domains, and all of it that belongs to one instance."""

from __future__ import annotations

import time

import msgspec

from compute_worker.states import PowerState

TICKS_PER_SECOND = 1000

Directory = dict[str, "File"]


class File(msgspec.Struct):
    """A disk or a plain file. ``data`` is what was written to it; ``size`` its virtual size in bytes."""

    data: bytes = b""
    format: str = "raw"
    size: int = 0
    backing: str | None = None
    used_at: float = 0.0

    def copy(self) -> File:
        """An independent file with the same content."""
        return File(self.data, self.format, self.size, self.backing, self.used_at)


class Memory(msgspec.Struct):
    """A guest's memory: ``token`` is new at each cold boot, ``ticks`` count the time its processors ran.

    Whoever kept the guest's memory (pause, suspend, live migration) shows the same token and no fewer ticks.
    """

    token: str
    ticks: int = 0
    since: float | None = None

    def now(self) -> int:
        """The counter as the guest would print it now."""
        if self.since is None:
            return self.ticks
        return self.ticks + max(0, int((time.time() - self.since) * TICKS_PER_SECOND))

    def run(self) -> None:
        """The processors begin to run."""
        if self.since is None:
            self.since = time.time()

    def halt(self) -> None:
        """The processors stop; the counter keeps its value."""
        self.ticks, self.since = self.now(), None


class Domain(msgspec.Struct):
    """A guest as the simulated hypervisor has it. ``saved`` is the memory that a suspend wrote to disk."""

    uuid: str
    name: str = ""
    vcpus: int = 1
    memory_mb: int = 0
    owner: str | None = None
    generation: int = 0
    migration: str | None = None
    persistent: bool = True
    power: PowerState = PowerState.SHUTDOWN
    reason: str = ""
    migrating: bool = False
    memory: Memory | None = None
    saved: Memory | None = None

    @property
    def alive(self) -> bool:
        """Whether there is a process with the guest's memory."""
        return self.power in (PowerState.RUNNING, PowerState.PAUSED)


class Slot(msgspec.Struct):
    """All that one host has of one instance. Directories by suffix: ``""``, ``_resize``, ``_del``."""

    uuid: str
    domain: Domain | None = None
    directories: dict[str, Directory] = {}
    vifs: dict[str, str] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing of the instance is here."""
        return self.domain is None and not self.directories and not self.vifs
