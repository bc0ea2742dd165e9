"""Cold moves when they are decided, at the source: the copy set aside is dropped, or brought back."""

from __future__ import annotations

import os
from contextlib import suppress

from compute_worker import errors
from compute_worker.objects import Instance, Migration
from compute_worker.states import ran_before
from compute_worker.virt.driver import Job, Part
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks.instance_dir import DELETED, RESIZE, InstancesDirectory
from compute_worker.virt.libvirt.spawn import make_part
from compute_worker.virt.libvirt.transfer.arrivals import Arrivals
from compute_worker.virt.libvirt.transfer.precopy import Precopy


def is_copy(directory: InstancesDirectory, uuid: str, migration: Migration) -> bool:
    """Whether ``<uuid>`` is what the migration makes, here or on storage that both hosts see; not the original."""
    return directory.arrival(uuid, migration.uuid) is not None or Arrivals(directory).owner(uuid) == migration.uuid


def forget_precopy(deeds: Deeds, warm: Precopy, uuid: str) -> None:
    """No checkpoint or bitmap of a precopy is left in the instance's disks, in use or set aside.

    Asked before a guest is started again: from then on its disks are its hypervisor's.
    """
    for suffix in ("", RESIZE):
        info = deeds.disks.directory.read_disk_info(uuid, suffix)
        if info is not None:
            # A hypervisor that knows no backups has begun none.
            with suppress(errors.NotSupported):
                warm.abandon(deeds.guest(uuid), info)


class ColdMoveVerdict:
    """Confirm and revert of moves that began here (confirm also: of one that was reverted from here)."""

    def __init__(self, deeds: Deeds, warm: Precopy) -> None:
        self._deeds = deeds
        self._warm = warm
        self._directory = deeds.disks.directory

    def confirm(self, instance: Instance, migration: Migration, job: Job) -> None:
        """What the migration left set aside here goes; a copy that another migration set aside since stays."""
        uuid = instance.uuid
        self._directory.remove(uuid, DELETED)
        try:
            record = self._directory.read_record(uuid, RESIZE)
        except errors.Broken:
            record = None
        if record is not None and record.migration not in (None, migration.uuid):
            job.explain(f"the copy set aside is of migration {record.migration}: it stays")
            return
        self._directory.remove(uuid, RESIZE)

    def revert_parts(self, instance: Instance, migration: Migration) -> list[Part]:
        """``restore_files, plug_vifs, define, start_paused``."""
        deeds, uuid = self._deeds, instance.uuid

        def start(job: Job) -> None:
            if ran_before(instance.vm_state, instance.power_state):
                deeds.start_paused(uuid, job)

        return [
            make_part(
                "restore_files",
                lambda job: self._restore(instance, job),
                lambda job: self._unrestore(instance, migration),
            ),
            make_part("plug_vifs", lambda job: deeds.plug_vifs(instance, job)),
            make_part("define", lambda job: deeds.define(instance, job), lambda job: deeds.undefine(uuid)),
            make_part("start_paused", start, lambda job: deeds.kill(uuid)),
        ]

    def _restore(self, instance: Instance, job: Job) -> None:
        uuid = instance.uuid
        here, aside = self._directory.path(uuid), self._directory.path(uuid, RESIZE)
        if os.path.lexists(here) and os.path.lexists(aside):
            raise errors.GuestFailed(instance=uuid, reason=f"{here} is in the way of the copy set aside, {aside}")
        self._directory.move(uuid, RESIZE, "")
        self._deeds.need_disk_info(uuid)
        forget_precopy(self._deeds, self._warm, uuid)
        self._deeds.disks.restore_bases(instance, job)
        self._directory.write_record(instance)

    def _unrestore(self, instance: Instance, migration: Migration) -> None:
        uuid = instance.uuid
        if not self._directory.path(uuid, RESIZE).exists() and not is_copy(self._directory, uuid, migration):
            self._directory.move(uuid, "", RESIZE)
