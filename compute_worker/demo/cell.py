"""What the scenario needs of a cell, whichever it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compute_worker.ctl.connect import Client
from compute_worker.objects import ImageMeta, Instance


@dataclass(frozen=True)
class Guest:
    """How to read what a guest of this cell writes to its console.

    :param boot: matches what it says once at each boot.
    :param tick: matches what it says again and again; group 1 counts.
    :param clean: matches what it says when it shuts itself down.
    :param memory_mb: what it needs.
    :param patience: seconds within which it boots, or shuts down.
    :param still: seconds in which it ticks for sure, so that one that does not stands still.
    :param keeps_count: whether its counter is on its disk, and goes on after a boot.
    """

    boot: str
    tick: str
    clean: str
    memory_mb: int
    patience: float
    still: float
    keeps_count: bool = False

    def boots(self, console: str) -> int:
        """How often it booted."""
        return len(re.findall(self.boot, console, re.MULTILINE))

    def last_tick(self, console: str) -> int:
        """Its counter; -1 before the first tick of this boot."""
        started = [match.end() for match in re.finditer(self.boot, console, re.MULTILINE)]
        ticks = re.findall(self.tick, console[started[-1] if started else 0 :], re.MULTILINE)
        return int(ticks[-1]) if ticks else -1

    def clean_shutdowns(self, console: str) -> int:
        """How often it shut itself down."""
        return len(re.findall(self.clean, console, re.MULTILINE))


class DemoCell(Protocol):
    """Two hosts or more with their workers and a broker, up already."""

    @property
    def title(self) -> str:
        """What it is, in a few words."""

    @property
    def client(self) -> Client:
        """The way to the workers."""

    @property
    def hosts(self) -> Sequence[str]:
        """Their names."""

    @property
    def guest(self) -> Guest:
        """How to read its guests."""

    @property
    def kernel_image(self) -> ImageMeta:
        """A qcow2 image that needs the kernel and ramdisk it names."""

    @property
    def disk_image(self) -> ImageMeta:
        """An image that boots by itself."""

    @property
    def sends_ahead(self) -> Collection[str]:
        """Hosts that send the disks of a running guest before they shut it down (``resize_precopy``)."""

    @property
    def line(self) -> str:
        """How disks travel between the hosts, in a few words."""

    @property
    def killing(self) -> str:
        """How :meth:`kill_worker` kills, in a few words."""

    def arm(self, host: str, instance: str) -> None:
        """Make sure that the next build of ``instance`` on ``host`` is under way when :meth:`kill_worker` comes."""

    def until_under_way(self, host: str, operation: str) -> None:
        """Until that build is in the middle of its steps.

        :raises AssertionError: it does not come there.
        """

    def kill_worker(self, host: str) -> None:
        """SIGKILL, or what comes nearest to it."""

    def start_worker(self, host: str) -> None:
        """Start it again; it answers when this returns."""

    def alive(self, instance: str) -> object | None:
        """Another value each time while the guest lives on any host, seen from outside."""

    def root_disk_bytes(self, host: str, instance: str, console: str) -> int:
        """How large the guest's root disk is, as the guest sees it where it says so (``console``)."""

    def fill(self, host: str, instance: str) -> int:
        """Write noise to the root disk of a guest that is off, where the guest itself has nothing: how many bytes."""

    def compare(self, source: str, dest: str, instance: str) -> str:
        """Look at every byte of the disks that ``source`` has set aside and that ``dest`` got, of a guest that has not
        run since: what was seen, in words.

        :raises AssertionError: a disk has a defect, or they differ.
        """

    @property
    def strict(self) -> Mapping[str, int | float | str]:
        """Options of ``[live_migration]`` by which a guest that does not converge is soon made to."""

    def policy(self, host: str, live: Mapping[str, int | float | str]) -> None:
        """Let ``host`` have these options of ``[live_migration]``, and its own for the rest."""

    def busy(self, instance: Instance) -> Instance:
        """A guest, not booted yet, as one that writes its memory faster than :attr:`strict` lets it be sent."""

    def hear(self, instance: str) -> Sequence[str]:
        """What each of its consoles on any host said, in the order in which they were first heard; called again and
        again it goes on with those that were removed meanwhile."""

    def leftovers(self) -> list[str]:
        """What is on the hosts of any instance, seen from outside: guests, domains, files, interfaces."""


@dataclass(frozen=True)
class Before:
    """A guest's counter and the size of its root disk."""

    counter: int
    disk_bytes: int


@dataclass
class Memory:
    """What later scenes know of earlier ones."""

    guests: dict[str, str] = field(default_factory=dict)
    """Name of a guest to its uuid."""
    where: dict[str, str] = field(default_factory=dict)
    """Uuid to host."""
    before: dict[str, Before] = field(default_factory=dict)
    """Name of a guest to what it was before it was moved while it was off."""
    off: dict[str, float] = field(default_factory=dict)
    """``warm`` and ``cold``: seconds that a resize of either kind kept a guest off."""
