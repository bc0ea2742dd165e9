"""Connections to the destination's NBD server: with whom, and what a lost one means."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compute_worker import errors
from compute_worker.config import Transfer
from compute_worker.objects import Migration
from compute_worker.virt.driver import Job, Peer
from compute_worker.virt.libvirt.transfer import tls
from compute_worker.virt.libvirt.transfer.base import Shipment
from compute_worker.virt.libvirt.transfer.nbd import ConnectionLost, NbdError, RequestFailed, SourceFailed, Tls

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ATTEMPTS = 4
"""Connections lost one after the other with nothing arriving between, until it is taken for broken."""
_PAUSE_SECONDS = 1.0


def address_of(migration: Migration, peer: Peer) -> str:
    """Where the destination is reached; it has made room for the instance when this returns."""
    return str(peer({"ask": "begin"})["address"] or migration.dest_host)


def security_of(options: Transfer, migration: Migration, opened: Mapping[str, Any]) -> Tls | None:
    """How connections are secured: never less than this host asks for, whatever the other says."""
    if not opened["tls"] and options.nbd_plaintext:
        return None
    return Tls(tls.client_context(options.tls_dir), migration.dest_host)


@dataclass(slots=True)
class Attempt:
    """``ended``: whether it came to its end, else it is to be tried again."""

    ended: bool = False


class Attempts:
    """Tries to send one file: lost connections are tried again, as long as something arrives between."""

    def __init__(self, shipment: Shipment, job: Job) -> None:
        self._shipment = shipment
        self._job = job
        self._before = -1
        self._failures = 0

    @contextmanager
    def one(self, there: int) -> Iterator[Attempt]:
        """One try, begun with ``there`` windows at the destination. A connection that was lost ends it quietly, after
        a pause.

        :raises DiskFull: no room at the destination.
        :raises MigrationFailed: the other end is not who it should be, or too many connections were lost.
        :raises SourceFailed: the disk cannot be read here.
        """
        attempt = Attempt()
        try:
            yield attempt
            attempt.ended = True
        except SourceFailed:
            raise
        except ConnectionLost as exc:
            self._lost(there, exc)
        except (NbdError, errors.DiskFull) as exc:
            if isinstance(exc, errors.DiskFull) or (isinstance(exc, RequestFailed) and exc.errno in _FULL):
                raise errors.DiskFull(path=f"{self._shipment.migration.dest_host}:{self._shipment.name}") from None
            raise self._failed(str(exc)) from None

    def _lost(self, there: int, exc: ConnectionLost) -> None:
        self._failures = 1 if there > self._before else self._failures + 1
        self._before = max(self._before, there)
        if self._failures >= _ATTEMPTS:
            raise self._failed(f"the connection was lost {self._failures} times: {exc}") from None
        self._job.explain(f"{self._shipment.name}: {exc}; going on with what arrived")
        self._job.wait(lambda: False, _PAUSE_SECONDS * self._failures)

    def _failed(self, reason: str) -> errors.MigrationFailed:
        migration = self._shipment.migration
        where = f"sending {self._shipment.name} to host {migration.dest_host}"
        return errors.MigrationFailed(migration=migration.uuid, reason=f"{where}: {reason}")
