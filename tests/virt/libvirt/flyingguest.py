"""A guest whose hypervisor does what the test says: libvirt's own test driver has no jobs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from compute_worker import errors
from compute_worker.states import PowerState
from compute_worker.virt.driver import JobStatistics
from compute_worker.virt.libvirt.guest_state import GuestState

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
RUNNING = GuestState(PowerState.RUNNING, "running", "booted")
GONE = GuestState(PowerState.SHUTDOWN, "shutoff", "migrated")
STAYED = GuestState(PowerState.RUNNING, "running", "migration_canceled")
BROKEN = GuestState(PowerState.PAUSED, "paused", "postcopy_failed")
ENDED = GuestState(PowerState.SHUTDOWN, "shutoff", "shutdown")
IN_FLIGHT = JobStatistics("unbounded", memory_remaining=1 << 20, memory_processed=1, memory_iteration=1)


class FlyingGuest:
    """``land(state, error)`` ends the flight; ``calls``: what was done to the guest, in order."""

    def __init__(self, xml: str = "<domain/>") -> None:
        self.uuid = UUID
        self.calls: list[str] = []
        self.migrated: tuple[str, Mapping[str, Any], int] | None = None
        self.stats: Sequence[JobStatistics] = [IN_FLIGHT]
        self.now: GuestState | None = RUNNING
        self.flying = False
        self.yankable = True
        self.marks = ["one"]
        self._xml = xml
        self._landed = threading.Event()
        self._error: Exception | None = None

    def take_off(self) -> None:
        """In the air already."""
        self.flying = True

    def land(self, state: GuestState | None, error: Exception | None = None) -> None:
        self.now, self.flying, self._error = state, False, error
        self._landed.set()

    # --- what the driver asks -----------------------------------------------------------------------------------

    def state(self) -> GuestState:
        if self.now is None:
            raise errors.InstanceNotFound(instance=self.uuid, host="node1")
        return self.now

    def power_state(self) -> PowerState:
        return self.now.power if self.now is not None else PowerState.NOSTATE

    def job_operation(self) -> str:
        self.state()
        return "migration_out" if self.flying else ""

    def job_stats(self, *, completed: bool = False) -> JobStatistics:
        self.state()
        if completed:
            return JobStatistics("completed", memory_processed=5 << 20, elapsed=1.0, downtime=0.05)
        if len(self.stats) > 1:
            first, *self.stats = self.stats
            return first
        return self.stats[0] if self.flying else JobStatistics("none")

    def xml(self, **flags: bool) -> str:
        return self._xml

    def checkpoints(self) -> list[str]:
        return self.marks

    def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> bool:
        self.marks = [mark for mark in self.marks if mark != name]
        return True

    def backup_xml(self) -> str | None:
        return None

    # --- what is done to it -------------------------------------------------------------------------------------

    def migrate(self, uri: str, params: Mapping[str, Any], flags: int) -> None:
        self.migrated = (uri, params, flags)
        self.flying = True
        assert self._landed.wait(20)
        if self._error is not None:
            raise self._error

    def abort_job(self) -> bool:
        self.calls.append("abort")
        return True

    def sever_migration(self) -> bool:
        self.calls.append("sever")
        if not self.yankable:
            raise errors.NotSupported(what="yank")
        return True

    def set_max_downtime(self, seconds: float) -> None:
        self.calls.append(f"downtime {seconds}")

    def start_postcopy(self) -> bool:
        self.calls.append("postcopy")
        return True

    def pause(self) -> bool:
        self.calls.append("pause")
        return True

    def resume(self) -> bool:
        self.calls.append("resume")
        self.now = RUNNING
        return True

    def destroy(self) -> bool:
        self.calls.append("destroy")
        return True
