"""Disks to a host that sees the same directory: nothing travels, the file is copied here, holes and all."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import ClassVar

from compute_worker import errors
from compute_worker.images import files
from compute_worker.objects import Migration
from compute_worker.virt.driver import Job, Peer
from compute_worker.virt.libvirt.disks import backends
from compute_worker.virt.libvirt.transfer import verify
from compute_worker.virt.libvirt.transfer.base import SHARED, DiskTransport, Shipment


class SharedTransport(DiskTransport):
    """A copy by the file system (shared extents where it can), so that the original stays for a revert."""

    name: ClassVar[str] = SHARED

    def usable(self, migration: Migration, peer: Peer) -> tuple[bool, str]:
        """Whether the destination sees a file that is written here now; both being one host, it does."""
        root, content = Path(self.settings.instances_path), secrets.token_hex(16)
        probe = root / f"probe-{secrets.token_hex(16)}"
        with files.disk_errors(probe):
            try:
                files.create_private(probe)
                probe.write_text(content)
                seen = peer({"ask": "probe", "name": probe.name, "content": content})["seen"]
            finally:
                probe.unlink(missing_ok=True)
        if seen:
            return True, f"host {migration.dest_host} sees the same {root}"
        return False, f"host {migration.dest_host} does not see {root} of this host"

    def send(self, shipment: Shipment, peer: Peer, job: Job) -> None:
        """Copied into the part beside the original; the destination gives it its name. An interrupted copy begins
        anew."""
        begun = peer({"ask": "begin"})
        placed = peer({"ask": "place", "name": shipment.name})
        directory = Path(self.settings.instances_path) / shipment.uuid
        if Path(begun["path"]).name != shipment.uuid or not directory.is_dir():
            reason = f"host {shipment.migration.dest_host} made {begun['path']}, which is not {directory} here"
            raise errors.MigrationFailed(migration=shipment.migration.uuid, reason=reason)
        if not placed["complete"]:
            part = directory / f"{shipment.name}.part"
            backends.sparse_copy(shipment.source, part, job, shipment.phase)
            with files.disk_errors(part):
                files.fsync(part)
        verify.finish(shipment, peer, job, full=self.settings.transfer.compare == "full")
