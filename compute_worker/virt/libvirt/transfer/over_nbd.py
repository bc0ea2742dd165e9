"""Disks over NBD and TLS: our own client here, ``qemu-nbd`` there; no shell, no login between the hosts."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Migration
from compute_worker.virt.driver import Job, Peer
from compute_worker.virt.libvirt.transfer import address, extents, tls, verify, windows
from compute_worker.virt.libvirt.transfer.base import DiskTransport, Shipment
from compute_worker.virt.libvirt.transfer.nbd import Connection, ConnectionLost, NbdError, RequestFailed, Tls
from compute_worker.virt.libvirt.transfer.pace import Pace
from compute_worker.virt.libvirt.transfer.push import FileReader, Push

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ATTEMPTS = 4
"""Connections lost one after the other with nothing arriving between, until it is taken for broken."""
_PAUSE_SECONDS = 1.0


class NbdTransport(DiskTransport):
    """Windows of opaque bytes, several at once, each flushed there and recorded there before it counts."""

    name: ClassVar[str] = "nbd"

    def usable(self, migration: Migration, peer: Peer) -> tuple[bool, str]:
        """Certificates on both sides, or sending in the clear allowed on both."""
        facts = peer({"ask": "facts"})
        host = facts["address"] or migration.dest_host
        ours = tls.problem(self.settings.transfer.tls_dir, "client")
        if not facts["nbd"]:
            return False, f"qemu-nbd is missing on host {migration.dest_host}"
        if not address.is_host(host):
            return False, f"{host!r} is not an address: set transfer.address on host {migration.dest_host}"
        if ours is None and facts["tls"]:
            return True, "both hosts have certificates"
        reason = ours or f"host {migration.dest_host}: {facts['tls_problem']}"
        if self.settings.transfer.nbd_plaintext and not facts["tls"]:
            return True, f"in the clear, as transfer.nbd_plaintext allows ({reason})"
        return False, reason

    def send(self, shipment: Shipment, peer: Peer, job: Job) -> None:
        """Windows that are not there yet; then compare; then give the file its name."""
        begun = peer({"ask": "begin"})
        host = begun["address"] or shipment.migration.dest_host
        failures, before = 0, -1
        while True:
            opened = self._open(shipment, peer)
            if opened["complete"]:
                break
            there = len(windows.numbers(opened["windows"]))
            try:
                self._push(shipment, peer, job, host, opened)
                peer({"ask": "stop", "name": shipment.name})
                break
            except ConnectionLost as exc:
                failures = 1 if there > before else failures + 1
                before = max(before, there)
                if failures >= _ATTEMPTS:
                    raise self._failed(shipment, f"the connection was lost {failures} times: {exc}") from None
                job.explain(f"{shipment.name}: {exc}; going on with what arrived")
                job.wait(lambda: False, _PAUSE_SECONDS * failures)
            except (NbdError, errors.DiskFull) as exc:
                if isinstance(exc, errors.DiskFull) or (isinstance(exc, RequestFailed) and exc.errno in _FULL):
                    raise errors.DiskFull(path=f"{shipment.migration.dest_host}:{begun['path']}") from None
                raise self._failed(shipment, str(exc)) from None
        verify.finish(shipment, peer, job, full=self.settings.transfer.compare == "full")

    def _open(self, shipment: Shipment, peer: Peer) -> Mapping[str, Any]:
        size = shipment.source.lstat().st_size
        window = self.settings.transfer.window_mb << 20
        return peer({"ask": "open", "name": shipment.name, "size": size, "window": window})

    def _push(self, shipment: Shipment, peer: Peer, job: Job, host: str, opened: Mapping[str, Any]) -> None:
        options = self.settings.transfer
        window = options.window_mb << 20
        arrived = windows.numbers(opened["windows"])
        security = self._security(shipment, opened)
        unrecorded: list[int] = []

        def record(done: list[int]) -> None:
            unrecorded.extend(done)
            try:
                peer({"ask": "windows", "name": shipment.name, "done": windows.runs_of(unrecorded)})
                unrecorded.clear()
            except errors.PeerUnavailable:
                # The bytes do not go through the broker: on with them. What nobody recorded is at worst sent again.
                job.check()

        with files.disk_errors(shipment.source):
            fd = os.open(shipment.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                size = os.fstat(fd).st_size
                count = -(-size // window)
                data = [(n, _data(fd, n, window, size)) for n in range(count)]
                total = sum(b for _, b in data)
                here = sum(b for n, b in data if n in arrived)
                # A window that is all hole arrived when the file was made.
                push = Push(
                    [n for n, b in data if b and n not in arrived],
                    window=window,
                    size=size,
                    streams=options.streams,
                    pace=Pace(options.bandwidth_mb << 20),
                    connect=functools.partial(Connection, (host, opened["port"]), opened["export"], security),
                    reader=lambda: FileReader(fd),
                )
                push.run(job, record, lambda sent: job.report(shipment.phase, min(total, here + sent), total))
            finally:
                os.close(fd)

    def _security(self, shipment: Shipment, opened: Mapping[str, Any]) -> Tls | None:
        """Never less than this host asks for, whatever the other says."""
        if not opened["tls"] and self.settings.transfer.nbd_plaintext:
            return None
        context = tls.client_context(self.settings.transfer.tls_dir)
        return Tls(context, shipment.migration.dest_host)

    @staticmethod
    def _failed(shipment: Shipment, reason: str) -> errors.MigrationFailed:
        where = f"sending {shipment.name} to host {shipment.migration.dest_host}"
        return errors.MigrationFailed(migration=shipment.migration.uuid, reason=f"{where}: {reason}")


def _data(fd: int, number: int, window: int, size: int) -> int:
    begin = number * window
    return extents.length(extents.data_extents(fd, begin, min(begin + window, size)))
