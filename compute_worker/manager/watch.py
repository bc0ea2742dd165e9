"""Keeping records in step with the hypervisor: by its events, and by a comparison now and then. Records only."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from compute_worker import errors
from compute_worker.manager.core import Core
from compute_worker.manager.recovery import Recovery, record_observed
from compute_worker.objects import Instance
from compute_worker.operations import journal
from compute_worker.operations.database import Closed, Tx
from compute_worker.operations.service import Operations
from compute_worker.states import PowerState, observed
from compute_worker.virt.driver import DriverEvent, EventKind

LOG = logging.getLogger(__name__)
_ALL = ""
_TIDY_INTERVAL = 600.0
_ASK_AGAIN = 1.0


class Watch:
    """One thread that looks at instances the driver told of, and at all of them every ``sync_power_state_interval``.

    It also refreshes what the host has, prunes the journal and the image cache. The first look is :class:`Recovery`'s,
    repeated each second until the hypervisor answers.
    """

    def __init__(self, core: Core, operations: Operations, recovery: Recovery) -> None:
        self._core = core
        self._operations = operations
        self._recovery = recovery
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self._next: dict[Callable[[], None], float] = {}
        self._compared = threading.Event()

    def start(self) -> None:
        """Begin; the driver's events come from now on."""
        self._core.driver.register_event_listener(self.on_event)
        self._queue.put(_ALL)
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread. One that hangs in the hypervisor is left to the end of the process."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def compared(self) -> threading.Event:
        """Set once the first comparison was made."""
        return self._compared

    def on_event(self, event: DriverEvent) -> None:
        """What the driver tells: look at that instance soon, or at everything when the hypervisor is back."""
        self._operations.wake(event.uuid)
        if event.kind is EventKind.CONNECTED:
            self._queue.put(_ALL)
        elif event.kind is not EventKind.DISCONNECTED:
            self._queue.put(event.uuid)

    def look_at(self, instance: str) -> None:
        """Compare one instance soon: an operation on it ended."""
        self._queue.put(instance)

    def _loop(self) -> None:
        options = self._core.settings
        self._next = {
            self._compare: time.monotonic() + options.compute.sync_power_state_interval,
            self._tidy: time.monotonic() + _TIDY_INTERVAL,
            self._prune_images: time.monotonic() + options.images.cache_manager_interval,
        }
        every = {
            self._compare: options.compute.sync_power_state_interval,
            self._tidy: _TIDY_INTERVAL,
            self._prune_images: options.images.cache_manager_interval,
        }
        while True:
            wait = max(0.0, min(self._next.values()) - time.monotonic())
            try:
                what = self._queue.get(timeout=wait)
            except queue.Empty:
                what = "due"
            if what is None:
                return
            try:
                if what == _ALL:
                    self._compare()
                elif what != "due":
                    self._one(what)
                for task, due in list(self._next.items()):
                    if due <= time.monotonic():
                        self._next[task] = time.monotonic() + every[task]
                        task()
            except Closed:
                return
            except errors.ComputeError as exc:
                LOG.warning("comparison with the hypervisor: %s", exc)
                self._next[self._compare] = time.monotonic() + _ASK_AGAIN
            except Exception:
                LOG.exception("comparison with the hypervisor failed")
                self._next[self._compare] = time.monotonic() + _ASK_AGAIN

    def _compare(self) -> None:
        self._core.claims.refresh(self._core.driver.get_available_resource())
        self._recovery.compare()
        self._compared.set()

    def _one(self, uuid: str) -> None:
        if self._recovery.is_interrupted(uuid):
            self._compare()
            return
        instance = self._core.database.read(lambda tx: self._idle(tx, uuid))
        if instance is None:
            return
        try:
            info = self._core.driver.get_info(uuid)
            found, why = info.power_state, info.reason
        except errors.InstanceNotFound:
            found, why = PowerState.NOSTATE, "the hypervisor has no such guest"
        becomes, reason = observed(instance.vm_state, found)
        if becomes is instance.vm_state and found is instance.power_state:
            return
        record_observed(self._core, self._operations, uuid, found, f"{reason} ({why})" if why else reason, instance.seq)

    def _idle(self, tx: Tx, uuid: str) -> Instance | None:
        """The record, unless an operation is at it: its steps cause the events, and its end is followed by a look."""
        return None if journal.open_entries(tx, uuid) else self._core.store.find(tx, uuid)

    def _tidy(self) -> None:
        self._operations.prune()
        self._core.moves.prune(time.time() - 2 * self._core.settings.compute.key_retention)
        self._core.store.prune(time.time() - 2 * self._core.settings.compute.key_retention)

    def _prune_images(self) -> None:
        for removed in self._core.driver.manage_image_cache(self._core.store.used_images()):
            LOG.info("base image %s was not used for long and is removed", removed)
