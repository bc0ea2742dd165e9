"""Birth and death of a guest, as the parts that the manager journals one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compute_worker.objects import Instance
from compute_worker.virt.checks import check_request
from compute_worker.virt.driver import Job, Part, SpawnRequest
from compute_worker.virt.libvirt.console import Console
from compute_worker.virt.libvirt.deeds import Deeds
from compute_worker.virt.libvirt.disks import ephemeral


def _nothing(job: Job) -> None:
    """The undo of a part that only goes forward, or has nothing to take back."""


def make_part(name: str, do: Callable[[Job], object], undo: Callable[[Job], None] = _nothing) -> Part:
    """A part whose ``do`` may return anything: only a mapping is told."""

    def run(job: Job) -> Mapping[str, Any] | None:
        told = do(job)
        return told if isinstance(told, Mapping) else None

    return Part(name, run, undo)


class Spawner:
    """Makes guests and removes them.

    :param stop_receiving: ends whatever listens for disks of the instance.
    """

    def __init__(self, deeds: Deeds, console: Console, stop_receiving: Callable[[str], None]) -> None:
        self._deeds = deeds
        self._console = console
        self._stop_receiving = stop_receiving
        self._formats = ephemeral.available_formats() - {"swap"}

    def check(self, instance: Instance, request: SpawnRequest) -> None:
        """What can be refused at once; touches nothing, asks nobody.

        :raises Refused: see :meth:`compute_worker.virt.driver.ComputeDriver.check_spawn`.
        """
        check_request(instance, request, self._formats)
        self._deeds.disks.check(instance, request)

    def parts(self, instance: Instance, request: SpawnRequest) -> list[Part]:
        """``fetch_images, create_disks, plug_vifs, define, start_paused``.

        The config drive is made within ``create_disks``. Undoing ``plug_vifs`` is nothing: taps go with the guest.
        """
        deeds, uuid = self._deeds, instance.uuid
        return [
            make_part(
                "fetch_images",
                lambda job: self._fetch(instance, job),
                lambda job: deeds.disks.undo_prepare_images(instance),
            ),
            make_part(
                "create_disks",
                lambda job: self._create_disks(instance, request, job),
                lambda job: deeds.delete_files(uuid),
            ),
            make_part("plug_vifs", lambda job: deeds.plug_vifs(instance, job)),
            make_part("define", lambda job: deeds.define(instance, job), lambda job: deeds.undefine(uuid)),
            make_part("start_paused", lambda job: deeds.start_paused(uuid, job), lambda job: deeds.kill(uuid)),
        ]

    def destroy_parts(self, instance: Instance) -> list[Part]:
        """``power_off, undefine, unplug_vifs, delete_files``; taps went with the guest."""
        deeds, uuid = self._deeds, instance.uuid
        return [
            make_part("power_off", lambda job: deeds.kill(uuid)),
            make_part("undefine", lambda job: deeds.undefine(uuid)),
            make_part("unplug_vifs", _nothing),
            make_part("delete_files", lambda job: self._delete_files(uuid)),
        ]

    def _fetch(self, instance: Instance, job: Job) -> Mapping[str, Any]:
        bases = self._deeds.disks.prepare_images(instance, job)
        return {"bases": [base.name for base in bases]}

    def _create_disks(self, instance: Instance, request: SpawnRequest, job: Job) -> Mapping[str, Any]:
        info = self._deeds.disks.create_disks(instance, request, job)
        # What a lost store is rebuilt from, before there is a guest that could be nobody's.
        self._deeds.disks.directory.write_record(instance)
        self._deeds.touch_console(instance.uuid)
        return {"disks": [disk.name for disk in info.disks]}

    def _delete_files(self, uuid: str) -> None:
        self._console.forget(uuid)
        self._stop_receiving(uuid)
        self._deeds.delete_files(uuid)
