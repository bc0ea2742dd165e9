"""Cold moves, the destination's side: make room, let the disks in, make them the instance's, and step back in a revert.

What comes by a migration is marked by ``migration.json`` in the instance's directory: only what carries the mark of the
migration at hand is ever removed or set aside here, since on one host, or on storage that both hosts see, the
directory of that name may be the source's own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from compute_worker import errors, objects
from compute_worker.images import files
from compute_worker.objects import Disk, DiskInfo, ImageId, Instance, Migration
from compute_worker.states import ran_before
from compute_worker.virt.driver import Job, NullJob, Part
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.bases import MovingBases, Standing
from compute_worker.virt.libvirt.disks.grow import Grower
from compute_worker.virt.libvirt.disks.instance_dir import DELETED, RESIZE, Arrival, ImageUse
from compute_worker.virt.libvirt.spawn import make_part
from compute_worker.virt.libvirt.transfer.receiver import Receiver


class Prepare(msgspec.Struct, frozen=True, kw_only=True):
    """Before the guest is shut down: would its disks find room and bases here, and what must be sent beside them?"""

    disk_info: DiskInfo
    bases: Annotated[list[Standing], Meta(max_length=32)] = []
    machine: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}\Z")] = ""
    shared: bool = False
    """Whether the source found that both hosts see one instances directory: then it makes the room itself."""


class Sending(msgspec.Struct, frozen=True, kw_only=True):
    """The disks come now, in the state ``sending``: what came of another state is dropped."""

    disks: Annotated[list[ImageId], Meta(max_length=32)]
    sending: Annotated[str, Meta(pattern=r"^[0-9a-f]{16,64}\Z")]


class ColdMoveDestination:
    """Moves that end here. Thread-safe."""

    def __init__(self, deeds: Deeds, receiver: Receiver) -> None:
        self._deeds = deeds
        self._directory = deeds.disks.directory
        self._receiver = receiver
        self._bases = MovingBases(deeds.disks)
        self._grower = Grower(deeds.disks)
        self._marking = threading.Lock()

    # --- what the source asks -----------------------------------------------------------------------------------

    def answer(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer the source: ``prepare`` and ``sending`` are asked by its driver, everything else by its transports.

        :raises InvalidCommand: nothing that this driver knows.
        :raises DestinationDiskExists: the instance has a directory or a guest here that is not this migration's.
        :raises DiskFull: no room for the disks.
        """
        ask = request.get("ask")
        if ask == "prepare":
            return self._prepare(instance, migration, objects.decode(dict(request), Prepare, "answer_peer prepare"))
        if ask == "sending":
            return self._sending(instance, migration, objects.decode(dict(request), Sending, "answer_peer sending"))
        arrival = self._directory.arrival(instance.uuid, migration.uuid)
        if arrival is not None and arrival.attempt > migration.attempt:
            if ask == "remove":
                return {}
            raise _over(migration, arrival)
        if ask in ("overlay", "finish", "remove"):
            self._note(instance, migration, request)
        return self._receiver.answer(instance, migration, request)

    def _note(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> None:
        """Keep in mind which disks are overlays that are filled here. One that is whole, of another point in time than
        the one that is sent now, is stale: the guest has run since."""
        name, token = request.get("name"), request.get("token") if request["ask"] == "overlay" else None
        if not isinstance(name, str) or (request["ask"] == "finish" and request.get("size", 0) is None):
            return
        with self._marking:
            arrival = self._directory.arrival(instance.uuid, migration.uuid)
            if arrival is None or arrival.overlays.get(name) == token:
                return
            overlays = {other: point for other, point in arrival.overlays.items() if other != name}
            if isinstance(token, str):
                overlays[name] = token
                if (self._directory.path(instance.uuid) / name).exists():
                    self._receiver.answer(instance, migration, {"ask": "remove", "name": name})
            self._directory.write_arrival(instance.uuid, msgspec.structs.replace(arrival, overlays=overlays))

    def _prepare(self, instance: Instance, migration: Migration, asked: Prepare) -> Mapping[str, Any]:
        self._no_other_guest(instance, migration)
        if migration.new_flavor is not None:
            self._grower.check(instance, asked.disk_info, migration.new_flavor)
        if asked.shared:
            return {"wanted": {}}
        here = self._directory.measured(instance.uuid, asked.disk_info)
        self._need_room(sum(disk.allocated_bytes for disk in asked.disk_info.disks)
                        - sum(disk.allocated_bytes for disk in here.disks))  # fmt: skip
        with self._marking:
            arrival = self._mark(instance, migration)
            bases = {base.name: base.digest for base in asked.bases if base.digest}
            self._directory.write_use(instance.uuid, ImageUse(bases=self._bases.names(asked.bases)))
            changed = msgspec.structs.replace(arrival, machine=asked.machine or arrival.machine, bases=bases)
            self._directory.write_arrival(instance.uuid, changed)
        moving = msgspec.structs.replace(instance, migration=migration.uuid)
        return {"wanted": self._bases.wanted(moving, asked.disk_info, asked.bases, NullJob())}

    def _sending(self, instance: Instance, migration: Migration, asked: Sending) -> Mapping[str, Any]:
        with self._marking:
            arrival = self._mark(instance, migration)
            if arrival.sending != asked.sending:
                for name in asked.disks:
                    self._receiver.answer(instance, migration, {"ask": "remove", "name": name})
                # The directory goes with its last disk.
                kept = {name: point for name, point in arrival.overlays.items() if name not in asked.disks}
                arrival = msgspec.structs.replace(
                    self._mark(instance, migration), sending=asked.sending, overlays=kept
                )
                self._directory.write_arrival(instance.uuid, arrival)
        path = self._directory.path(instance.uuid)
        return {"overlays": [name for name in arrival.overlays if (path / name).exists()]}

    def _mark(self, instance: Instance, migration: Migration) -> Arrival:
        """The directory is there and is this attempt's; an earlier attempt's is made anew."""
        uuid = instance.uuid
        arrival = self._directory.arrival(uuid, migration.uuid)
        if arrival is not None and arrival.attempt > migration.attempt:
            raise _over(migration, arrival)
        if arrival is not None and arrival.attempt < migration.attempt:
            self._receiver.answer(instance, migration, {"ask": "remove"})
            arrival = None
        self._directory.forget_use(uuid)
        self._receiver.answer(instance, migration, {"ask": "begin"})
        if arrival is None:
            arrival = Arrival(migration.uuid, migration.attempt)
            self._directory.write_arrival(uuid, arrival)
        return arrival

    def _no_other_guest(self, instance: Instance, migration: Migration) -> None:
        guest = self._deeds.guest(instance.uuid)
        try:
            found = guest.metadata()
        except errors.InstanceNotFound:
            return
        if found is None or found.migration != migration.uuid:
            where = f"a guest of that uuid in libvirt on host {self._deeds.host.name}"
            raise errors.DestinationDiskExists(instance=instance.uuid, path=where)

    def _need_room(self, needed: int) -> None:
        with files.disk_errors(self._directory.root):
            found = os.statvfs(self._directory.root)
        if needed > found.f_bavail * found.f_frsize:
            raise errors.DiskFull(path=str(self._directory.root))

    # --- finish_migration ---------------------------------------------------------------------------------------

    def parts(self, instance: Instance, migration: Migration, disk_info: DiskInfo) -> list[Part]:
        """``verify_disks, fetch_images, grow_disks, plug_vifs, define, start_paused``."""
        deeds, uuid = self._deeds, instance.uuid

        def start(job: Job) -> None:
            if ran_before(instance.vm_state, instance.power_state):
                deeds.start_paused(uuid, job)

        return [
            make_part(
                "verify_disks",
                lambda job: self._verify(instance, migration, disk_info, job),
                lambda job: self._remove_ours(instance, migration),
            ),
            make_part(
                "fetch_images",
                lambda job: self._fetch(instance, migration, job),
                lambda job: deeds.disks.discard_partials(instance),
            ),
            make_part("grow_disks", lambda job: self._grow(instance, job)),
            make_part("plug_vifs", lambda job: deeds.plug_vifs(instance, job)),
            make_part("define", lambda job: deeds.define(instance, job), lambda job: deeds.undefine(uuid)),
            make_part("start_paused", start, lambda job: deeds.kill(uuid)),
        ]

    def _verify(self, instance: Instance, migration: Migration, told: DiskInfo, job: Job) -> None:
        """Every disk of ``told`` is whole here and is what ``told`` says; then ``disk.info`` and the record say so,
        and nobody may send any more."""
        uuid = instance.uuid
        if self._directory.arrival(uuid, migration.uuid) is None:
            reason = f"{self._directory.path(uuid)} did not come by it"
            raise errors.MigrationFailed(migration=migration.uuid, reason=reason)
        if not told.disks:
            raise errors.MigrationFailed(migration=migration.uuid, reason="it brings no disk")
        info = self._directory.read_disk_info(uuid) or told
        for disk in {disk.name: disk for disk in (*told.disks, *info.disks)}.values():
            problem = self._problem(uuid, disk, job)
            if problem:
                raise errors.MigrationFailed(migration=migration.uuid, reason=f"{disk.name} {problem}")
            self._deeds.disks.own(self._directory.path(uuid) / disk.name)
        self._grower.check(instance, info)
        own = msgspec.structs.replace(info, shared=False)
        self._directory.write_disk_info(uuid, self._directory.measured(uuid, own))
        self._directory.write_record(instance)
        self._receiver.settle(instance)

    def _problem(self, uuid: str, disk: Disk, job: Job) -> str:
        """What is wrong with a disk that came; empty: nothing."""
        directory = self._directory.path(uuid)
        path = directory / disk.name
        if path.is_symlink() or not path.is_file():
            return f"did not arrive ({path} is missing)"
        size = path.stat().st_size
        if disk.format == "raw":
            return "" if size == disk.virtual_size_bytes else f"has {size} bytes instead of {disk.virtual_size_bytes}"
        try:
            found = self._deeds.disks.qemu_img.info(path, disk.format, job)
        except errors.CommandFailed as exc:
            return f"is no {disk.format}: {exc.message}"
        backing = os.path.relpath(self._directory.base / disk.backing, directory) if disk.backing else None
        if found.virtual_size_bytes != disk.virtual_size_bytes:
            return f"has {found.virtual_size_bytes} bytes instead of {disk.virtual_size_bytes}"
        if found.backing != backing or found.details.get("data-file") or found.encrypted:
            return f"stands on {found.backing} instead of {backing}"
        return ""

    def _remove_ours(self, instance: Instance, migration: Migration) -> None:
        self._receiver.answer(instance, migration, {"ask": "remove"})
        if self._directory.arrival(instance.uuid, migration.uuid) is not None:
            self._directory.remove(instance.uuid)

    def _fetch(self, instance: Instance, migration: Migration, job: Job) -> None:
        """Also asked before any disk has come, so that images are here before the guest is shut down."""
        arrival = self._directory.arrival(instance.uuid, migration.uuid)
        if arrival is None or self._directory.read_disk_info(instance.uuid) is None:
            self._deeds.disks.prefetch(instance, job)
        else:
            self._bases.settle(instance, arrival, job)

    def _grow(self, instance: Instance, job: Job) -> None:
        info = self._grower.grow(instance, job)
        self._directory.write_disk_info(instance.uuid, self._directory.measured(instance.uuid, info))

    # --- revert -------------------------------------------------------------------------------------------------

    def set_aside(self, instance: Instance, migration: Migration) -> list[Part]:
        """``set_aside``: what came by the migration is kept as ``_resize``, or as ``_del`` where that is the source's
        own copy."""
        return [
            make_part(
                "set_aside",
                lambda job: self._put_aside(instance, migration),
                lambda job: self._take_back(instance, migration, job),
            )
        ]

    def _put_aside(self, instance: Instance, migration: Migration) -> None:
        uuid = instance.uuid
        if self._directory.arrival(uuid, migration.uuid) is None:
            return
        self._deeds.undefine(uuid)
        if not os.path.lexists(self._directory.path(uuid, RESIZE)):
            self._directory.move(uuid, "", RESIZE)
        else:
            self._directory.remove(uuid, DELETED)
            self._directory.move(uuid, "", DELETED)

    def _take_back(self, instance: Instance, migration: Migration, job: Job) -> None:
        uuid = instance.uuid
        for suffix in (RESIZE, DELETED):
            if self._directory.arrival(uuid, migration.uuid, suffix) is not None:
                self._directory.move(uuid, suffix, "")
        if self._directory.arrival(uuid, migration.uuid) is not None:
            self._deeds.define(instance, job)


def _over(migration: Migration, arrival: Arrival) -> errors.MigrationFailed:
    reason = f"attempt {migration.attempt} is over, attempt {arrival.attempt} has begun"
    return errors.MigrationFailed(migration=migration.uuid, reason=reason)
