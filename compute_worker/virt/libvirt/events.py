"""What libvirt tells by itself, as small frozen objects.

Words for numbers are read off the binding's own constants, so a newer libvirt's reasons have their names too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import libvirt


def words(prefix: str) -> Mapping[int, str]:
    """``{number: word}`` of the binding's constants that begin with ``prefix``; words in lower case."""
    found = {}
    for name in dir(libvirt):
        value = getattr(libvirt, name)
        if name.startswith(prefix) and isinstance(value, int):
            found[value] = name.removeprefix(prefix).lower()
    return found


class Lifecycle(StrEnum):
    """What became of a guest. ``SHUTDOWN`` is not its end: ``STOPPED`` is."""

    DEFINED = "defined"
    UNDEFINED = "undefined"
    STARTED = "started"
    SUSPENDED = "suspended"
    RESUMED = "resumed"
    STOPPED = "stopped"
    SHUTDOWN = "shutdown"
    PMSUSPENDED = "pmsuspended"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all. ``time``: seconds since the epoch, when it was received."""

    time: float = field(default_factory=time.time, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionRestored(Event):
    """libvirt answers, for the ``generation``-th time: compare everything, events may have been missed."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLost(Event):
    """libvirt does not answer any more: ``error``, ``eof``, ``keepalive`` or ``client``."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainEvent(Event):
    """Base of what happened to one guest."""

    uuid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleEvent(DomainEvent):
    """The guest was defined, started, stopped, ... and why (``booted``, ``migrated``, ``crashed``, ...)."""

    kind: Lifecycle
    reason: str

    @property
    def died(self) -> bool:
        """Whether its process ended by itself without shutting down: killed from outside, libvirt says ``failed``."""
        return self.kind is Lifecycle.STOPPED and self.reason in ("failed", "crashed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RebootEvent(DomainEvent):
    """The guest rebooted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCompletedEvent(DomainEvent):
    """A migration, save, backup or dump ended; ``statistics`` in libvirt's words (bytes, milliseconds)."""

    operation: str
    success: bool
    statistics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJobEvent(DomainEvent):
    """A block job on ``device`` (its target, as ``vda``) is ``completed``, ``failed``, ``canceled`` or ``ready``."""

    device: str
    job: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IOErrorEvent(DomainEvent):
    """A disk failed; ``action`` is what libvirt did (``pause``), ``reason`` the device's word (``enospc``) or empty."""

    path: str
    alias: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEvent(DomainEvent):
    """The guest agent came or went."""

    connected: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationIterationEvent(DomainEvent):
    """A migration began to copy memory for the ``iteration``-th time."""

    iteration: int


_LIFECYCLE_WORDS = {
    getattr(libvirt, f"VIR_DOMAIN_EVENT_{kind.name}"): (kind, words(f"VIR_DOMAIN_EVENT_{kind.name}_"))
    for kind in Lifecycle
    if kind is not Lifecycle.UNKNOWN
}
_IO_ACTIONS = words("VIR_DOMAIN_EVENT_IO_ERROR_")
_BLOCK_TYPES = words("VIR_DOMAIN_BLOCK_JOB_TYPE_")
_BLOCK_STATUS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_COMPLETED: "completed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED: "failed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_CANCELED: "canceled",
    libvirt.VIR_DOMAIN_BLOCK_JOB_READY: "ready",
}
_AGENT_REASONS = words("VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_REASON_")
_CLOSE_REASONS = words("VIR_CONNECT_CLOSE_REASON_")
JOB_OPERATIONS = words("VIR_DOMAIN_JOB_OPERATION_")


def word(table: Mapping[int, str], number: int) -> str:
    """The word, or the number itself where this binding has none."""
    return table.get(number, str(number))


def close_reason(number: int) -> str:
    """Why a connection closed."""
    return word(_CLOSE_REASONS, number)


def _lifecycle(uuid: str, event: int, detail: int) -> Event:
    kind, reasons = _LIFECYCLE_WORDS.get(event, (Lifecycle.UNKNOWN, {}))
    return LifecycleEvent(uuid=uuid, kind=kind, reason=word(reasons, detail))


def _reboot(uuid: str) -> Event:
    return RebootEvent(uuid=uuid)


def _io_error(uuid: str, path: str, alias: str, action: int, reason: str) -> Event:
    return IOErrorEvent(uuid=uuid, path=path or "", alias=alias or "", action=word(_IO_ACTIONS, action), reason=reason)


def _block_job(uuid: str, device: str, job: int, status: int) -> Event:
    return BlockJobEvent(uuid=uuid, device=device, job=word(_BLOCK_TYPES, job), status=word(_BLOCK_STATUS, status))


def _agent(uuid: str, state: int, reason: int) -> Event:
    connected = state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
    return AgentEvent(uuid=uuid, connected=connected, reason=word(_AGENT_REASONS, reason))


def _iteration(uuid: str, iteration: int) -> Event:
    return MigrationIterationEvent(uuid=uuid, iteration=iteration)


def _job_completed(uuid: str, params: Mapping[str, Any]) -> Event:
    stats = dict(params)
    operation = word(JOB_OPERATIONS, int(stats.pop(libvirt.VIR_DOMAIN_JOB_OPERATION, 0)))
    # Without the field the job succeeded: only newer jobs that can fail report it.
    success = bool(stats.pop(libvirt.VIR_DOMAIN_JOB_SUCCESS, True))
    return JobCompletedEvent(uuid=uuid, operation=operation, success=success, statistics=stats)


BUILDERS: Mapping[int, Callable[..., Event]] = {
    libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: _lifecycle,
    libvirt.VIR_DOMAIN_EVENT_ID_REBOOT: _reboot,
    libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON: _io_error,
    libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2: _block_job,
    libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: _agent,
    libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION: _iteration,
    libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: _job_completed,
}
"""Every event we ask for, and how libvirt's arguments behind the domain become an object."""
