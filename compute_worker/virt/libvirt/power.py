"""A guest's power: on, off, paused, suspended to disk. Each method finds what a dead predecessor left and ends it."""

from __future__ import annotations

import time

from compute_worker import errors
from compute_worker.objects import Instance
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job
from compute_worker.virt.libvirt.deeds import OFF, Deeds
from compute_worker.virt.libvirt.guest import Guest


class Power:
    """Power operations on the guests of one host."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds

    def on(self, instance: Instance, job: Job) -> None:
        """Boot it from its disks; let it run where it is paused. Memory that a suspend saved is dropped: whoever wants
        it calls :meth:`resume`.

        :raises GuestFailed: it does not start, with QEMU's last words.
        """
        self._start(instance, job, discard_saved=True)

    def resume(self, instance: Instance, job: Job) -> None:
        """Go on from saved memory, else boot. The saved memory goes when the guest runs."""
        self._start(instance, job, discard_saved=False)

    def _start(self, instance: Instance, job: Job, *, discard_saved: bool) -> None:
        uuid = instance.uuid
        state = self._deeds.power(uuid)
        if state is PowerState.RUNNING:
            return
        if state in OFF:
            self._deeds.need_disk_info(uuid)
            self._deeds.disks.restore_bases(instance, job)
            self._deeds.plug_vifs(instance, job)
            self._deeds.define(instance, job)
        with self._deeds.needed(uuid) as guest:
            if state in OFF:
                if discard_saved:
                    guest.remove_managed_save()
                guest.launch()
            # Also after a launch: a guest that was paused when it was saved comes back paused.
            guest.resume()

    def off(self, instance: Instance, job: Job, timeout: float, retry_interval: float) -> bool:
        """Ask by ACPI, again and again (a guest that boots does not hear), then pull the plug. A guest that is paused
        cannot hear either: its plug is pulled at once. Returns whether it shut itself down, or was off."""
        uuid = instance.uuid
        state = self._deeds.power(uuid)
        if state in OFF:
            return True
        if timeout > 0 and state is PowerState.RUNNING:
            if self._shut_down(uuid, job, timeout, retry_interval):
                return True
            job.explain(f"it did not shut itself down in {timeout:g} s: its plug was pulled")
        else:
            why = "at once, as asked" if timeout <= 0 else f"as it is {state} and cannot hear"
            job.explain(f"its plug was pulled {why}")
        self._deeds.kill(uuid)
        return False

    def _shut_down(self, uuid: str, job: Job, timeout: float, retry_interval: float) -> bool:
        guest = self._deeds.guest(uuid)

        def is_off() -> bool:
            return guest.power_state() in OFF

        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                guest.shutdown()
            except (errors.GuestFailed, errors.InstanceNotFound):
                # It went down just now; or it is stuck, and the deadline decides.
                if is_off():
                    return True
            if job.wait(is_off, min(left, retry_interval)):
                return True
        return is_off()

    def pause(self, instance: Instance) -> None:
        """Stop its processors.

        :raises GuestFailed: it is off, or not there.
        """
        self._deeds.need_alive(instance.uuid)
        with self._deeds.needed(instance.uuid) as guest:
            guest.pause()

    def unpause(self, instance: Instance) -> None:
        """Let its processors run.

        :raises GuestFailed: it is off, or not there.
        """
        self._deeds.need_alive(instance.uuid)
        with self._deeds.needed(instance.uuid) as guest:
            guest.resume()

    def suspend(self, instance: Instance, job: Job) -> None:
        """Write its memory to disk and end it. Cancelled, the guest runs on.

        :raises GuestFailed: it is off without saved memory, or not there.
        """
        uuid = instance.uuid
        if self._deeds.power(uuid) is PowerState.SUSPENDED:
            return
        self._deeds.need_alive(uuid)
        with self._deeds.needed(uuid) as guest:
            try:
                with job.on_cancel(lambda: _abort(guest)):
                    guest.managed_save()
            except errors.GuestFailed:
                # A save that an earlier worker began ended while ours waited for it.
                if guest.power_state() is not PowerState.SUSPENDED:
                    raise


def _abort(guest: Guest) -> None:
    guest.abort_job()
