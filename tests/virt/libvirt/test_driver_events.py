"""libvirt's events in the driver's words."""

from __future__ import annotations

import pytest

from compute_worker.virt.driver import EventKind
from compute_worker.virt.libvirt.driver_events import translate
from compute_worker.virt.libvirt.events import (
    AgentEvent,
    BlockJobEvent,
    ConnectionLost,
    ConnectionRestored,
    Event,
    IOErrorEvent,
    JobCompletedEvent,
    Lifecycle,
    LifecycleEvent,
    RebootEvent,
)

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"


@pytest.mark.parametrize(
    ("kind", "reason", "told"),
    [
        (Lifecycle.STARTED, "booted", EventKind.STARTED),
        (Lifecycle.STARTED, "restored", EventKind.STARTED),
        (Lifecycle.STARTED, "migrated", None),
        (Lifecycle.RESUMED, "unpaused", EventKind.RESUMED),
        (Lifecycle.RESUMED, "migrated", EventKind.MIGRATED_IN),
        (Lifecycle.RESUMED, "postcopy", EventKind.MIGRATED_IN),
        (Lifecycle.SUSPENDED, "paused", EventKind.PAUSED),
        (Lifecycle.SUSPENDED, "ioerror", EventKind.IO_ERROR),
        (Lifecycle.SUSPENDED, "postcopy", EventKind.POSTCOPY),
        (Lifecycle.SUSPENDED, "postcopy_failed", EventKind.POSTCOPY_FAILED),
        (Lifecycle.STOPPED, "shutdown", EventKind.STOPPED),
        (Lifecycle.STOPPED, "destroyed", EventKind.STOPPED),
        (Lifecycle.STOPPED, "failed", EventKind.CRASHED),
        (Lifecycle.STOPPED, "crashed", EventKind.CRASHED),
        (Lifecycle.STOPPED, "saved", EventKind.SUSPENDED),
        (Lifecycle.STOPPED, "migrated", EventKind.MIGRATED_OUT),
        (Lifecycle.CRASHED, "panicked", EventKind.CRASHED),
        (Lifecycle.PMSUSPENDED, "memory", EventKind.PAUSED),
        (Lifecycle.DEFINED, "added", None),
        (Lifecycle.UNDEFINED, "removed", None),
        (Lifecycle.SHUTDOWN, "finished", None),
    ],
)
def test_lifecycle(kind: Lifecycle, reason: str, told: EventKind | None) -> None:
    event = translate(LifecycleEvent(uuid=UUID, kind=kind, reason=reason, time=7.0))
    assert (event.kind if event else None) == told
    if event:
        assert (event.uuid, event.time, event.detail) == (UUID, 7.0, reason)


@pytest.mark.parametrize(
    ("event", "kind", "detail"),
    [
        (ConnectionRestored(generation=2), EventKind.CONNECTED, ""),
        (ConnectionLost(reason="eof"), EventKind.DISCONNECTED, "eof"),
        (IOErrorEvent(uuid=UUID, path="/d", alias="v", action="pause", reason="enospc"), EventKind.IO_ERROR,
         "enospc pause /d"),
        (JobCompletedEvent(uuid=UUID, operation="save", success=False), EventKind.JOB_COMPLETED, "save failed"),
        (BlockJobEvent(uuid=UUID, device="vda", job="copy", status="ready"), EventKind.JOB_COMPLETED,
         "copy vda ready"),
    ],
)  # fmt: skip
def test_others(event: Event, kind: EventKind, detail: str) -> None:
    told = translate(event)
    assert told is not None and (told.kind, told.detail) == (kind, detail)


@pytest.mark.parametrize("event", [RebootEvent(uuid=UUID), AgentEvent(uuid=UUID, connected=True, reason="channel")])
def test_what_the_manager_does_not_need(event: Event) -> None:
    assert translate(event) is None
