"""A point in time of a running guest's disk, kept by the hypervisor: a backup job in pull mode over a unix socket.

Whoever reads it slowly, or not at all, stalls only himself. What the guest overwrites meanwhile is kept in a scratch
file beside the disks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from compute_worker import errors
from compute_worker.images import files
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job, NullJob
from compute_worker.virt.libvirt import backup_xml
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from compute_worker.virt.libvirt.domain_disk import Disk as Device
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.snapshot import reading
from compute_worker.virt.libvirt.snapshot.reading import Reader, Still, Unreadable
from compute_worker.virt.libvirt.transfer.layer import ALLOCATION
from compute_worker.virt.libvirt.transfer.nbd import Connection, NbdError

PREFIX = "snapshot-"
"""Of checkpoints and bitmaps: what else a disk has of them is not ours."""
SOCKET = "nbd"
KEEP_FREE = 512 << 20
"""Bytes left on the file system at which a backup is given up: what the guest overwrites is kept there meanwhile, and
must not take the guest's own room."""
ON = frozenset({PowerState.RUNNING, PowerState.PAUSED})
_LONGEST_SOCKET = 107
_END_SECONDS = 30.0


def new_token() -> str:
    """A name for a checkpoint that nobody had."""
    return PREFIX + secrets.token_hex(8)


def disks(guest: Guest) -> Sequence[Device]:
    """The disks that it has now."""
    devices = guest.domain().devices
    return devices.disks if devices is not None else ()


def obstacle(guest: Guest, target: str, place: Path) -> str:
    """Why the hypervisor cannot keep a point in time of the disk ``target``; empty: it can.

    :raises HypervisorBusy: another job runs on the guest.
    """
    if not target:
        return "the guest does not have its root disk as a file"
    if len(os.fsencode(place / SOCKET)) > _LONGEST_SOCKET:
        return f"the path {place / SOCKET} is too long for a socket"
    job = guest.job_operation()
    if job:
        raise errors.HypervisorBusy(reason=f"a {job} of instance {guest.uuid} is running")
    room = os.statvfs(place.parent)
    if room.f_bavail * room.f_frsize < KEEP_FREE:
        return f"less than {KEEP_FREE >> 20} MiB are left for what the guest overwrites meanwhile"
    return ""


class LiveDisk:
    """The disk ``target`` of a guest in the backup job at ``place`` (the snapshot's own directory)."""

    def __init__(self, guest: Guest, target: str, place: Path) -> None:
        self._guest = guest
        self._target = target
        self._place = place

    @property
    def address(self) -> Path:
        """The socket."""
        return self._place / SOCKET

    def make_scratch(self, qemu_img: QemuImg, size_bytes: int, group: str, job: Job) -> None:
        """Made here, as the disks are: what libvirt would make is root's, and stays so where it does not manage
        owners."""
        path = self._scratch
        with files.disk_errors(path):
            path.unlink(missing_ok=True)
        qemu_img.create(path, "qcow2", size_bytes, job)
        with files.disk_errors(path):
            files.give_to_group(path, group, 0o660 if group else 0o600)

    def begin(self, token: str, since: str) -> None:
        """The point in time is now.

        :param token: a checkpoint to make with it; empty: none.
        :param since: the checkpoint whose bitmap is to be readable; empty: none.
        :raises GuestFailed: the hypervisor refuses.
        """
        others = [device.target_dev or "" for device in disks(self._guest) if device.target_dev != self._target]
        checkpoint = backup_xml.checkpoint(token, [self._target], others) if token else None
        xml = backup_xml.pull(self.address, {self._target: self._scratch}, others, since)
        self._guest.backup_begin(xml, checkpoint, reuse_external=True)

    def stands(self) -> bool:
        """Whether the backup is there: it outlives this process and libvirt's."""
        running = self._guest.backup_xml()
        return running is not None and str(self.address) in running

    def end(self) -> None:
        """No backup of ours is left. Ends well when there was none, or no guest."""
        with suppress(errors.InstanceNotFound, errors.NotSupported):
            if self.stands():
                self._guest.abort_job()
                # libvirt ends it behind our back; until then the guest takes no other job.
                NullJob().wait(lambda: not self.stands(), _END_SECONDS)

    def look(self, since: str) -> Still:
        """Its size, data, and what was written since.

        :raises Unreadable: it is gone.
        """
        dirty = f"qemu:dirty-bitmap:{backup_xml.BITMAP}" if since else ""
        contexts = (ALLOCATION, dirty) if since else (ALLOCATION,)
        try:
            return reading.look(Connection(self.address, self._target, contexts=contexts), dirty)
        except NbdError as exc:
            raise Unreadable(str(exc)) from None

    def connect(self) -> Reader:
        """A reader of it."""
        connection = Connection(self.address, self._target, contexts=(ALLOCATION,))
        connection.open()
        return connection

    def check_room(self) -> None:
        """:raises DiskFull: the guest's own room is in danger."""
        room = os.statvfs(self._place)
        if room.f_bavail * room.f_frsize < KEEP_FREE:
            raise errors.DiskFull(
                message=f"less than {KEEP_FREE >> 20} MiB are left on {self._place} for what the guest overwrites "
                "while its disk is read"
            )

    @property
    def _scratch(self) -> Path:
        return self._place / f"{self._target}.scratch"


def drop_checkpoints(guest: Guest, disk: Path | None, qemu_img: QemuImg, keep: str = "") -> None:
    """No checkpoint of ours, nor its bitmap, is left but ``keep``. A bitmap that is broken goes when the guest is off.

    :param disk: the guest's qcow2, looked at when the guest is off; ``None``: it has none.
    """
    on = guest.power_state() in ON
    with suppress(errors.InstanceNotFound, errors.NotSupported):
        for name in guest.checkpoints():
            if name.startswith(PREFIX) and name != keep:
                try:
                    guest.delete_checkpoint(name, metadata_only=not on)
                except errors.GuestFailed:
                    guest.delete_checkpoint(name, metadata_only=True)
    if not on and disk is not None and disk.is_file():
        qemu_img.remove_bitmaps(disk, PREFIX, NullJob(), keep)
