"""What a driver's contract tests need to know of the world behind it: one class for each driver implements it."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from compute_worker.objects import Instance, Migration
from compute_worker.virt.driver import ComputeDriver, GuestInfo, Job, Part, Peer

RESIZE = "resize"
LIVE = "live_migration"
SNAPSHOT = "snapshot"
EVERYTHING = frozenset({RESIZE, LIVE, SNAPSHOT})


class World(Protocol):
    """Two hosts, ``a`` and ``b``, looked at from outside of the drivers.

    ``supports``: what of :data:`EVERYTHING` the driver can; tests of the rest are skipped, and only those.
    """

    supports: frozenset[str]
    a: str
    b: str
    guest_writes_disk: bool
    """Whether :meth:`write_disk` can make a guest write."""
    plugs_with_guest: bool
    """Whether interfaces come and go with the guest's process; ``plug_vifs`` then makes sure that they can."""

    def driver(self, host: str) -> ComputeDriver:
        """The worker's driver on ``host``, initialised."""

    def restart(self, host: str) -> ComputeDriver:
        """The worker on ``host`` was killed and begins anew: another driver for the same host."""

    def new_instance(self, host: str, **changes: Any) -> Instance:
        """A record of an instance that can boot on ``host``: an image that exists, two disks beside the root disk,
        one interface, a uuid nobody had."""

    def power(self, host: str, uuid: str) -> str:
        """Power state as the hypervisor itself says it: ``running``, ``paused``, ``shutdown``, ``suspended``,
        ``nostate`` for no such guest."""

    def files(self, host: str, uuid: str) -> set[str]:
        """Paths below the instances directory that belong to the instance: ``<uuid>/disk``, ``<uuid>_resize/...``."""

    def plugged(self, host: str, uuid: str) -> set[str]:
        """Names of the instance's interfaces that are there."""

    def boots(self, host: str, uuid: str) -> int:
        """How often the guest was started from cold on ``host``."""

    def memory(self, host: str, uuid: str) -> tuple[str, int]:
        """A token that a guest has as long as it keeps its memory, and a counter that grows while it runs."""

    def write_disk(self, host: str, uuid: str, data: bytes) -> None:
        """The running guest writes to its root disk."""

    def read_disk(self, host: str, uuid: str) -> bytes:
        """What is on the root disk of ``<uuid>``, as the guest reads it."""

    def guest_dies(self, host: str, uuid: str) -> None:
        """The guest's process is killed."""

    def images(self) -> set[str]:
        """Ids of the images in the store, and of what is half in it."""

    def base_image(self, instance: Instance) -> bool:
        """Whether the instance's image is in the cache of host ``a``."""


def run(parts: list[Part], job: Job, times: int = 1) -> dict[str, Any]:
    """Do all parts in order, each ``times`` times; what the last one told."""
    told: dict[str, Any] = {}
    for part in parts:
        for _ in range(times):
            told = dict(part.do(job) or {})
    return told


def undo(parts: list[Part], job: Job, times: int = 1) -> None:
    """Undo all parts in reverse order, each ``times`` times."""
    for part in reversed(parts):
        for _ in range(times):
            part.undo(job)


def moving(instance: Instance, migration: Migration, **changes: Any) -> Instance:
    """The record while ``migration`` is under way."""
    return msgspec.structs.replace(instance, migration=migration.uuid, **changes)


def peer(world: World, instance: Instance, migration: Migration) -> Peer:
    """How the driver at the source asks the one at the destination, without an RPC between."""
    return lambda request: world.driver(migration.dest_host).answer_peer(instance, migration, request)


def info_of(driver: ComputeDriver, uuid: str) -> GuestInfo | None:
    """``get_info`` by way of ``list_instances``; ``None`` where there is no such guest."""
    return next((info for info in driver.list_instances() if info.uuid == uuid), None)
