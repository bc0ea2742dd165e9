"""How one worker is connected to its simulated host: calls with latency and faults, events, and a sudden death."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from compute_worker.errors import HypervisorUnavailable
from compute_worker.virt.driver import DriverEvent, Job, NullJob
from compute_worker.virt.simulated.faults import AFTER, BEFORE, Stall

if TYPE_CHECKING:
    from compute_worker.virt.simulated.host import SimulatedHost

LOG = logging.getLogger(__name__)
_NULL_JOB = NullJob()
LOOK_SECONDS = 0.2
"""How often a hanging call looks whether its job was cancelled or the hypervisor went away."""


class Died(BaseException):
    """The worker that made this call is dead: nothing after this line happened. Not an :class:`Exception`, so that
    no error handling of a dead worker runs on."""


class Connection:
    """One worker's hands on a host. After :meth:`die` every call raises :class:`Died` and no event is delivered."""

    def __init__(self, host: SimulatedHost) -> None:
        self.host = host
        self.dead = threading.Event()
        self._listener: Callable[[DriverEvent], None] | None = None
        self._events: queue.SimpleQueue[DriverEvent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._waiting: list[tuple[str, Callable[[], None]]] = []
        host.connections.append(self)

    @contextmanager
    def call(self, name: str, uuid: str = "", job: Job = _NULL_JOB, files: bool = False) -> Iterator[SimulatedHost]:
        """One call of the host: latency, faults due before, the work (under the cell's lock), faults due after.

        A death of the process leaves all of the work done or nothing, as where the hypervisor is another process.

        :param files: work on files alone, which goes on when the hypervisor is down.
        """
        host = self.host
        self.check(files)
        if host.latency:
            self.pause(host.latency, job)
        stall = host.faults.strike(name, uuid, BEFORE)
        if stall is not None:
            self.hang(stall, job, files)
        with host.cell.lock, host.together():
            self.check(files)
            yield host
        host.faults.strike(name, uuid, AFTER)
        if self.dead.is_set():
            raise Died(name)

    def check(self, files: bool = False) -> None:
        """:raises Died: the worker is dead. :raises HypervisorUnavailable: the hypervisor does not answer."""
        if self.dead.is_set():
            raise Died(self.host.name)
        if not files and not self.host.hypervisor_up:
            raise HypervisorUnavailable(reason=f"the simulated hypervisor of {self.host.name} is down")

    def hang(self, stall: Stall, job: Job, files: bool = False) -> None:
        """Wait for ``stall`` to be released; ends early as a real call would: cancelled, dead, disconnected."""
        stall.entered.set()
        while not stall.released.wait(LOOK_SECONDS):
            self.check(files)
            job.check()

    def pause(self, seconds: float, job: Job) -> None:
        """Let simulated time pass."""
        if self.dead.wait(seconds):
            raise Died(self.host.name)
        job.check()

    @contextmanager
    def woken(self, uuid: str, wake: Callable[[], None]) -> Iterator[None]:
        """While the context is open, ``wake`` is called at every event of the guest, or of the hypervisor."""
        entry = (uuid, wake)
        self._waiting.append(entry)
        try:
            yield
        finally:
            self._waiting.remove(entry)

    def listen(self, listener: Callable[[DriverEvent], None]) -> None:
        """Deliver events to ``listener``, one at a time, from a thread of their own."""
        self._listener = listener
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver, name=f"fake-events-{self.host.name}", daemon=True)
            self._thread.start()

    def emit(self, event: DriverEvent) -> None:
        """An event of the host; lost where nobody listens, as it would be."""
        for uuid, wake in tuple(self._waiting):
            if uuid == event.uuid or not event.uuid:
                wake()
        if self._thread is not None:
            self._events.put(event)

    def close(self) -> None:
        """Leave in good order: no more events; calls still answer."""
        if self in self.host.connections:
            self.host.connections.remove(self)
        if self._thread is not None:
            self._events.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join()
            self._thread = None

    def die(self) -> None:
        """The worker process was killed: calls under way raise :class:`Died` before they change anything more."""
        with self.host.cell.lock:
            self.dead.set()
            if self in self.host.connections:
                self.host.connections.remove(self)
        self._events.put(None)

    def _deliver(self) -> None:
        while (event := self._events.get()) is not None:
            if self.dead.is_set() or self._listener is None:
                return
            try:
                self._listener(event)
            except Exception:
                LOG.exception("listener failed on %s of instance %s", event.kind, event.uuid)
