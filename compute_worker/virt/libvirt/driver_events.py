"""libvirt's events as the driver's: one table."""

from __future__ import annotations

from collections.abc import Mapping

from compute_worker.virt.driver import DriverEvent, EventKind
from compute_worker.virt.libvirt.events import (
    BlockJobEvent,
    ConnectionLost,
    ConnectionRestored,
    Event,
    IOErrorEvent,
    JobCompletedEvent,
    Lifecycle,
    LifecycleEvent,
)

STAYED = "migration_canceled"
"""libvirt's reason of a guest that runs on where it was after a migration did not come about. The event is the same as
of one that came (``RESUMED``, ``migrated``): only the guest's state tells them apart."""
_ANY = ""
_LIFECYCLE: Mapping[tuple[Lifecycle, str], EventKind] = {
    (Lifecycle.STARTED, _ANY): EventKind.STARTED,
    (Lifecycle.SUSPENDED, _ANY): EventKind.PAUSED,
    (Lifecycle.SUSPENDED, "ioerror"): EventKind.IO_ERROR,
    (Lifecycle.SUSPENDED, "postcopy"): EventKind.POSTCOPY,
    (Lifecycle.SUSPENDED, "postcopy_failed"): EventKind.POSTCOPY_FAILED,
    (Lifecycle.RESUMED, _ANY): EventKind.RESUMED,
    (Lifecycle.RESUMED, "migrated"): EventKind.MIGRATED_IN,
    (Lifecycle.RESUMED, "postcopy"): EventKind.MIGRATED_IN,
    (Lifecycle.RESUMED, "postcopy_failed"): EventKind.POSTCOPY_FAILED,
    (Lifecycle.STOPPED, _ANY): EventKind.STOPPED,
    (Lifecycle.STOPPED, "crashed"): EventKind.CRASHED,
    # QEMU's process went away and nobody had asked for it.
    (Lifecycle.STOPPED, "failed"): EventKind.CRASHED,
    (Lifecycle.STOPPED, "saved"): EventKind.SUSPENDED,
    (Lifecycle.STOPPED, "migrated"): EventKind.MIGRATED_OUT,
    (Lifecycle.PMSUSPENDED, _ANY): EventKind.PAUSED,
    (Lifecycle.CRASHED, _ANY): EventKind.CRASHED,
}
"""By kind and libvirt's reason; ``_ANY``: every other reason."""
_IGNORED = frozenset({(Lifecycle.STARTED, "migrated")})
"""A guest that arrives does not run yet."""


def translate(event: Event) -> DriverEvent | None:
    """What the manager is told; ``None``: nothing."""
    if isinstance(event, ConnectionRestored):
        return DriverEvent(EventKind.CONNECTED, "", event.time)
    if isinstance(event, ConnectionLost):
        return DriverEvent(EventKind.DISCONNECTED, "", event.time, event.reason)
    if isinstance(event, LifecycleEvent):
        return _lifecycle(event)
    if isinstance(event, IOErrorEvent):
        detail = " ".join(filter(None, (event.reason, event.action, event.path)))
        return DriverEvent(EventKind.IO_ERROR, event.uuid, event.time, detail)
    if isinstance(event, JobCompletedEvent):
        outcome = "completed" if event.success else "failed"
        return DriverEvent(EventKind.JOB_COMPLETED, event.uuid, event.time, f"{event.operation} {outcome}")
    if isinstance(event, BlockJobEvent):
        detail = f"{event.job} {event.device} {event.status}"
        return DriverEvent(EventKind.JOB_COMPLETED, event.uuid, event.time, detail)
    return None


def _lifecycle(event: LifecycleEvent) -> DriverEvent | None:
    key = (event.kind, event.reason)
    kind = None if key in _IGNORED else _LIFECYCLE.get(key, _LIFECYCLE.get((event.kind, _ANY)))
    return None if kind is None else DriverEvent(kind, event.uuid, event.time, event.reason)
