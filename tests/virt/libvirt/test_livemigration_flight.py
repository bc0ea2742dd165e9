"""A live migration in the air: watched, steered, aborted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from compute_worker import errors
from compute_worker.virt.convergence import Policy
from compute_worker.virt.driver import JobStatistics
from compute_worker.virt.libvirt import livemigration_flight
from compute_worker.virt.libvirt.events import Event, JobCompletedEvent
from compute_worker.virt.libvirt.guest_state import GuestState
from compute_worker.virt.libvirt.livemigration_flight import Flight, outcome
from compute_worker.virt.libvirt.livemigration_plan import Itinerary
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.libvirt.flyingguest import BROKEN, ENDED, GONE, IN_FLIGHT, RUNNING, STAYED, UUID, FlyingGuest
from tests.waiting import wait_for

JOURNEY = Itinerary("qemu+tcp://node2/system", 3, {}, False, False)
POLICY = Policy(downtime_steps=1, downtime_delay=0, completion_timeout=0, progress_timeout=0)


class Tower:
    """A flight, its job, and who listens to libvirt."""

    def __init__(self, journey: Itinerary | None = JOURNEY, policy: Policy = POLICY) -> None:
        self.guest, self.job = FlyingGuest(), RecordingJob()
        self.listeners: list[Callable[[Event], None]] = []
        self.held = 0

        def subscribe(callback: Callable[[Event], None]) -> Callable[[], None]:
            self.listeners.append(callback)
            return lambda: self.listeners.remove(callback)

        def hold() -> None:
            self.held += 1

        self.flight = Flight(self.guest, journey, policy, self.job, subscribe, hold)  # type: ignore[arg-type]
        self.said: list[Exception | None] = []

    def start(self) -> threading.Thread:
        thread, self.raised = in_thread(lambda: self.said.append(self.flight.run()))
        return thread


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livemigration_flight, "LOOK_SECONDS", 0.01)


def test_a_guest_that_shut_itself_down_and_a_libvirt_that_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livemigration_flight, "OFF_SECONDS", 0.05)
    tower = Tower()
    thread = tower.start()
    wait_for(lambda: tower.job.reports, what="a report")
    tower.guest.now, tower.guest.flying = ENDED, False
    thread.join(10)
    assert isinstance(tower.said[0], errors.GuestFailed)
    assert "does not end" in tower.said[0].message
    tower.guest.land(ENDED)


def test_it_arrives() -> None:
    tower = Tower()
    thread = tower.start()
    wait_for(lambda: tower.job.reports, what="a report")
    tower.guest.land(GONE)
    thread.join(5)
    assert tower.said == [None] and tower.listeners == []
    assert tower.guest.migrated == (JOURNEY.uri, {}, 3)
    assert tower.job.reports[0] == ("live_migration", 1, 1 + (1 << 20))


def test_an_event_wakes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livemigration_flight, "LOOK_SECONDS", 60)
    tower = Tower(journey=None)
    tower.guest.take_off()
    thread = tower.start()
    wait_for(lambda: tower.job.reports, what="a look")
    tower.guest.land(GONE)
    assert thread.is_alive()
    began = time.monotonic()
    tower.listeners[0](JobCompletedEvent(uuid=UUID, operation="migration_out", success=True))
    thread.join(5)
    assert not thread.is_alive() and time.monotonic() - began < 5


def test_joined_it_does_not_begin_anything() -> None:
    tower = Tower(journey=None)
    tower.guest.take_off()
    thread = tower.start()
    tower.guest.land(GONE)
    thread.join(5)
    assert tower.said == [None] and tower.guest.migrated is None


def test_cancelled_before_it_begins() -> None:
    tower = Tower()
    tower.job.cancel()
    tower.start().join(5)
    assert isinstance(tower.raised[0], errors.Cancelled) and tower.guest.migrated is None


def test_a_job_that_has_hardly_begun_is_aborted_again() -> None:
    """libvirt knows no job to abort before it sends; the wish is not lost."""
    tower = Tower()
    tower.guest.stats = [JobStatistics("none")]
    thread = tower.start()
    wait_for(lambda: tower.guest.migrated, what="its beginning")
    tower.job.cancel()
    assert tower.guest.calls == []
    tower.guest.stats = [IN_FLIGHT]
    wait_for(lambda: tower.guest.calls.count("abort") >= 2, what="aborts")
    tower.guest.land(STAYED, errors.Cancelled("operation aborted"))
    thread.join(5)
    assert isinstance(tower.said[0], errors.Cancelled)


def test_in_post_copy_nothing_is_aborted() -> None:
    tower = Tower()
    tower.guest.stats = [replace(IN_FLIGHT, postcopy=True)]
    thread = tower.start()
    wait_for(lambda: tower.guest.migrated, what="its beginning")
    tower.job.cancel()
    wait_for(lambda: tower.job.reasons, what="the reason")
    tower.guest.land(GONE)
    thread.join(5)
    assert tower.said == [None] and tower.guest.calls == []
    assert tower.job.reasons == ["it is in post-copy: it cannot be stopped any more"]


@pytest.mark.parametrize(
    ("policy", "call"),
    [
        (replace(POLICY, max_downtime_ms=70), "downtime 0.07"),
        (replace(POLICY, completion_timeout=0.001, timeout_action="force_complete", post_copy=True), "postcopy"),
        (replace(POLICY, completion_timeout=0.001), "abort"),
        (replace(POLICY, progress_timeout=0.05), "abort"),
    ],
)
def test_what_is_decided_is_done_and_told(policy: Policy, call: str) -> None:
    tower = Tower(policy=policy)
    thread = tower.start()
    wait_for(lambda: call in tower.guest.calls, what=call)
    tower.guest.land(STAYED, errors.GuestFailed(instance=UUID, reason="x"))
    thread.join(5)
    assert any(reason.startswith(call.partition(" ")[0]) for reason in tower.job.reasons)
    assert bool(tower.flight.why_aborted) == (call == "abort")


def test_held_by_policy() -> None:
    tower = Tower(policy=replace(POLICY, completion_timeout=0.001, timeout_action="force_complete"))
    thread = tower.start()
    wait_for(lambda: tower.held, what="the hold")
    tower.guest.land(GONE)
    thread.join(5)
    assert tower.held == 1, "it was stopped twice"


@pytest.mark.parametrize(("yankable", "calls"), [(True, ["sever"]), (False, ["sever", "abort"])])
def test_a_silent_destination_is_cut_off(monkeypatch: pytest.MonkeyPatch, yankable: bool, calls: list[str]) -> None:
    """Aborting would have the guest stand still until the kernel gives the connection up."""
    monkeypatch.setattr(livemigration_flight, "SILENCE_SECONDS", 0.03)
    tower = Tower(policy=replace(POLICY, progress_timeout=0.05))
    tower.guest.yankable = yankable
    thread = tower.start()
    wait_for(lambda: calls[-1] in tower.guest.calls, what=calls[-1])
    tower.guest.land(STAYED, errors.GuestFailed(instance=UUID, reason="client socket is closed"))
    thread.join(5)
    done = [call for call in tower.guest.calls if not call.startswith("downtime")]
    assert done[: len(calls)] == calls and "not a byte was sent" in tower.flight.why_aborted
    assert not yankable or done == calls, "its guest would stand still"


@pytest.mark.parametrize("error", [errors.HypervisorBusy(reason="x"), errors.GuestFailed(instance=UUID, reason="x")])
def test_what_cannot_be_asked_now_is_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tower, asked = Tower(), []

    def busy(**flags: bool) -> JobStatistics:
        asked.append(1)
        raise error

    monkeypatch.setattr(tower.guest, "job_stats", busy)
    thread = tower.start()
    wait_for(lambda: len(asked) > 3, what="looks")
    tower.guest.land(GONE)
    thread.join(5)
    assert tower.said == [None]


def test_joined_without_libvirt_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower(journey=None)
    tower.guest.take_off()

    def gone(**flags: bool) -> JobStatistics:
        raise errors.HypervisorUnavailable(reason="down")

    monkeypatch.setattr(tower.guest, "job_stats", gone)
    tower.start().join(5)
    assert isinstance(tower.raised[0], errors.HypervisorUnavailable) and tower.listeners == []


@pytest.mark.parametrize(
    ("state", "job", "where"),
    [
        (None, "", "unknown"),
        (GONE, "", "gone"),
        (ENDED, "", "off"),
        (RUNNING, "", "here"),
        (RUNNING, "migration_out", "flying"),
        (RUNNING, "backup", "here"),
        (STAYED, "", "here"),
        (BROKEN, "", "broken"),
        (BROKEN, "migration_out", "broken"),
    ],
)
def test_where_it_is(state: GuestState | None, job: str, where: str) -> None:
    assert outcome(state, job) == where
