"""Which operations run when: threads, admission, cancel, resume after a restart, a graceful end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial

from compute_worker import logcontext, objects
from compute_worker.operations import journal
from compute_worker.operations.admission import Admission, Ticket
from compute_worker.operations.database import Closed, Database
from compute_worker.operations.executor import Executor
from compute_worker.operations.journal import Entry
from compute_worker.operations.kinds import Kind
from compute_worker.operations.run import Run, Stopping
from compute_worker.operations.stuck import as_compute_error

LOG = logging.getLogger(__name__)

OnReport = Callable[[Run, bool], None]


class Runner:
    """Runs accepted operations, each in a thread of its own, as many at once as ``limits`` says.

    :param on_report: told of every progress report, and whether the phase is new.
    :param on_end: told kind, instance, final state and seconds of every operation that ended.
    """

    def __init__(
        self,
        database: Database,
        executor: Executor,
        kinds: Mapping[str, Kind],
        limits: Mapping[str, int],
        on_report: OnReport,
        on_end: Callable[[str, str | None, str, float], None] | None = None,
    ) -> None:
        self._database = database
        self._executor = executor
        self._kinds = kinds
        self._admission = Admission(limits)
        self._on_report = on_report
        self._on_end = on_end
        self._lock = threading.Condition()
        self._runs: dict[int, Run] = {}
        self._parked: set[int] = set()
        self._threads: set[threading.Thread] = set()
        self._news = 0
        self._started = False
        self._stopping = False

    def start(self) -> int:
        """Go on with every open operation of the journal. Returns how many there were."""
        with self._lock:
            # In one: what is accepted meanwhile is either among the entries or submitted after them.
            entries = self._database.read(journal.open_entries)
            self._started = True
            for entry in entries:
                self.submit(entry)
        return len(entries)

    def submit(self, entry: Entry) -> None:
        """Run an accepted operation when its turn comes. Before :meth:`start` the journal alone remembers it.

        ``entry`` may be old: one that ended or was cancelled since it was read is found so in the journal.
        """
        with self._lock:
            if not self._started or self._stopping or entry.id in self._runs:
                return
            run = Run(entry)
            run.on_report = self._reported
            run.on_step_aside = partial(self._admit_others, self._admission.step_aside)
            run.on_yield_slot = partial(self._admit_others, self._admission.yield_slot)
            run.on_claim_slot = partial(self._admit_others, self._admission.claim_slot)
            self._runs[entry.id] = run
            self._launch(self._admission.add(self._ticket(run)))

    def _ticket(self, run: Run) -> Ticket:
        kind = self._kinds.get(run.kind)
        return Ticket(run.id, run.instance, kind.limit if kind else "unknown")

    def _launch(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            run = self._runs[ticket.id]
            if run.wants_slot:
                run.slot_granted()
                continue
            thread = threading.Thread(target=self._work, args=(run,), name=f"op-{run.kind}", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _work(self, run: Run) -> None:
        try:
            with logcontext.bound(request_id=run.request_id, operation=run.uuid, instance=run.instance):
                self._to_its_end(run)
        except (Stopping, Closed):
            LOG.debug("operation %s goes on after the next start", run.uuid)
        except Exception as exc:
            LOG.exception("operation %s stays open until the worker is started again", run.uuid)
            self._park(run, exc)
        else:
            self._release(run, keep=False)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())
                self._tell()

    def _reported(self, run: Run, new_phase: bool) -> None:
        if new_phase:
            with self._lock:
                self._tell()
        self._on_report(run, new_phase)

    def _tell(self) -> None:
        """Under the lock: an operation ended, or is in another phase."""
        self._news += 1
        self._lock.notify_all()

    def _to_its_end(self, run: Run) -> None:
        started = time.monotonic()
        if not self._executor.execute(run) or self._on_end is None:
            return
        state = self._database.read(lambda tx: journal.by_id(tx, run.id)).state
        try:
            self._on_end(run.kind, run.instance, state.value, time.monotonic() - started)
        except Exception:
            LOG.exception("that operation %s ended could not be told", run.uuid)

    def _park(self, run: Run, exc: Exception) -> None:
        """A defect: it stays open, and holds nothing that other operations need. A cancel gives it another try."""
        run.waiting_for = f"the worker to be started again: {as_compute_error(exc, run.kind, run.phase)}"
        self._release(run, keep=True)
        try:
            self._executor.tell_parked(run, exc)
        except Exception:
            LOG.exception("operation %s: that it stays open could not be notified", run.uuid)

    def _release(self, run: Run, keep: bool) -> None:
        """Its slot and its instance's line are free for others. ``keep``: it is remembered as parked."""
        with self._lock:
            if keep:
                self._parked.add(run.id)
                run.slot_granted()
            else:
                del self._runs[run.id]
            tickets = self._admission.done(run.id)
            if not self._stopping:
                self._launch(tickets)

    def _admit_others(self, change: Callable[[int], list[Ticket]], run: Run) -> None:
        with self._lock:
            tickets = change(run.id)
            if not self._stopping:
                self._launch(tickets)

    def cancel(self, row: int, preempted: bool = False) -> None:
        """Ask an operation to leave; the journal knows it already. One that waits is started at once, to its end."""
        with self._lock:
            run = self._runs.get(row)
        if run is None:
            return
        run.cancel(preempted)
        with self._lock:
            if row not in self._runs or self._stopping:
                return
            if row in self._parked:
                self._parked.discard(row)
                run.waiting_for = None
                self._launch(self._admission.add(self._ticket(run)))
            self._launch(self._admission.expedite(row))

    def wake(self, instance: str) -> None:
        """Make what waits for something about ``instance`` look again; everything, where that is empty."""
        with self._lock:
            runs = [run for run in self._runs.values() if not instance or run.instance == instance]
        for run in runs:
            run.wake()

    def live(self, operation: objects.Operation, row: int) -> objects.Operation:
        """``operation`` with what only memory knows: progress, what it waits for, what its step has decided so far."""
        with self._lock:
            run = self._runs.get(row)
        if run is None:
            return operation
        import msgspec

        steps = operation.steps
        if steps and steps[-1].ended_at is None:
            steps = [*steps[:-1], msgspec.structs.replace(steps[-1], reason=run.reason)]
        return msgspec.structs.replace(operation, progress=run.progress, waiting_for=run.waiting_for, steps=steps)

    def progress_of(self, kind: str) -> list[tuple[str | None, objects.Progress]]:
        """Instance and last report of every operation of a kind that runs and has reported."""
        with self._lock:
            runs = [run for run in self._runs.values() if run.kind == kind]
        return [(run.instance, run.progress) for run in runs if run.progress is not None]

    def wait(self, until: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``until()``, looked at when an operation ends or enters another phase; false when ``timeout``
        seconds are over."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self._news
            if until():
                return True
            left = deadline - time.monotonic()
            if left <= 0 or self._stopping:
                return False
            with self._lock:
                # What was told since it was looked at is not told again.
                if self._news == seen:
                    self._lock.wait(min(left, 1.0))

    def counts(self) -> tuple[int, dict[str, int]]:
        """How many operations wait, and how many run by class."""
        with self._lock:
            return self._admission.waiting, self._admission.running()

    def stop(self, timeout: float) -> bool:
        """Start nothing more, let short steps end, leave the rest to the journal.

        Returns whether every thread ended in ``timeout`` seconds; one that did not dies with the process, which is
        what every step is made for.
        """
        with self._lock:
            self._stopping = True
            runs = list(self._runs.values())
            self._lock.notify_all()
        for run in runs:
            run.stop()
        deadline = time.monotonic() + timeout
        with self._lock:
            while self._threads:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._lock.wait(left)
        return True
