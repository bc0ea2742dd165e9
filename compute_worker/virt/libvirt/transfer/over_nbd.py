"""Disks over NBD and TLS: our own client here, ``qemu-nbd`` there; no shell, no login between the hosts."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Migration
from compute_worker.virt.driver import Job, Peer
from compute_worker.virt.libvirt.transfer import address, extents, tls, verify, windows
from compute_worker.virt.libvirt.transfer.attempts import Attempts, address_of, security_of
from compute_worker.virt.libvirt.transfer.base import DiskTransport, Shipment
from compute_worker.virt.libvirt.transfer.nbd import Connection
from compute_worker.virt.libvirt.transfer.pace import Pace
from compute_worker.virt.libvirt.transfer.push import FileReader, Push


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
        host = address_of(shipment.migration, peer)
        attempts = Attempts(shipment, job)
        while True:
            opened = self._open(shipment, peer)
            if opened["complete"]:
                break
            with attempts.one(len(windows.numbers(opened["windows"]))) as attempt:
                self._push(shipment, peer, job, host, opened)
            if attempt.ended:
                peer({"ask": "stop", "name": shipment.name})
                break
        verify.finish(shipment, peer, job, full=self.settings.transfer.compare == "full")

    def _open(self, shipment: Shipment, peer: Peer) -> Mapping[str, Any]:
        size = shipment.source.lstat().st_size
        window = self.settings.transfer.window_mb << 20
        return peer({"ask": "open", "name": shipment.name, "size": size, "window": window})

    def _push(self, shipment: Shipment, peer: Peer, job: Job, host: str, opened: Mapping[str, Any]) -> None:
        options = self.settings.transfer
        window = options.window_mb << 20
        arrived = windows.numbers(opened["windows"])
        security = security_of(self.settings.transfer, shipment.migration, opened)
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


def _data(fd: int, number: int, window: int, size: int) -> int:
    begin = number * window
    return extents.length(extents.data_extents(fd, begin, min(begin + window, size)))
