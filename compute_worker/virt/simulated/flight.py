"""A live migration, as two simulated hypervisors do it between themselves: no worker is needed while it flies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from compute_worker.states import PowerState
from compute_worker.virt.driver import EventKind, JobStatistics
from compute_worker.virt.simulated.faults import BEFORE
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.model import Domain, Memory

TICK = 0.02
"""Seconds between two steps of a migration that takes time."""
MIGRATING = "migrating"
POSTCOPY = "post-copy"


class _Lost(Exception):
    """The migration cannot go on."""


@dataclass
class _Counters:
    total: int
    processed: float = 0
    remaining: float = 0
    iteration: int = 0
    pass_left: float = 0
    """Bytes that the iteration still has to send."""


class Flight:
    """One migration of a guest from ``source`` to ``dest`` in a thread of its own.

    It ends ``completed`` (the guest runs at ``dest``), ``cancelled`` or ``failed`` (at ``source``; in ``failed`` with
    :attr:`reason` ``finish reply lost`` at both: libvirt does that). Fault points: ``migrate`` and ``migrate_finish``
    of the source (the latter loses the finish reply), ``receive`` of the destination (fail or stall).
    """

    def __init__(self, source: SimulatedHost, dest: SimulatedHost, uuid: str, migration: str, disks: list[str]) -> None:
        self.source, self.dest, self.uuid, self.migration, self.disks = source, dest, uuid, migration, disks
        self.cell = source.cell
        self.state = "running"
        self.reason = ""
        self.postcopy = False
        self.done = threading.Event()
        self._forced: str | None = None
        self._aborted = False
        self._permitted = 0.0
        self._started = time.monotonic()
        self._paused_at: float | None = None
        self._ended: float | None = None
        self._downtime: float | None = None
        self._memory = _Counters(0)
        self._disk = _Counters(0)
        self._watchers: list[Callable[[], None]] = []

    def start(self) -> None:
        """Take off. Called under the cell's lock.

        :raises KeyError: there is no such guest, or a disk is missing on either side.
        """
        domain = self.source.domain(self.uuid)
        if domain is None:
            raise KeyError(self.uuid)
        files = self.source.slot(self.uuid).directories[""]
        self._disk = _Counters(sum(len(files[name].data) for name in self.disks))
        self._disk.remaining = self._disk.total
        self._memory = _Counters(domain.memory_mb << 20)
        self._memory.remaining = self._memory.total
        domain.migrating = True
        self.source.changed(self.source.slot(self.uuid))
        self.dest.define(self._incoming(domain))
        self.cell.flights[self.uuid] = self
        threading.Thread(target=self._run, name=f"flight-{self.uuid[:8]}", daemon=True).start()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` when it ended."""
        self._watchers.append(watcher)
        if self.done.is_set():
            watcher()

    def abort(self) -> bool:
        """Stop it; false when it cannot be stopped any more."""
        with self.cell.lock:
            if self.postcopy or self.done.is_set() or self.dest.power_of(self.uuid) is PowerState.RUNNING:
                return False
            self._aborted = True
            return True

    def force(self, postcopy: bool) -> None:
        """Finish it at the guest's expense."""
        with self.cell.lock:
            self._forced = POSTCOPY if postcopy else "pause"

    def permit(self, seconds: float) -> None:
        """Stop the guest for the rest as soon as that can be sent within ``seconds``."""
        with self.cell.lock:
            self._permitted = seconds

    @property
    def _rate(self) -> float | None:
        return self.source.rate if self.source.link_rate is None else self.source.link_rate

    def _expected(self) -> float | None:
        """Seconds that the guest would stand still for what is left now."""
        return self._memory.remaining / self._rate if self._rate and self.state == "running" else None

    def statistics(self) -> JobStatistics:
        """How far it is."""
        with self.cell.lock:
            return JobStatistics(
                type={"running": "unbounded"}.get(self.state, self.state),
                memory_total=self._memory.total,
                memory_processed=int(self._memory.processed),
                memory_remaining=int(self._memory.remaining),
                memory_rate=self._rate,
                memory_dirty_rate=self.source.dirty_rate if self._guest_runs() else 0.0,
                memory_iteration=self._memory.iteration,
                disk_total=self._disk.total,
                disk_processed=int(self._disk.processed),
                disk_remaining=int(self._disk.remaining),
                disk_rate=self._rate,
                downtime=self._expected() if self._downtime is None else self._downtime,
                elapsed=(self._ended or time.monotonic()) - self._started,
                postcopy=self.postcopy,
            )

    # --- the flight ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._fly()
        except Exception as exc:
            self._fail(str(exc))
        self._ended = time.monotonic()
        self.done.set()
        for watcher in self._watchers:
            watcher()

    def _fly(self) -> None:
        self._strike(self.source, "migrate")
        self._transfer(self._disk, dirty=False)
        self._transfer(self._memory, dirty=True)
        if self.postcopy:
            self._land()
            return
        self._switch()
        self._land()

    def _transfer(self, counters: _Counters, dirty: bool) -> None:
        counters.iteration, counters.pass_left = 1, counters.remaining
        while counters.remaining > 0:
            self._strike(self.dest, "receive")
            with self.cell.lock:
                self._check()
                if dirty:
                    self._obey()
                    self._stop_for_the_rest(counters.remaining)
                rate = self._rate
                step = counters.remaining if rate is None else min(counters.remaining, rate * TICK)
                counters.processed += step
                redirtied = self.source.dirty_rate * TICK if dirty and rate is not None and self._guest_runs() else 0
                # Writing a page again before it was sent makes no more to send: never more than there is.
                counters.remaining = min(counters.total, max(0.0, counters.remaining - step + redirtied))
                counters.pass_left -= step
                if counters.pass_left <= 0 < counters.remaining:
                    counters.iteration, counters.pass_left = counters.iteration + 1, counters.remaining
            if rate is not None:
                self.done.wait(TICK)

    def _stop_for_the_rest(self, remaining: float) -> None:
        rate = self._rate
        if rate is not None and not self.postcopy and self._guest_runs() and remaining <= rate * self._permitted:
            self._pause_source()

    def _guest_runs(self) -> bool:
        return self.source.power_of(self.uuid) is PowerState.RUNNING

    def _obey(self) -> None:
        if self._forced == POSTCOPY and not self.postcopy:
            self.postcopy = True
            self._switch()
            self.source.tell(EventKind.POSTCOPY, self.uuid)
        elif self._forced == "pause" and self._guest_runs():
            self._pause_source()

    def _pause_source(self) -> None:
        domain = self.source.domain(self.uuid)
        assert domain is not None
        if self._paused_at is None:
            self._paused_at = time.monotonic()
        self.source.power(domain, PowerState.PAUSED, POSTCOPY if self.postcopy else MIGRATING, EventKind.PAUSED)

    def _switch(self) -> None:
        """The switch-over: the guest stops here with all its disks written there, and runs there."""
        with self.cell.lock:
            self._check()
            domain, incoming = self.source.domain(self.uuid), self.dest.domain(self.uuid)
            if domain is None or incoming is None or domain.memory is None:
                raise _Lost("the guest is gone")
            ran = domain.power is PowerState.RUNNING or self._paused_at is not None
            if domain.power is PowerState.RUNNING:
                self._pause_source()
            self._copy_disks()
            incoming.memory = Memory(domain.memory.token, domain.memory.now())
            self.dest.effect(self.uuid, "migrated_in")
            if ran:
                self.dest.power(incoming, PowerState.RUNNING, "migrated", EventKind.RESUMED)
            else:
                self.dest.power(incoming, PowerState.PAUSED, "migrated", EventKind.PAUSED)
            incoming.migrating = self.postcopy
            self.dest.tell(EventKind.MIGRATED_IN, self.uuid)
            self._downtime = time.monotonic() - (self._paused_at or time.monotonic())

    def _copy_disks(self) -> None:
        theirs = self.dest.slot(self.uuid).directories.get("", {})
        ours = self.source.slot(self.uuid).directories.get("", {})
        if any(name not in theirs or name not in ours for name in self.disks):
            raise _Lost("a disk to copy is missing")
        self.dest.write(self.uuid, {name: ours[name].copy() for name in self.disks})

    def _land(self) -> None:
        """The source hears that the guest runs at the destination, or does not."""
        try:
            self._strike(self.source, "migrate_finish")
        except Exception as exc:
            self._finish_lost(exc)
            return
        with self.cell.lock:
            for host in (self.source, self.dest):
                self._settle(host)
            domain = self.source.domain(self.uuid)
            if domain is not None and domain.alive:
                self.source.effect(self.uuid, "migrated_out")
                self.source.power(domain, PowerState.SHUTDOWN, "migrated", EventKind.MIGRATED_OUT)
            self.state = "completed"
            self.source.tell(EventKind.JOB_COMPLETED, self.uuid)

    def _finish_lost(self, exc: Exception) -> None:
        """What libvirt does then: after a time the guest runs on at the source too, if it is still there."""
        deadline = time.monotonic() + self.source.finish_timeout
        while time.monotonic() < deadline and self.source.power_of(self.uuid) is PowerState.PAUSED:
            self.done.wait(TICK)
        with self.cell.lock:
            domain = self.source.domain(self.uuid)
            if domain is not None and domain.power is PowerState.PAUSED and domain.migrating:
                domain.migrating = False
                self.source.power(domain, PowerState.RUNNING, "migration failed", EventKind.RESUMED)
            self._settle(self.dest)
            self.state, self.reason = "failed", f"finish reply lost: {exc}"

    def _fail(self, reason: str) -> None:
        with self.cell.lock:
            self.state = "cancelled" if self._aborted else "failed"
            self.reason = reason
            if self.postcopy:
                self._fail_postcopy()
                return
            incoming = self.dest.domain(self.uuid)
            if incoming is not None and incoming.migrating:
                self.dest.changed(self.dest.drop(incoming))
            self._settle(self.source)
            domain = self.source.domain(self.uuid)
            if domain is not None and domain.power is PowerState.PAUSED and self._paused_at is not None:
                self.source.power(domain, PowerState.RUNNING, "migration failed", EventKind.RESUMED)

    def _fail_postcopy(self) -> None:
        for host in (self.source, self.dest):
            domain = host.domain(self.uuid)
            if domain is not None and domain.alive:
                host.power(domain, PowerState.PAUSED, "post-copy failed", EventKind.POSTCOPY_FAILED)

    def _settle(self, host: SimulatedHost) -> None:
        domain = host.domain(self.uuid)
        if domain is not None:
            domain.migrating = False
            host.changed(host.slot(self.uuid))

    def _check(self) -> None:
        if self._aborted:
            raise _Lost("operation aborted: cancelled by client")
        if not self.dest.powered or not self.dest.reachable:
            raise _Lost(f"host {self.dest.name} does not answer")
        if not self.source.powered or not (self.source.domain(self.uuid) or Domain("")).alive:
            raise _Lost("the guest is gone")

    def _strike(self, host: SimulatedHost, call: str) -> None:
        stall = host.faults.strike(call, self.uuid, BEFORE)
        if stall is None:
            return
        stall.entered.set()
        while not stall.released.wait(TICK):
            with self.cell.lock:
                self._check()

    def _incoming(self, domain: Domain) -> Domain:
        return Domain(
            uuid=self.uuid,
            name=domain.name,
            vcpus=domain.vcpus,
            memory_mb=domain.memory_mb,
            owner=domain.owner,
            generation=domain.generation,
            migration=self.migration,
            persistent=False,
            power=PowerState.PAUSED,
            reason=MIGRATING,
            migrating=True,
        )
