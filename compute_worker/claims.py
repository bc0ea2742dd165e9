"""What of this host is promised to instances. A claim is a row written in the transaction that accepts its command."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from compute_worker import config, errors
from compute_worker.objects import Capacity, Instance
from compute_worker.operations.database import Database, Tx
from compute_worker.virt.driver import HostResources

SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (
    instance TEXT PRIMARY KEY,
    vcpus INTEGER NOT NULL,
    memory_mb INTEGER NOT NULL,
    disk_gb REAL NOT NULL
) WITHOUT ROWID;
"""

RESOURCES = ("vcpus", "memory_mb", "disk_gb")


@dataclass(frozen=True, slots=True)
class Amount:
    """Virtual processors, MiB of memory, GiB of disk."""

    vcpus: int
    memory_mb: int
    disk_gb: float


def amount_of(instance: Instance) -> Amount:
    """What an instance takes (its ephemeral disks are within the flavor). A root disk "as large as the image" counts
    with the size the image declares."""
    flavor, devices = instance.flavor, instance.block_device_info
    root_gb = flavor.root_gb or (instance.image.size_bytes or 0) / 2**30
    swap_mb = devices.swap_mb if devices.swap_mb is not None else flavor.swap_mb
    disk_gb = root_gb + flavor.ephemeral_gb + swap_mb / 1024
    return Amount(flavor.vcpus, flavor.memory_mb, disk_gb)


def capacities(found: HostResources, used: Amount, options: config.Claims) -> dict[str, Capacity]:
    """Total, usable and used of each resource."""
    rules = {
        "vcpus": (found.vcpus, options.cpu_allocation_ratio, options.reserved_host_cpus),
        "memory_mb": (found.memory_mb, options.ram_allocation_ratio, options.reserved_host_memory_mb),
        "disk_gb": (found.disk_gb, options.disk_allocation_ratio, options.reserved_host_disk_gb),
    }
    return {
        name: Capacity(total=total, usable=max(0.0, (total - reserved) * ratio), used=getattr(used, name))
        for name, (total, ratio, reserved) in rules.items()
    }


def decide(wanted: Amount, capacity: dict[str, Capacity]) -> tuple[str | None, str]:
    """The first resource that does not suffice, or ``None``; and the reason in words."""
    for name in RESOURCES:
        asked = getattr(wanted, name)
        if asked > capacity[name].free:
            return name, f"{name}: {asked:g} asked for, {capacity[name].free:g} of {capacity[name].usable:g} free"
    return None, "fits"


def holder_of(instance: str, migration: str, side: str) -> str:
    """Who holds the claim of one side of a move (``source``: the copy set aside; ``destination``: what is to come)."""
    return f"{instance}/{migration}/{side}"


class Claims:
    """The claims of one host against what :meth:`refresh` was told; accepting never asks the hypervisor."""

    def __init__(self, database: Database, host: str, options: config.Claims) -> None:
        self._database = database
        self._host = host
        self._options = options
        self._found: HostResources | None = None
        self._lock = threading.Lock()

    def refresh(self, found: HostResources) -> None:
        """What the host was found to have."""
        with self._lock:
            self._found = found

    @property
    def found(self) -> HostResources | None:
        """What the host was last found to have."""
        with self._lock:
            return self._found

    def claim(self, tx: Tx, instance: Instance, holder: str | None = None) -> None:
        """Promise the instance what it takes, instead of what it was promised before.

        :param holder: whose claim it is; the instance's own where absent, else one beside it (see :func:`holder_of`).

        :raises InsufficientResources: naming the resource; another host may have it.
        :raises HypervisorUnavailable: it was never asked what there is.
        """
        found = self.found
        if found is None:
            raise errors.HypervisorUnavailable(reason="it has not told yet what this host has")
        wanted = amount_of(instance)
        self.release(tx, holder or instance.uuid)
        capacity = capacities(found, self._used(tx), self._options)
        lacking, _ = decide(wanted, capacity)
        if lacking is not None:
            raise errors.InsufficientResources(
                host=self._host, resource=lacking, requested=getattr(wanted, lacking), free=capacity[lacking].free
            )
        self.force(tx, instance, holder)

    def force(self, tx: Tx, instance: Instance, holder: str | None = None) -> None:
        """Write the claim of an instance that is here already, whether it fits or not."""
        wanted = amount_of(instance)
        values = (holder or instance.uuid, wanted.vcpus, wanted.memory_mb, wanted.disk_gb)
        tx.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", values)

    def release(self, tx: Tx, holder: str) -> None:
        """Take the promise back. Ends well when there is none."""
        tx.execute("DELETE FROM claims WHERE instance = ?", (holder,))

    def release_all(self, tx: Tx, uuid: str) -> None:
        """Take back everything that was promised for an instance: its own claim and those of its moves."""
        tx.execute("DELETE FROM claims WHERE instance = ? OR instance LIKE ?", (uuid, f"{uuid}/%"))

    def hand_on(self, tx: Tx, holder: str, to: str) -> None:
        """A claim changes its holder, in the place of what that one held. Ends well when there is none."""
        if self._has(tx, holder):
            self.release(tx, to)
            tx.execute("UPDATE claims SET instance = ? WHERE instance = ?", (to, holder))

    @staticmethod
    def _has(tx: Tx, holder: str) -> bool:
        return tx.execute("SELECT 1 FROM claims WHERE instance = ?", (holder,)).fetchone() is not None

    def usage(self) -> dict[str, Capacity]:
        """Capacities as they are now; zeros while the host's own are not known."""
        found = self.found or HostResources(0, 0, 0, 0, "", 0, "")
        return self._database.read(lambda tx: capacities(found, self._used(tx), self._options))

    @staticmethod
    def _used(tx: Tx) -> Amount:
        row = tx.execute(
            "SELECT coalesce(sum(vcpus), 0), coalesce(sum(memory_mb), 0), coalesce(sum(disk_gb), 0.0) FROM claims"
        ).fetchone()
        return Amount(int(row[0]), int(row[1]), float(row[2]))
