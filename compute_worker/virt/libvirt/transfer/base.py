"""What every disk transport is, and which one a move takes.

A transport is an entry point of ``compute_worker.disk_transports`` and is constructed as ``Transport(settings)``. It
sends bytes as they are: no format of a tenant is looked at on the way. It speaks to the destination through ``peer``
(:mod:`compute_worker.virt.libvirt.transfer.receiver` answers there), which is how hosts know that they are who they
say; what carries the bytes proves itself on its own (TLS certificates, ssh keys, a file seen by both).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.objects import Migration
from compute_worker.virt.driver import Job, Peer

NAMESPACE = "compute_worker.disk_transports"
SHARED = "shared"
AUTO = "auto"
_AUTOMATIC = ("nbd", "ssh")
"""What ``auto`` tries, in order."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """One file of an instance that goes to ``migration.dest_host``.

    ``name``: the file in the instance's directory there; ``source``: the file here, which nobody writes to any more;
    ``format``: from ``disk.info``, for people only.
    """

    uuid: str
    migration: Migration
    name: str
    source: Path
    format: str = "raw"

    @property
    def phase(self) -> str:
        """What progress is reported as."""
        return f"send_{self.name}"


class DiskTransport(abc.ABC):
    """One way for bytes to get to another host. Keeps nothing in memory between calls."""

    name: ClassVar[str]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abc.abstractmethod
    def usable(self, migration: Migration, peer: Peer) -> tuple[bool, str]:
        """Whether this transport can be used between these two hosts, and why (not). Leaves nothing behind.

        :raises PeerUnavailable: the destination does not answer.
        """

    @abc.abstractmethod
    def send(self, shipment: Shipment, peer: Peer, job: Job) -> None:
        """Afterwards ``<instances>/<uuid>/<name>`` at the destination has the same bytes and holes, durably.

        Called again it goes on where it was, also after either side died; called once more after it ended it only
        compares. Reports bytes as ``send_<name>``; a cancelled job ends every process and connection that it has here.

        :raises DestinationDiskExists: the instance has a directory there that is not this migration's.
        :raises DiskFull: no room at the destination.
        :raises PeerUnavailable: the destination does not answer.
        :raises MigrationFailed: what arrived is not what was sent, or the other end is not who it should be.
        """


def load(name: str, settings: Settings) -> DiskTransport:
    """The transport ``name``.

    :raises compute_worker.errors.Broken: none of that name is installed.
    """
    from stevedore import driver, exception

    try:
        made: DiskTransport = driver.DriverManager(NAMESPACE, name).driver(settings)
    except exception.NoMatches:
        raise errors.Broken(f"no disk transport {name!r} (transfer.transport) is installed in {NAMESPACE}") from None
    return made


def choose(settings: Settings, migration: Migration, peer: Peer, job: Job) -> DiskTransport:
    """The transport of this move, told to ``job.explain`` with the reason: none where both hosts see the same
    directory; else the configured one; ``auto``: the first of nbd (over TLS) and ssh that works.

    :raises MigrationFailed: none can be used; says why for each.
    """
    wanted = settings.transfer.transport
    refused = []
    for name in (SHARED, *(_AUTOMATIC if wanted == AUTO else (wanted,))):
        transport = load(name, settings)
        usable, reason = transport.usable(migration, peer)
        if usable:
            job.explain(f"disks go to {migration.dest_host} by {name}: {reason}")
            return transport
        refused.append(f"{name}: {reason}")
    raise errors.MigrationFailed(migration=migration.uuid, reason="no disk transport works: " + "; ".join(refused))
