"""Warm resize: the disks of a running guest are sent before it is shut down, then only what it wrote meanwhile.

While the guest runs libvirt keeps a point in time for us (a backup in pull mode, with a checkpoint) and we read it over
a unix socket: a destination that stalls stalls us, never the guest. What the top layer of the disk holds is written
into an overlay that the destination makes. After the clean power-off the frozen layer says what is missing: everything
that the checkpoint's bitmap has as written since, and everything that the layer holds and the plan did not. So what
``qemu-img map`` did not see while qemu had it in memory alone is sent then.

Whatever goes wrong here is no failure of the move: the reason is returned, and the disk is sent as any other.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.images import files
from compute_worker.objects import Disk, DiskInfo, Migration
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job, NullJob, Peer
from compute_worker.virt.libvirt import backup_xml
from compute_worker.virt.libvirt.disks.instance_dir import RESIZE, InstancesDirectory
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from compute_worker.virt.libvirt.domain_disk import Disk as Device
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.snapshot.live import drop_checkpoints
from compute_worker.virt.libvirt.transfer import base, extents, layer, plan, windows
from compute_worker.virt.libvirt.transfer.attempts import Attempts, address_of, security_of
from compute_worker.virt.libvirt.transfer.base import Shipment
from compute_worker.virt.libvirt.transfer.extents import Extent
from compute_worker.virt.libvirt.transfer.layer import FrozenLayer, PlannedReader
from compute_worker.virt.libvirt.transfer.nbd import Connection, SourceFailed
from compute_worker.virt.libvirt.transfer.pace import Pace
from compute_worker.virt.libvirt.transfer.plan import DIRECTORY, Plan
from compute_worker.virt.libvirt.transfer.push import Push

LOG = logging.getLogger(__name__)
PREFIX = "precopy-"
"""Of checkpoints and bitmaps: what else a disk has of them is not ours."""
PHASE = "precopy"
_SOCKET = "nbd"
_LONGEST_SOCKET = 107
_END_SECONDS = 30.0
_ON = frozenset({PowerState.RUNNING, PowerState.PAUSED})
_KEEP_FREE = 512 << 20
"""Bytes left on the file system at which the copy is given up: what the guest overwrites is kept there meanwhile, and
must not take the guest's own room."""


class _GivenUp(Exception):
    """The disk is sent when the guest is off; says why."""


