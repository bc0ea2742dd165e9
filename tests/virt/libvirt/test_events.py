"""libvirt's events as objects."""

import dataclasses
import inspect

import libvirt
import pytest

from compute_worker.virt.libvirt import events
from compute_worker.virt.libvirt.events import BUILDERS, Lifecycle, LifecycleEvent


@pytest.mark.parametrize(
    ("event", "detail", "kind", "reason"),
    [
        (libvirt.VIR_DOMAIN_EVENT_DEFINED, 0, Lifecycle.DEFINED, "added"),
        (libvirt.VIR_DOMAIN_EVENT_STARTED, 1, Lifecycle.STARTED, "migrated"),
        (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, 2, Lifecycle.SUSPENDED, "ioerror"),
        (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, 7, Lifecycle.SUSPENDED, "postcopy"),
        (libvirt.VIR_DOMAIN_EVENT_RESUMED, 1, Lifecycle.RESUMED, "migrated"),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, 2, Lifecycle.STOPPED, "crashed"),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, 3, Lifecycle.STOPPED, "migrated"),
        (libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, 1, Lifecycle.SHUTDOWN, "guest"),
        (libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED, 0, Lifecycle.PMSUSPENDED, "memory"),
        (libvirt.VIR_DOMAIN_EVENT_CRASHED, 0, Lifecycle.CRASHED, "panicked"),
        (libvirt.VIR_DOMAIN_EVENT_STOPPED, 99, Lifecycle.STOPPED, "99"),
        (99, 5, Lifecycle.UNKNOWN, "5"),
    ],
)
def test_lifecycle_in_words(event, detail, kind, reason):
    built = BUILDERS[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE]("u", event, detail)
    assert built == LifecycleEvent(uuid="u", kind=kind, reason=reason)


@pytest.mark.parametrize(
    ("kind", "reason", "died"),
    [
        (Lifecycle.STOPPED, "failed", True),
        (Lifecycle.STOPPED, "crashed", True),
        (Lifecycle.STOPPED, "shutdown", False),
        (Lifecycle.STOPPED, "destroyed", False),
        (Lifecycle.CRASHED, "panicked", False),
    ],
)
def test_a_process_that_died_is_told_from_one_that_was_ended(kind, reason, died):
    assert LifecycleEvent(uuid="u", kind=kind, reason=reason).died is died


@pytest.mark.parametrize(
    ("event_id", "args", "expected"),
    [
        (libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, (), events.RebootEvent(uuid="u")),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, ("/i/disk", "virtio-disk0", 1, "enospc"),
            events.IOErrorEvent(uuid="u", path="/i/disk", alias="virtio-disk0", action="pause", reason="enospc"),
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, ("vda", 4, 3),
            events.BlockJobEvent(uuid="u", device="vda", job="active_commit", status="ready"),
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, ("vda", 2, 0),
            events.BlockJobEvent(uuid="u", device="vda", job="copy", status="completed"),
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, (1, 2),
            events.AgentEvent(uuid="u", connected=True, reason="channel"),
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, (2, 1),
            events.AgentEvent(uuid="u", connected=False, reason="domain_started"),
        ),
        (libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, (3,), events.MigrationIterationEvent(uuid="u", iteration=3)),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, ({"operation": 5, "success": False, "time_elapsed": 12},),
            events.JobCompletedEvent(
                uuid="u", operation="migration_out", success=False, statistics={"time_elapsed": 12}
            ),
        ),
        (
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, ({"operation": 2},),
            events.JobCompletedEvent(uuid="u", operation="save", success=True, statistics={}),
        ),
    ],
)  # fmt: skip
def test_other_events_in_words(event_id, args, expected):
    assert BUILDERS[event_id]("u", *args) == expected


def test_every_builder_takes_what_the_binding_gives():
    """The binding calls back with (connection, domain, ..., opaque): as many as ours, with uuid for the first two."""
    dispatchers = {
        libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: "Lifecycle",
        libvirt.VIR_DOMAIN_EVENT_ID_REBOOT: "Generic",
        libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON: "IOErrorReason",
        libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2: "BlockJob",
        libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: "AgentLifecycle",
        libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION: "MigrationIteration",
        libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: "JobCompleted",
    }
    assert set(dispatchers) == set(BUILDERS)
    for event_id, name in dispatchers.items():
        dispatch = getattr(libvirt.virConnect, f"_dispatchDomainEvent{name}Callback")
        given = len(inspect.signature(dispatch).parameters) - 3  # self, domain, cbData
        assert len(inspect.signature(BUILDERS[event_id]).parameters) == given + 1


def test_events_are_frozen_and_timed():
    event = events.RebootEvent(uuid="u")
    assert event.time > 1_000_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.uuid = "other"


def test_words_are_the_bindings_constants():
    assert events.words("VIR_DOMAIN_EVENT_STOPPED_")[libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED] == "migrated"
    assert events.close_reason(libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE) == "keepalive"
