"""One live migration in the air: begun in a thread of its own, or found there; watched, steered, aborted.

libvirt moves the guest, whoever watches. A worker that dies leaves the flight as it is, and its successor finds it by
libvirt's job on the guest. Woken by libvirt's events, the watcher looks at least twice a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from compute_worker import errors, liveprogress
from compute_worker.states import PowerState
from compute_worker.virt import convergence
from compute_worker.virt.convergence import Action, Decision, History, Policy
from compute_worker.virt.driver import Job, JobStatistics
from compute_worker.virt.libvirt.events import DomainEvent, Event
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.guest_state import GuestState
from compute_worker.virt.libvirt.livemigration_plan import Itinerary

LOG = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
SILENCE_SECONDS = 4.0
"""A destination that took nothing for so long may be gone."""
OUTGOING = "migration_out"
OFF_SECONDS = 5.0
"""libvirt 9.0 does not return from the migration of a guest that shut itself down meanwhile: it has ended by then."""
GONE = ("migrated",)
"""Reasons of a guest that is off here because it arrived."""


class Flight:
    """A migration of ``guest`` from here.

    :param journey: ``None``: it is in the air already.
    :param subscribe: libvirt's events from now on; returns what ends that.
    :param hold: stops the guest's processors, so that it converges.
    """

    def __init__(
        self,
        guest: Guest,
        journey: Itinerary | None,
        policy: Policy,
        job: Job,
        subscribe: Callable[[Callable[[Event], None]], Callable[[], None]],
        hold: Callable[[], None],
    ) -> None:
        self._guest = guest
        self._journey = journey
        self._policy = policy
        self._job = job
        self._subscribe = subscribe
        self._hold = hold
        self._woken = threading.Event()
        self._landed = threading.Event()
        self._error: Exception | None = None
        self._abort_wanted = False
        self._why_aborted = ""
        self._severed = False
        self._off_since: float | None = None
        self._history = History()
        self._began = time.monotonic()
        self._told = ""

    def run(self) -> Exception | None:
        """Until it is over. What libvirt said: ``None``: that it arrived, or nothing (it was not asked by us)."""
        unsubscribe = self._subscribe(self._on_event)
        try:
            with self._job.on_cancel(self._cancelled):
                if self._journey is not None:
                    self._job.check()
                    threading.Thread(target=self._fly, args=(self._journey,), name="migration", daemon=True).start()
                while not self._over():
                    self._look()
                    self._woken.wait(LOOK_SECONDS)
                    self._woken.clear()
        finally:
            unsubscribe()
        if self._journey is not None and not self._landed.is_set():
            reason = "it is off here, and its migration does not end"
            return errors.GuestFailed(instance=self._guest.uuid, reason=reason)
        return self._error

    @property
    def why_aborted(self) -> str:
        """What made us abort it; empty: nothing did, or somebody asked for it."""
        return self._why_aborted

    def _fly(self, journey: Itinerary) -> None:
        try:
            self._guest.migrate(journey.uri, journey.params, journey.flags)
        except Exception as exc:
            self._error = exc
        self._landed.set()
        self._woken.set()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, DomainEvent) and event.uuid == self._guest.uuid:
            self._woken.set()

    def _cancelled(self) -> None:
        self._abort_wanted = True
        self._woken.set()

    def _over(self) -> bool:
        if self._journey is not None:
            return self._landed.is_set() or self._is_off()
        return self._guest.job_operation() != OUTGOING if self._alive() else True

    def _is_off(self) -> bool:
        """Whether the guest has been off here for so long that nothing of it can fly."""
        try:
            alive = self._alive()
        except errors.Retryable:
            return False
        now = time.monotonic()
        self._off_since = None if alive else self._off_since or now
        return self._off_since is not None and now - self._off_since >= OFF_SECONDS

    def _alive(self) -> bool:
        return self._guest.power_state() in (PowerState.RUNNING, PowerState.PAUSED)

    def _look(self) -> None:
        """Report, steer. What cannot be asked now is asked the next time."""
        try:
            stats = self._guest.job_stats()
            self._history = self._history.seen(stats, time.monotonic() - self._began)
            self._report(stats)
            if self._abort_wanted:
                self._abort(stats)
            else:
                self._steer()
        except errors.InstanceNotFound:
            return
        except (errors.HypervisorBusy, errors.GuestFailed, errors.NotSupported) as exc:
            # It may just have ended, or begun.
            LOG.debug("instance %s: its migration was not looked at: %s", self._guest.uuid, exc)
        except errors.HypervisorUnavailable:
            if self._journey is None:
                raise

    def _steer(self) -> None:
        decision = convergence.decide(self._history, self._policy)
        if decision.action is Action.WAIT:
            return
        self._act(decision)
        self._history = self._history.did(decision)
        self._job.explain(f"{decision.action}: {decision.reason}")

    def _act(self, decision: Decision) -> None:
        if decision.action is Action.DOWNTIME:
            self._guest.set_max_downtime(decision.downtime_ms / 1000)
        elif decision.action is Action.POSTCOPY:
            self._guest.start_postcopy()
        elif decision.action is Action.PAUSE:
            self._hold()
        elif decision.action is Action.ABORT:
            self._abort_wanted, self._why_aborted = True, decision.reason
            self._stop()

    def _abort(self, stats: JobStatistics) -> None:
        """Again at each look: a job that has hardly begun cannot be aborted yet."""
        if stats.postcopy:
            self._tell("it is in post-copy: it cannot be stopped any more")
        elif stats.type in liveprogress.RUNNING and not self._severed:
            self._stop()

    def _stop(self) -> None:
        """Abort it; where the destination has been silent its connections are cut instead: the guest would stand still
        until the kernel gives them up, and libvirt ends the flight when it has missed the other libvirtd."""
        if self._history.quiet < SILENCE_SECONDS:
            self._guest.abort_job()
            return
        try:
            self._severed = self._guest.sever_migration()
            self._tell("its connections were cut: the destination is silent")
        except errors.NotSupported as exc:
            LOG.warning("instance %s: %s: its migration is aborted, which may take long", self._guest.uuid, exc)
        if not self._severed:
            self._guest.abort_job()

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            self._job.explain(what)

    def _report(self, stats: JobStatistics) -> None:
        if stats.type in liveprogress.RUNNING:
            liveprogress.report(self._job, stats)


def outcome(state: GuestState | None, job: str) -> str:
    """Where the guest is, by what this host's libvirt says of it: ``gone`` (it arrived), ``here`` (it runs on here, or
    stands still here), ``flying``, ``broken`` (its post-copy was interrupted), ``off``, ``unknown`` (not defined)."""
    if state is None:
        return "unknown"
    if state.power not in (PowerState.RUNNING, PowerState.PAUSED):
        return "gone" if state.reason in GONE else "off"
    if state.reason == "postcopy_failed":
        return "broken"
    return "flying" if job == OUTGOING else "here"


def look(guest: Guest) -> tuple[str, GuestState | None]:
    """:func:`outcome` of now."""
    state, running = None, ""
    with suppress(errors.InstanceNotFound):
        state = guest.state()
        running = guest.job_operation()
    return outcome(state, running), state
