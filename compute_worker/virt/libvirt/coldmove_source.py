"""Cold moves, the source's side: ask the destination, shut down, set aside, send; drop the copy, or bring it back.

Whatever can refuse is asked while the guest still runs, and what its disks hold then is sent then. From the rename to
``<uuid>_resize`` on the source's files are only read, until the move is confirmed or the same rename backwards undoes
it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from compute_worker import errors, objects
from compute_worker.images import files
from compute_worker.objects import Disk, DiskInfo, Instance, Migration
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job, Part, Peer
from compute_worker.virt.libvirt.coldmove_verdict import forget_precopy, is_copy
from compute_worker.virt.libvirt.deeds import OFF, Deeds
from compute_worker.virt.libvirt.disks.bases import PREFIX, MovingBases, Standing
from compute_worker.virt.libvirt.disks.builder import ROOT
from compute_worker.virt.libvirt.disks.grow import Grower
from compute_worker.virt.libvirt.disks.instance_dir import RESIZE
from compute_worker.virt.libvirt.power import Power
from compute_worker.virt.libvirt.spawn import make_part
from compute_worker.virt.libvirt.transfer import base as transports
from compute_worker.virt.libvirt.transfer import plan, verify
from compute_worker.virt.libvirt.transfer.base import SHARED, DiskTransport, Shipment
from compute_worker.virt.libvirt.transfer.precopy import Precopy


class ColdMoveSource:
    """Moves that begin here. Thread-safe for different instances."""

    def __init__(self, deeds: Deeds, power: Power, warm: Precopy) -> None:
        self._deeds = deeds
        self._power = power
        self._directory = deeds.disks.directory
        self._bases = MovingBases(deeds.disks)
        self._grower = Grower(deeds.disks)
        self._warm = warm
        self._chosen: dict[tuple[str, int], DiskTransport] = {}

    # --- migrate_disk_and_power_off -----------------------------------------------------------------------------

    def parts(
        self, instance: Instance, migration: Migration, timeout: float, retry_interval: float, peer: Peer
    ) -> list[Part]:
        """``precopy, power_off, set_aside, send_<disk>..., verify_copy``."""

        def send(name: str) -> Part:
            return make_part(f"send_{name}", lambda job: self._send(instance, migration, name, peer, job))

        return [
            make_part(
                "precopy",
                lambda job: self._precopy(instance, migration, peer, job),
                lambda job: self._withdraw(instance, migration, peer, job),
            ),
            make_part(
                "power_off",
                lambda job: self._power.off(instance, job, timeout, retry_interval),
                lambda job: forget_precopy(self._deeds, self._warm, instance.uuid),
            ),
            make_part(
                "set_aside",
                lambda job: self._put_aside(instance, migration, job),
                lambda job: self._take_back(instance, migration, job),
            ),
            *(send(name) for name in self._disk_names(instance.uuid, migration)),
            make_part("verify_copy", lambda job: self._verify(instance, migration, peer, job)),
        ]

    def _disk_names(self, uuid: str, migration: Migration) -> list[str]:
        """The same ones whether they are set aside or not."""
        info = self._directory.read_disk_info(uuid, self._where(uuid, migration))
        return [disk.name for disk in info.disks] if info is not None else [ROOT]

    def _where(self, uuid: str, migration: Migration) -> str:
        """The suffix that the source's own directory has now."""
        own = self._directory.path(uuid).is_dir() and not is_copy(self._directory, uuid, migration)
        return "" if own or not self._directory.path(uuid, RESIZE).is_dir() else RESIZE

    def _precopy(self, instance: Instance, migration: Migration, peer: Peer, job: Job) -> Mapping[str, Any] | None:
        """The destination is ready, and has what the disks of a running guest hold, where that can be sent."""
        self._prepare(instance, migration, peer, job)
        info = self._deeds.disks.disk_info(instance.uuid)
        if info is None:
            return None
        return self._warm.run(self._deeds.guest(instance.uuid), migration, info, peer, job)

    def _prepare(self, instance: Instance, migration: Migration, peer: Peer, job: Job) -> None:
        """Whether it can work at all, asked while the guest runs; bases that the destination lacks are sent.

        :raises InvalidState: the guest is suspended to disk: its memory would be lost.
        :raises FlavorDiskTooSmall: a disk would have to shrink.
        :raises DestinationDiskExists: another move left a copy set aside here, or the instance has one there.
        """
        uuid = instance.uuid
        suffix = self._where(uuid, migration)
        info = self._deeds.disks.disk_info(uuid, suffix) or self._deeds.need_disk_info(uuid)
        aside = self._directory.path(uuid, RESIZE)
        if not suffix and aside.is_dir():
            raise errors.DestinationDiskExists(instance=uuid, path=str(aside))
        if self._deeds.power(uuid) is PowerState.SUSPENDED:
            raise errors.InvalidState(
                instance=uuid, command="move", attribute="power_state", state=str(PowerState.SUSPENDED)
            )
        if migration.new_flavor is not None:
            self._grower.check(instance, info, migration.new_flavor)
        if _is_local(migration):
            return
        transport = self._transport(migration, peer, job)
        shared = transport.name == SHARED
        standing = [] if shared else self._bases.standing(info, job)
        wanted = self._ask_prepare(instance, info, standing, peer, shared)
        unknown = {PREFIX + one.name for one in standing if not one.digest} & wanted.keys()
        if unknown:
            standing = [self._bases.with_digest(one, job) if PREFIX + one.name in unknown else one for one in standing]
            wanted = self._ask_prepare(instance, info, standing, peer, shared)
        offered = self._bases.offered(standing, self._directory.path(uuid, suffix))
        for name, why in wanted.items():
            if name not in offered:
                reason = f"host {migration.dest_host} wants {name[:64]!r}, which is none of the instance's files"
                raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
            job.explain(f"{name} goes to {migration.dest_host} too: {why}")
            transport.send(Shipment(uuid, migration, name, offered[name]), peer, job)

    def _ask_prepare(
        self, instance: Instance, info: DiskInfo, standing: list[Standing], peer: Peer, shared: bool
    ) -> dict[str, str]:
        answer = peer(
            {
                "ask": "prepare",
                "disk_info": objects.encode(info),
                "bases": objects.encode(standing),
                "machine": self._deeds.machine(instance.uuid),
                "shared": shared,
            }
        )
        return objects.decode(answer.get("wanted"), dict[str, str], "answer to prepare")

    def _transport(self, migration: Migration, peer: Peer, job: Job) -> DiskTransport:
        """How its disks travel: chosen once, while the guest runs, unless this process began in the middle."""
        settings, key = self._deeds.settings, (migration.uuid, migration.attempt)
        if _is_local(migration):
            return transports.load(SHARED, settings)
        chosen = self._chosen.get(key) or transports.choose(settings, migration, peer, job)
        self._chosen[key] = chosen
        return chosen

    def _withdraw(self, instance: Instance, migration: Migration, peer: Peer, job: Job) -> None:
        """What the destination has of it goes. A destination that does not answer cleans up by itself."""
        forget_precopy(self._deeds, self._warm, instance.uuid)
        self._chosen.pop((migration.uuid, migration.attempt), None)
        if _is_local(migration):
            return
        try:
            peer({"ask": "remove"})
        except errors.ComputeError as exc:
            job.explain(f"{migration.dest_host} could not be asked to drop its copy ({exc}): it does so by itself")

    def _put_aside(self, instance: Instance, migration: Migration, job: Job) -> None:
        uuid = instance.uuid
        here, aside = self._directory.path(uuid), self._directory.path(uuid, RESIZE)
        if aside.is_dir() and (not here.is_dir() or is_copy(self._directory, uuid, migration)):
            return
        if self._deeds.power(uuid) not in OFF:
            raise errors.InvalidState(instance=uuid, command="set aside", attribute="power_state", state="running")
        for disk in self._deeds.need_disk_info(uuid).disks:
            # What is read and sent from now on must still be there after a power failure: a copy is gone on with.
            with files.disk_errors(here / disk.name):
                files.fsync(here / disk.name)
        self._deeds.undefine(uuid)
        self._directory.write_record(msgspec.structs.replace(instance, migration=migration.uuid))
        self._directory.move(uuid, "", RESIZE)

    def _take_back(self, instance: Instance, migration: Migration, job: Job) -> None:
        uuid = instance.uuid
        here, aside = self._directory.path(uuid), self._directory.path(uuid, RESIZE)
        if aside.is_dir():
            if is_copy(self._directory, uuid, migration):
                self._directory.remove(uuid)
            with suppress(OSError):
                # A copy that did not get as far as its mark.
                os.rmdir(here)
            self._directory.move(uuid, RESIZE, "")
        forget_precopy(self._deeds, self._warm, uuid)
        if self._directory.read_disk_info(uuid) is not None:
            try:
                self._deeds.define(instance, job)
            except errors.Broken as exc:
                job.explain(f"its files are back; it is defined when it is started, as libvirt refused it now: {exc}")

    def _send(self, instance: Instance, migration: Migration, name: str, peer: Peer, job: Job) -> None:
        info = self._need_aside(instance.uuid)
        self._ask_sending(instance.uuid, info, peer)
        disk = next(disk for disk in info.disks if disk.name == name)
        shipment = self._shipment(instance, migration, disk)
        if self._was_sent(instance.uuid, name) and self._sent_rest(shipment, disk, peer, job):
            return
        self._transport(migration, peer, job).send(shipment, peer, job)

    def _ask_sending(self, uuid: str, info: DiskInfo, peer: Peer) -> set[str]:
        """Disks that the destination has by what they held while the guest ran and what was written since."""
        whole = [disk.name for disk in info.disks if not self._was_sent(uuid, disk.name)]
        answer = peer({"ask": "sending", "disks": whole, "sending": self._state(uuid)})
        return set(objects.decode(answer.get("overlays"), list[str], "answer to sending"))

    def _shipment(self, instance: Instance, migration: Migration, disk: Disk) -> Shipment:
        source = self._directory.path(instance.uuid, RESIZE) / disk.name
        return Shipment(instance.uuid, migration, disk.name, source, disk.format)

    def _was_sent(self, uuid: str, name: str) -> bool:
        """Whether what the disk held while the guest ran has been sent."""
        return plan.read(self._directory.path(uuid, RESIZE), name) is not None

    def _sent_rest(self, shipment: Shipment, disk: Disk, peer: Peer, job: Job) -> bool:
        """Whether the destination has the disk by what was written since."""
        done, why = self._warm.send_rest(shipment, disk, peer, job)
        job.explain(f"{disk.name}: {why}")
        if not done:
            with files.disk_errors(shipment.source):
                plan.path_of(shipment.source.parent, disk.name).unlink(missing_ok=True)
        return done

    def _need_aside(self, uuid: str) -> DiskInfo:
        info = self._deeds.disks.disk_info(uuid, RESIZE)
        if info is None:
            raise errors.GuestFailed(instance=uuid, reason=f"{self._directory.path(uuid, RESIZE)} is missing")
        return info

    def _state(self, uuid: str) -> str:
        """Another one whenever the disks were set aside anew: a guest that was taken back has written to them, and
        nothing of before may be built upon."""
        record = self._directory.path(uuid, RESIZE) / "instance.json"
        with files.disk_errors(record):
            written = record.stat()
        return hashlib.sha256(f"{written.st_ino} {written.st_mtime_ns}".encode()).hexdigest()

    def _verify(self, instance: Instance, migration: Migration, peer: Peer, job: Job) -> Mapping[str, Any]:
        """Once more all of them together; a full comparison was made, where it is wanted, when each had arrived."""
        info = self._need_aside(instance.uuid)
        overlays = self._ask_sending(instance.uuid, info, peer)
        for disk in info.disks:
            if disk.name not in overlays:
                verify.compare(self._shipment(instance, migration, disk), peer, job, full=False)
        place = self._directory.path(instance.uuid, RESIZE) / plan.DIRECTORY
        with files.disk_errors(place):
            if place.is_dir():
                shutil.rmtree(place)
        shared = self._transport(migration, peer, job).name == SHARED
        self._chosen.pop((migration.uuid, migration.attempt), None)
        return {"disk_info": objects.encode(msgspec.structs.replace(info, shared=shared))}


def _is_local(migration: Migration) -> bool:
    return migration.source_host == migration.dest_host