class Precopy:
    """The source's side. Keeps nothing in memory: what it must know again is in ``precopy.part`` beside the disks."""

    def __init__(self, settings: Settings, directory: InstancesDirectory, qemu_img: QemuImg) -> None:
        self._settings = settings
        self._options = settings.transfer
        self._directory = directory
        self._qemu_img = qemu_img

    # --- while the guest runs -----------------------------------------------------------------------------------

    def run(self, guest: Guest, migration: Migration, info: DiskInfo, peer: Peer, job: Job) -> dict[str, Any]:
        """Send what the guest's disks hold now. Returns ``disks``: by name the token of each that was sent, and
        ``reason``: why no others were.

        If the process dies inside, the guest runs on; called again, it goes on with the same point in time where that
        still stands. :meth:`abandon` ends it.

        :raises Cancelled: and :meth:`abandon` was done.
        :raises DiskFull: no room at the destination, while the guest still runs.
        :raises MigrationFailed: the destination is not who it should be, or its connections break.
        :raises PeerUnavailable: the destination does not answer.
        """
        for disk in info.disks:
            # Elsewhere nobody could build on what a snapshot left, and a disk does not go with its bitmaps.
            path = self._directory.path(guest.uuid) / disk.name
            drop_checkpoints(guest, path if disk.format == "qcow2" else None, self._qemu_img)
        try:
            targets = self._decide(guest, migration, info, peer, job)
        except _GivenUp as exc:
            job.explain(f"disks are sent when the guest is off: {exc}")
            return {"disks": {}, "reason": str(exc)}
        done: dict[str, str] = {}
        try:
            plans = self._attached(guest, targets) or self._begin(guest, targets, job)
            for disk, target in targets:
                self._send(guest.uuid, migration, disk, target, plans[disk.name], peer, job)
                done[disk.name] = plans[disk.name].token
            guest.abort_job()
        except (_GivenUp, SourceFailed, errors.GuestFailed, errors.CommandFailed, errors.NotSupported) as exc:
            self.abandon(guest, info)
            for name in [disk.name for disk, _ in targets]:
                peer({"ask": "remove", "name": name})
            job.explain(f"disks are sent when the guest is off: {exc}")
            return {"disks": {}, "reason": str(exc)}
        except BaseException:
            with suppress(errors.ComputeError):
                self.abandon(guest, info)
            raise
        left = [disk.name for disk in info.disks if disk.name not in done]
        return {"disks": done, "reason": f"sent when the guest is off: {', '.join(left)}" if left else ""}

    def _decide(
        self, guest: Guest, migration: Migration, info: DiskInfo, peer: Peer, job: Job
    ) -> list[tuple[Disk, str]]:
        """The disks that can be sent now, with the guest's names of them.

        :raises _GivenUp: none.
        """
        if self._options.resize_precopy == "never":
            raise _GivenUp("transfer.resize_precopy is never")
        if migration.source_host == migration.dest_host:
            raise _GivenUp("they stay on this host")
        if guest.power_state() not in _ON:
            raise _GivenUp("it is off")
        overlays = [disk for disk in info.disks if disk.format == "qcow2"]
        if not overlays:
            raise _GivenUp("none of them is a qcow2, which alone can say what was written since")
        place = self._directory.path(guest.uuid) / DIRECTORY / _SOCKET
        if len(os.fsencode(place)) > _LONGEST_SOCKET:
            raise _GivenUp(f"the path {place} is too long for a socket")
        running = guest.backup_xml()
        if running is not None and str(place) not in running:
            raise _GivenUp("another backup of it runs")
        chosen = base.choose(self._settings, migration, peer, job).name
        if chosen != "nbd":
            raise _GivenUp(f"they go by {chosen}, and only nbd can take what a running guest has")
        names = {device.source_file: device.target_dev for device in _disks(guest)}
        paths = [(disk, str(self._directory.path(guest.uuid) / disk.name)) for disk in overlays]
        return [(disk, target) for disk, path in paths if (target := names.get(path))]

    def _attached(self, guest: Guest, targets: Sequence[tuple[Disk, str]]) -> dict[str, Plan] | None:
        """The plans of a backup that a worker which died has begun; ``None``: there is none to go on with."""
        directory = self._directory.path(guest.uuid)
        plans = {disk.name: plan.read(directory, disk.name) for disk, _ in targets}
        found = {name: one for name, one in plans.items() if one is not None}
        tokens = {one.token for one in found.values()}
        whole = len(found) == len(targets) and len(tokens) == 1
        return found if whole and guest.backup_xml() is not None and tokens <= set(guest.checkpoints()) else None

    def _begin(self, guest: Guest, targets: Sequence[tuple[Disk, str]], job: Job) -> dict[str, Plan]:
        directory = self._directory.path(guest.uuid)
        self.abandon(guest, DiskInfo(disks=[disk for disk, _ in targets]))
        place = directory / DIRECTORY
        group = self._settings.libvirt.disk_owner_group
        with files.disk_errors(place):
            place.mkdir(mode=0o700)
            # The hypervisor makes its socket in it, which gets the directory's group.
            files.give_to_group(place, group, 0o2770 if group else 0o700)
        token = PREFIX + secrets.token_hex(8)
        names = [target for _, target in targets]
        others = [device.target_dev or "" for device in _disks(guest) if device.target_dev not in names]
        for disk, target in targets:
            self._scratch(place / f"{target}.scratch", disk, job)
        backup = backup_xml.pull(place / _SOCKET, {name: place / f"{name}.scratch" for name in names}, others)
        checkpoint = backup_xml.checkpoint(token, names, others)
        guest.backup_begin(backup, checkpoint, reuse_external=True)
        plans = {}
        for disk, _ in targets:
            plans[disk.name] = self._plan(directory, disk, token, job)
            plan.write(directory, disk.name, plans[disk.name])
        return plans

    def _scratch(self, path: Path, disk: Disk, job: Job) -> None:
        """Where the hypervisor keeps what the guest overwrites. Made here, as the disks are: what libvirt would make
        is root's, and stays so where it does not manage owners."""
        group = self._settings.libvirt.disk_owner_group
        self._qemu_img.create(path, "qcow2", disk.virtual_size_bytes, job)
        with files.disk_errors(path):
            files.give_to_group(path, group, 0o660 if group else 0o600)

    def _plan(self, directory: Path, disk: Disk, token: str, job: Job) -> Plan:
        path = directory / disk.name
        seen = self._qemu_img.info(path, "qcow2", job, shared=True)
        data, blank = plan.from_layers(self._qemu_img.layers(path, "qcow2", job))
        cluster = seen.cluster_bytes
        for edge in {edge for extent in (*data, *blank) for edge in extent}:
            if edge % cluster and edge != seen.virtual_size_bytes:
                raise _GivenUp(f"{disk.name} is not kept in whole clusters of {cluster} bytes")
        window = max(self._options.window_mb << 20, cluster)
        return Plan(
            token=token, size=seen.virtual_size_bytes, cluster=cluster, window=window, data=data, blank=blank
        )

    def _send(
        self, uuid: str, migration: Migration, disk: Disk, target: str, one: Plan, peer: Peer, job: Job
    ) -> None:
        directory = self._directory.path(uuid)
        shipment = Shipment(uuid, migration, disk.name, directory / disk.name, disk.format)
        fd = os.open(directory / DIRECTORY, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = layer.unix_address(fd, _SOCKET)

            def reader() -> PlannedReader:
                return PlannedReader(Connection(address, target), one.data, one.blank)

            self._push(shipment, disk, one, one.planned, reader, peer, job, f"{PHASE}_{disk.name}", journal=True)
        finally:
            os.close(fd)
        peer({"ask": "stop", "name": disk.name})

    # --- when it is off -----------------------------------------------------------------------------------------

    def send_rest(self, shipment: Shipment, disk: Disk, peer: Peer, job: Job) -> tuple[bool, str]:
        """Send what :meth:`run` has not, of a disk that nobody writes to any more; then it has its name at the
        destination. Returns whether it is there, and if not why: then nothing of it is, its bitmap is gone from
        ``shipment.source``, and a transport has to send it.

        Called again it sends again what is missing; when it had ended it does nothing. ``shipment.source`` is only
        read, unless the answer is no.

        :raises Cancelled:
        :raises DiskFull: no room at the destination.
        :raises MigrationFailed: the destination is not who it should be, or its connections break.
        :raises PeerUnavailable: the destination does not answer.
        """
        one = plan.read(shipment.source.parent, shipment.name)
        try:
            if one is None:
                raise _GivenUp("nothing was sent while the guest ran")
            self._rest(shipment, disk, one, peer, job)
        except (_GivenUp, SourceFailed, errors.CommandFailed) as exc:
            peer({"ask": "remove", "name": shipment.name})
            self._clean(shipment.source, disk)
            job.explain(f"{shipment.name} is sent as a whole: {exc}")
            return False, str(exc)
        return True, f"only what was written since {one.token} had to be sent"

    def _rest(self, shipment: Shipment, disk: Disk, one: Plan, peer: Peer, job: Job) -> None:
        host = address_of(shipment.migration, peer)
        opened = self._open(shipment, disk, one, peer)
        if opened["complete"]:
            return
        if not set(one.windows(one.planned)) <= windows.numbers(opened["windows"]):
            raise _GivenUp("what was sent while the guest ran is not all there")
        place = shipment.source.parent / DIRECTORY
        with FrozenLayer(shipment.source, place, one.token, self._options.idle_timeout) as frozen:
            size, held, blank, dirty = frozen.look()
            if size != one.size:
                raise _GivenUp(f"it had {one.size} bytes and has {size}")
            freed = list(extents.subtract(one.planned, held))
            if freed and disk.backing:
                raise _GivenUp(f"it no longer holds bytes {freed[0][0]} to {freed[0][1]}, which were sent")
            missing = _both(held, dirty) + list(extents.subtract(held, one.planned)) + freed
            rest = _aligned(missing, one)
            data, zeros = list(extents.subtract(rest, blank)), _both(rest, blank)

            def reader() -> PlannedReader:
                return PlannedReader(frozen.connection(), data, zeros)

            self._push(shipment, disk, one, rest, reader, peer, job, shipment.phase, journal=False)
            self._compare(shipment, disk, one, host, held, frozen, peer, job)
        peer({"ask": "stop", "name": shipment.name})
        peer({"ask": "finish", "name": shipment.name, "size": None})

    def _compare(
        self,
        shipment: Shipment,
        disk: Disk,
        one: Plan,
        host: str,
        held: list[Extent],
        frozen: FrozenLayer,
        peer: Peer,
        job: Job,
    ) -> None:
        """What the copy holds is what the original holds; with ``transfer.compare = full`` also byte by byte.

        :raises _GivenUp: it is not.
        """
        attempts, ended = Attempts(shipment, job), False
        while not ended:
            # One that is about to end with its last client is not asked any more.
            peer({"ask": "stop", "name": shipment.name})
            opened = self._open(shipment, disk, one, peer)
            with attempts.one(0) as attempt:
                there = self._connect(shipment, host, opened, (layer.DEPTH, layer.ALLOCATION))
                self._compare_with(there, shipment, disk, held, frozen, job)
            ended = attempt.ended

    def _compare_with(
        self, there: Connection, shipment: Shipment, disk: Disk, held: list[Extent], frozen: FrozenLayer, job: Job
    ) -> None:
        there.open()
        try:
            theirs = layer.allocated(there)
            differing = [*extents.subtract(held, theirs), *(extents.subtract(theirs, held) if disk.backing else ())]
            if differing:
                raise _GivenUp(f"bytes {differing[0][0]} to {differing[0][1]} are on one side alone")
            if self._options.compare == "full":
                here = frozen.connection()
                here.open()
                try:
                    _same_bytes(here, there, held, f"compare_{shipment.name}", job)
                finally:
                    here.close()
        finally:
            there.close()

    # --- both ---------------------------------------------------------------------------------------------------

    def _open(self, shipment: Shipment, disk: Disk, one: Plan, peer: Peer) -> Mapping[str, Any]:
        return peer(
            {
                "ask": "overlay",
                "name": shipment.name,
                "size": one.size,
                "window": one.window,
                "token": one.token,
                "cluster": one.cluster,
                "backing": disk.backing,
                "backing_format": disk.backing_format,
            }
        )

    def _connect(
        self, shipment: Shipment, host: str, opened: Mapping[str, Any], contexts: tuple[str, ...] = ()
    ) -> Connection:
        security = security_of(self._options, shipment.migration, opened)
        return Connection((host, int(opened["port"])), opened["export"], security, contexts)

    def _push(
        self,
        shipment: Shipment,
        disk: Disk,
        one: Plan,
        wanted: list[Extent],
        reader: Callable[[], PlannedReader],
        peer: Peer,
        job: Job,
        phase: str,
        *,
        journal: bool,
    ) -> None:
        """Send ``wanted``; with a ``journal`` its windows are recorded, and not sent again when they are."""
        host, total = address_of(shipment.migration, peer), extents.length(wanted)
        attempts = Attempts(shipment, job)
        ended = False
        while not ended:
            opened = self._open(shipment, disk, one, peer)
            arrived = windows.numbers(opened["windows"]) if journal else set()
            todo = [number for number in one.windows(wanted) if number not in arrived]
            sending = sum(extents.length(_window(wanted, one, number)) for number in todo)
            before = total - sending
            with attempts.one(len(arrived)) as attempt:
                push = Push(
                    todo,
                    window=one.window,
                    size=one.size,
                    streams=self._options.streams,
                    pace=Pace(self._options.bandwidth_mb << 20),
                    connect=functools.partial(self._connect, shipment, host, opened),
                    reader=reader,
                )
                push.run(
                    job,
                    _recorder(shipment, peer, job, journal),
                    functools.partial(self._report, shipment, job, phase, before, total),
                )
            ended = attempt.ended

    def _report(self, shipment: Shipment, job: Job, phase: str, before: int, total: int, sent: int) -> None:
        job.report(phase, min(total, before + sent), total)
        if phase.startswith(PHASE):
            room = os.statvfs(shipment.source.parent)
            if room.f_bavail * room.f_frsize < _KEEP_FREE:
                raise _GivenUp(f"less than {_KEEP_FREE >> 20} MiB are left for what the guest overwrites meanwhile")

    # --- the end ------------------------------------------------------------------------------------------------

    def abandon(self, guest: Guest, info: DiskInfo) -> None:
        """No backup, checkpoint, bitmap or file of a precopy is left here, in use or set aside; what the destination
        has is not ours to say. Ends well when there is nothing, and when the guest is not there.

        :raises HypervisorUnavailable: libvirt does not answer: ask again.
        """
        on = False
        with suppress(errors.InstanceNotFound):
            on = guest.power_state() in _ON
            place = str(self._directory.path(guest.uuid) / DIRECTORY)
            running = guest.backup_xml() if on else None
            if running is not None and place in running:
                guest.abort_job()
                # libvirt ends it behind our back; until then the guest takes no other job.
                NullJob().wait(lambda: guest.backup_xml() is None, _END_SECONDS)
            for name in guest.checkpoints():
                if name.startswith(PREFIX):
                    guest.delete_checkpoint(name, metadata_only=not on)
        for suffix in ("", RESIZE):
            directory = self._directory.path(guest.uuid, suffix)
            for disk in info.disks:
                if not (on and suffix == ""):
                    self._clean(directory / disk.name, disk)
            with files.disk_errors(directory):
                if (directory / DIRECTORY).is_dir():
                    files.remove_tree(directory / DIRECTORY)

    def _clean(self, path: Path, disk: Disk) -> None:
        """The file has no bitmap of ours. Nobody has it open."""
        if disk.format != "qcow2" or not path.is_file():
            return
        self._qemu_img.remove_bitmaps(path, PREFIX, NullJob())


def _disks(guest: Guest) -> Sequence[Device]:
    devices = guest.domain().devices
    return devices.disks if devices is not None else ()


def _window(wanted: list[Extent], one: Plan, number: int) -> Iterator[Extent]:
    return layer.within(wanted, number * one.window, (number + 1) * one.window)


def _both(some: Sequence[Extent], others: Sequence[Extent]) -> list[Extent]:
    """What is in both."""
    return list(extents.subtract(some, extents.subtract(some, others)))


def _aligned(some: list[Extent], one: Plan) -> list[Extent]:
    """Whole clusters: the destination's overlay is written without its base, so that the rest of a cluster which is
    only partly written would be zeros."""
    size, cluster = one.size, one.cluster
    return list(
        extents.merge(sorted((b // cluster * cluster, min(size, -(-e // cluster) * cluster)) for b, e in some))
    )


def _recorder(shipment: Shipment, peer: Peer, job: Job, journal: bool) -> Callable[[list[int]], None]:
    unrecorded: list[int] = []

    def record(done: list[int]) -> None:
        unrecorded.extend(done if journal else ())
        try:
            peer({"ask": "windows", "name": shipment.name, "done": windows.runs_of(unrecorded)})
            unrecorded.clear()
        except errors.PeerUnavailable:
            job.check()

    return record


def _same_bytes(here: Connection, there: Connection, held: list[Extent], phase: str, job: Job) -> None:
    one, other = bytearray(1 << 20), bytearray(1 << 20)
    total, done = extents.length(held), 0
    for begin, end in held:
        for at in range(begin, end, len(one)):
            job.check()
            count = min(len(one), end - at)
            here.read_into(memoryview(one)[:count], at)
            there.read_into(memoryview(other)[:count], at)
            if one[:count] != other[:count]:
                raise _GivenUp(f"bytes {at} to {at + count} are not the same on both sides")
            done += count
            job.report(phase, done, total)
