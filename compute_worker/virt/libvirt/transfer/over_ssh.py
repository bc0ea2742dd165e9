"""Disks by rsync over ssh: for hosts that can log in to each other and have no certificates."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Migration
from compute_worker.virt.driver import Job, NullJob, Peer
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.disks.process import Limits
from compute_worker.virt.libvirt.transfer import address, verify
from compute_worker.virt.libvirt.transfer.base import DiskTransport, Shipment

_LOST = frozenset({"10", "12", "14", "19", "20", "30", "35", "137", "143", "255", "SIGKILL", "SIGTERM"})
"""rsync(1), exit values: socket, protocol stream, its own processes, signals, time-outs; ssh's own; and the ends of one
that somebody killed, here or (as a shell tells it) there."""
_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
_PROGRESS = re.compile(rb"(?:^|[\r\n])\s*(\d+)\s+\d+%")
_SPARSE = 1.1


class SshTransport(DiskTransport):
    """rsync into the part itself: a second try sends what the first did not, found by checksums of blocks."""

    name: ClassVar[str] = "ssh"

    def usable(self, migration: Migration, peer: Peer) -> tuple[bool, str]:
        """Whether ssh logs in there without asking anybody, now."""
        for program in ("ssh", "rsync"):
            if process.find_program(program) is None:
                return False, f"{program} is missing on this host"
        facts = peer({"ask": "facts"})
        if not facts["rsync"]:
            return False, f"rsync is missing on host {migration.dest_host}"
        host = facts["address"] or migration.dest_host
        try:
            process.run([*self._ssh(), "--", self._login(host), "true"], NullJob(), limits=Limits())
        except errors.Broken as exc:
            return False, f"cannot log in to {host}: {exc}"
        return True, f"ssh logs in to {host}"

    def send(self, shipment: Shipment, peer: Peer, job: Job) -> None:
        """rsync, again when its connection broke; then compare; then give the file its name."""
        begun = peer({"ask": "begin"})
        login = self._login(begun["address"] or shipment.migration.dest_host, address.in_url)
        for attempt in range(1, _ATTEMPTS + 1):
            placed = peer({"ask": "place", "name": shipment.name})
            if placed["complete"]:
                break
            if not address.is_path(placed["path"]):
                raise self._failed(shipment, f"{placed['path']!r} there is no path that is safe to give to rsync")
            try:
                self._rsync(shipment, f"{login}:{placed['path']}", job)
                break
            except errors.CommandFailed as exc:
                if attempt == _ATTEMPTS or str(exc.kwargs["status"]) not in _LOST:
                    raise self._failed(shipment, str(exc)) from None
                job.explain(f"{shipment.name}: {exc}; going on with what arrived")
                job.wait(lambda: False, _PAUSE_SECONDS * attempt)
        verify.finish(shipment, peer, job, full=self.settings.transfer.compare == "full")

    def _rsync(self, shipment: Shipment, target: str, job: Job) -> None:
        size = shipment.source.lstat().st_size
        words = [
            "rsync",
            "--inplace",
            "--partial",
            "--sparse",
            "--ignore-times",
            "--no-whole-file",
            "--timeout=60",
            "--info=progress2",
            "--no-human-readable",
            "--outbuf=L",
            # The login is the other host's and its shell is nobody's business.
            "--secluded-args",
            "--rsh=" + shlex.join(["setpriv", "--pdeathsig", "KILL", "--", *self._ssh()]),
        ]
        if size > _SPARSE * files.allocated_bytes(shipment.source):
            # rsync reads holes as zeros and would send each of them.
            words += ["--compress", "--compress-level=1"]
        if self.settings.transfer.bandwidth_mb:
            words.append(f"--bwlimit={self.settings.transfer.bandwidth_mb}M")
        process.run(
            [*words, "--", shipment.source, target],
            job,
            limits=Limits(),
            writes=Path(target),
            on_output=_progress(job, shipment.phase, size),
        )

    def _ssh(self) -> list[str]:
        return ["ssh", *shlex.split(self.settings.transfer.ssh_options)]

    def _login(self, host: str, written: Callable[[str], str] = str) -> str:
        user = self.settings.transfer.ssh_user
        if not address.is_host(host) or (user and not address.is_user(user)):
            raise errors.Broken(f"{host!r} is no address, or {user!r} (transfer.ssh_user) no login name")
        return (f"{user}@" if user else "") + written(host)

    @staticmethod
    def _failed(shipment: Shipment, reason: str) -> errors.MigrationFailed:
        where = f"sending {shipment.name} to host {shipment.migration.dest_host}"
        return errors.MigrationFailed(migration=shipment.migration.uuid, reason=f"{where}: {reason}")


def _progress(job: Job, phase: str, size: int) -> Callable[[bytes], None]:
    def see(piece: bytes) -> None:
        found = _PROGRESS.findall(piece)
        if found:
            job.report(phase, min(size, int(found[-1])), size)

    return see
