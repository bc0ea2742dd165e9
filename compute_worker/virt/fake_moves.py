"""Cold migration and resize on the fake driver: bytes go from one simulated host to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from compute_worker.errors import (
    DestinationDiskExists,
    FlavorDiskTooSmall,
    GuestFailed,
    InvalidCommand,
    InvalidState,
    MigrationFailed,
    PeerUnavailable,
)
from compute_worker.objects import DiskInfo, Instance, Migration, encode
from compute_worker.states import PowerState, ran_before
from compute_worker.virt.driver import Job, Part, Peer, SpawnRequest
from compute_worker.virt.fake_base import FakeBase, disk_info_of, encode_json
from compute_worker.virt.simulated.faults import BEFORE, PARTIAL
from compute_worker.virt.simulated.files import DELETED, PART, PLAIN, RECORD, RESIZE
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.model import Directory, File


class ColdMoves(FakeBase):
    """``migrate_disk_and_power_off`` to ``finish_revert_migration``."""

    def migrate_disk_and_power_off(
        self, instance: Instance, migration: Migration, timeout: float, retry_interval: float, peer: Peer
    ) -> list[Part]:
        """``power_off, set_aside, send_<disk>..., verify_copy``."""

        def power_off(job: Job) -> None:
            self.power_off(instance, job, timeout, retry_interval)

        return [
            Part("power_off", power_off, lambda j: None),
            Part("set_aside", lambda j: self._put_aside(instance), lambda j: self._take_back(instance)),
            *(self._send_part(instance, migration, name) for name in self._disk_names(instance)),
            Part("verify_copy", lambda j: self._verify_copy(instance, migration), lambda j: None),
        ]

    def answer_peer(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Simulated hosts reach each other's files by themselves: there is nothing to ask.

        :raises InvalidCommand: always.
        """
        raise InvalidCommand(method="answer_peer", problem="the fake driver asks nothing of its peers")

    def finish_migration(self, instance: Instance, migration: Migration, disk_info: DiskInfo) -> list[Part]:
        """``verify_disks, fetch_images, grow_disks, plug_vifs, define, start_paused``."""
        uuid = instance.uuid

        def start(job: Job) -> None:
            if ran_before(instance.vm_state, instance.power_state):
                self.start_paused(instance)

        return [
            Part(
                "verify_disks",
                lambda j: self._verify_disks(instance, disk_info),
                lambda j: self._remove_ours(instance, migration),
            ),
            self.fetch_part(instance),
            Part("grow_disks", lambda j: self._grow(instance, j), lambda j: None),
            Part("plug_vifs", lambda j: self.plug_vifs(instance), lambda j: self.unplug_vifs(uuid)),
            Part("define", lambda j: self.define(instance), lambda j: self.undefine(uuid)),
            Part("start_paused", start, lambda j: self.kill(uuid)),
        ]

    def confirm_migration(self, instance: Instance, migration: Migration, job: Job) -> None:
        """``_resize`` goes, and what a same-host revert set aside."""
        self.delete_files(instance.uuid, (DELETED, RESIZE))

    def set_aside(self, instance: Instance, migration: Migration) -> list[Part]:
        """``set_aside``. On one host ``_resize`` is the source's copy already: then this one is kept as ``_del``."""
        uuid = instance.uuid
        suffix = DELETED if migration.source_host == migration.dest_host else RESIZE

        def do(job: Job) -> None:
            self.undefine(uuid)
            self.unplug_vifs(uuid)
            with self._connection.call("set_aside", uuid, job, files=True) as host:
                if host.directory(uuid, suffix) is None:
                    host.rename(uuid, "", suffix)

        def undo(job: Job) -> None:
            with self._connection.call("take_back", uuid, files=True) as host:
                if host.directory(uuid, suffix) is not None and host.directory(uuid) is None:
                    host.rename(uuid, suffix, "")
            if self.simulated.directory(uuid) is not None:
                self.plug_vifs(instance)
                self.define(instance)

        return [Part("set_aside", do, undo)]

    def finish_revert_migration(self, instance: Instance, migration: Migration) -> list[Part]:
        """``restore_files, plug_vifs, define, start_paused``."""
        uuid = instance.uuid

        def start(job: Job) -> None:
            if ran_before(instance.vm_state, instance.power_state):
                self.start_paused(instance)

        return [
            Part("restore_files", lambda j: self._restore(instance), lambda j: self._unrestore(instance)),
            Part("plug_vifs", lambda j: self.plug_vifs(instance), lambda j: self.unplug_vifs(uuid)),
            Part("define", lambda j: self.define(instance), lambda j: self.undefine(uuid)),
            Part("start_paused", start, lambda j: self.kill(uuid)),
        ]

    # --- source -------------------------------------------------------------------------------------------------

    def _put_aside(self, instance: Instance) -> None:
        uuid = instance.uuid
        if self.simulated.directory(uuid, RESIZE) is not None:
            return
        with self._connection.call("get_info", uuid) as host:
            if host.power_of(uuid) in (PowerState.RUNNING, PowerState.PAUSED):
                raise InvalidState(instance=uuid, command="set aside", attribute="power_state", state="running")
        self.unplug_vifs(uuid)
        self.undefine(uuid)
        with self._connection.call("set_aside", uuid, files=True) as host:
            if not host.rename(uuid, "", RESIZE):
                raise GuestFailed(instance=uuid, reason=f"it has no directory {host.path(uuid)}")

    def _take_back(self, instance: Instance) -> None:
        with self._connection.call("take_back", instance.uuid, files=True) as host:
            if host.directory(instance.uuid, RESIZE) is not None:
                host.rename(instance.uuid, RESIZE, "")
        if self.simulated.directory(instance.uuid) is not None:
            self.plug_vifs(instance)
            self.define(instance)

    def _aside(self, host: SimulatedHost, uuid: str) -> Directory:
        directory = host.directory(uuid, RESIZE)
        if directory is None:
            raise GuestFailed(instance=uuid, reason=f"{host.path(uuid, RESIZE)} is missing")
        return directory

    def _disk_names(self, instance: Instance) -> list[str]:
        """Disks to send: as the directory has them, set aside or not; always the same ones of one instance."""
        host = self.simulated
        with host.cell.lock:
            files = host.directory(instance.uuid, RESIZE) or host.directory(instance.uuid) or {}
            return [disk.name for disk in disk_info_of(files, instance.image.id).disks] or ["disk"]

    def _send_part(self, instance: Instance, migration: Migration, name: str) -> Part:
        return Part(
            f"send_{name}",
            lambda job: self._send(instance, migration, name, job),
            lambda job: self._unsend(instance, migration, name, job),
        )

    def peer(self, name: str) -> SimulatedHost:
        """Another host of the cell.

        :raises PeerUnavailable: it is off, or not reachable, or there is none.
        """
        peer = self.simulated.cell.hosts.get(name)
        if peer is None or not peer.powered or not peer.reachable:
            raise PeerUnavailable(host=name)
        return peer

    def _send(self, instance: Instance, migration: Migration, name: str, job: Job) -> None:
        uuid = instance.uuid
        with self._connection.call("send_disk", uuid, job, files=True) as host:
            file = self._aside(host, uuid)[name]
            dest = self.peer(migration.dest_host)
            there = self._destination(dest, instance, migration)
            if name in there and there[name] == file:
                return
        for sent in self.stream(file.data, job, f"send_{name}"):
            self._receive(dest, uuid, job)
            with host.cell.lock:
                self._connection.check(files=True)
                self.peer(dest.name)
                dest.write(uuid, {name + PART: File(sent, file.format, file.size, file.backing)})
                host.faults.strike("send_disk", uuid, PARTIAL)
        with host.cell.lock:
            self._connection.check(files=True)
            dest.remove(uuid, name + PART)
            dest.write(uuid, {name: file.copy()})

    def _receive(self, dest: SimulatedHost, uuid: str, job: Job) -> None:
        stall = dest.faults.strike("receive", uuid, BEFORE)
        if stall is not None:
            self._connection.hang(stall, job, files=True)

    def _destination(self, dest: SimulatedHost, instance: Instance, migration: Migration) -> Directory:
        """The directory at the destination, made and marked as this migration's."""
        uuid = instance.uuid
        if dest.directory(uuid) is None:
            record = msgspec.structs.replace(instance, migration=migration.uuid)
            dest.write(uuid, {RECORD: File(encode_json(record))})
        elif not self._is_ours(dest, uuid, migration):
            raise DestinationDiskExists(instance=uuid, path=dest.path(uuid))
        return dest.slot(uuid).directories[""]

    def _is_ours(self, host: SimulatedHost, uuid: str, migration: Migration) -> bool:
        record = self.record_of(host, uuid)
        return record is None or record.migration == migration.uuid

    def _unsend(self, instance: Instance, migration: Migration, name: str, job: Job) -> None:
        """Best effort: a destination that does not answer cleans up by itself, and must not keep the guest off."""
        uuid = instance.uuid
        try:
            dest = self.peer(migration.dest_host)
        except PeerUnavailable as exc:
            job.explain(f"{exc}: it removes its own copy of {name}")
            return
        with self._connection.call("unsend_disk", uuid, files=True) as host:
            aside = host.directory(uuid, RESIZE) is not None
            if (dest is host and not aside) or dest.domain(uuid) is not None:
                return
            if dest.directory(uuid) is None or not self._is_ours(dest, uuid, migration):
                return
            dest.remove(uuid, name)
            dest.remove(uuid, name + PART)
            if not set(dest.slot(uuid).directories[""]) - PLAIN:
                dest.remove_directory(uuid)

    def _verify_copy(self, instance: Instance, migration: Migration) -> Mapping[str, Any]:
        uuid = instance.uuid
        with self._connection.call("verify_copy", uuid, files=True) as host:
            aside = self._aside(host, uuid)
            there = self.peer(migration.dest_host).directory(uuid) or {}
            info = disk_info_of(aside, instance.image.id)
            for disk in info.disks:
                if there.get(disk.name) != aside[disk.name]:
                    raise MigrationFailed(migration=migration.uuid, reason=f"{disk.name} did not arrive whole")
            return {"disk_info": encode(info)}

    # --- destination --------------------------------------------------------------------------------------------

    def _verify_disks(self, instance: Instance, disk_info: DiskInfo) -> None:
        uuid = instance.uuid
        with self._connection.call("verify_disks", uuid, files=True) as host:
            directory = host.directory(uuid) or {}
            for disk in disk_info.disks:
                file = directory.get(disk.name)
                if file is None or len(file.data) < disk.allocated_bytes or file.format != disk.format:
                    raise MigrationFailed(migration=instance.migration, reason=f"{disk.name} is missing or short")
            self.write_disks(host, instance, {})

    def _remove_ours(self, instance: Instance, migration: Migration) -> None:
        uuid = instance.uuid
        with self._connection.call("remove_copy", uuid, files=True) as host:
            if host.directory(uuid) is not None and self._is_ours(host, uuid, migration):
                host.remove_directory(uuid)
                host.effect(uuid, "delete")

    def _grow(self, instance: Instance, job: Job) -> None:
        """Disks become as large as the flavor says; disks that only the new flavor has are made."""
        uuid = instance.uuid
        with self._connection.call("grow_disks", uuid, job, files=True) as host:
            directory = host.slot(uuid).directories[""]
            wanted = self.layout(host, instance, SpawnRequest())
            for name, file in wanted.items():
                there = directory.get(name)
                if there is not None and there.size > file.size and name == "disk" and instance.flavor.root_gb:
                    needed = there.size
                    raise FlavorDiskTooSmall(image=instance.image.id, needed=needed, given=file.size, instance=uuid)
            for name, file in wanted.items():
                if name in directory and name != "disk.swap":
                    directory[name].size = max(directory[name].size, file.size)
                elif name != "disk.config":
                    directory[name] = file
            self.write_disks(host, instance, {})

    # --- revert -------------------------------------------------------------------------------------------------

    def _restore(self, instance: Instance) -> None:
        uuid = instance.uuid
        with self._connection.call("restore_files", uuid, files=True) as host:
            here, aside = host.directory(uuid), host.directory(uuid, RESIZE)
            if here is not None and aside is not None:
                raise GuestFailed(instance=uuid, reason=f"{host.path(uuid)} is in the way of the copy set aside")
            if here is None and not host.rename(uuid, RESIZE, ""):
                raise GuestFailed(instance=uuid, reason=f"neither {host.path(uuid)} nor {RESIZE} is there")
            self.write_disks(host, instance, {})

    def _unrestore(self, instance: Instance) -> None:
        with self._connection.call("unrestore_files", instance.uuid, files=True) as host:
            host.rename(instance.uuid, "", RESIZE)
