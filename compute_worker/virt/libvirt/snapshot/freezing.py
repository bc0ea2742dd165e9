"""File systems that the guest itself holds still for a moment, and always lets go again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from compute_worker import errors
from compute_worker.virt.libvirt.guest import Guest

LOG = logging.getLogger(__name__)
_NO_ANSWER = (errors.NotSupported, errors.GuestFailed, errors.HypervisorBusy, errors.Cancelled)


@dataclass(slots=True)
class Frozen:
    """``count`` of file systems; ``reason``: why none, or why not for long enough."""

    count: int = 0
    reason: str = ""
    thawed: bool = True
    _late: threading.Event = field(default_factory=threading.Event)

    def describe(self) -> str:
        """For the operator."""
        if self.reason:
            return f"as after a power failure, as the guest could not hold its file systems still: {self.reason}"
        if self._late.is_set():
            return "as after a power failure, as the guest's file systems had to go on before the moment came"
        return f"{self.count} file systems were held still"


@contextmanager
def frozen(guest: Guest, seconds: float) -> Iterator[Frozen]:
    """Freeze through the guest agent where it answers; thaw at the end, or when ``seconds`` have passed. 0: do nothing.

    If the process dies inside, the guest stays frozen until :func:`thaw`: the caller writes that down before.
    """
    told = Frozen()
    if seconds <= 0:
        told.reason = "libvirt.snapshot_freeze_timeout is 0"
        yield told
        return
    try:
        guest.set_agent_patience(max(1, round(seconds)))
        told.count = guest.fs_freeze()
    except errors.GuestFailed as exc:
        # Its agent lives and refuses; whoever else froze them has to thaw them.
        told.reason = str(exc)
        yield told
        return
    except _NO_ANSWER as exc:
        told.reason = str(exc)
        # An agent that fell silent in the middle may have frozen some.
        told.thawed = _was_never_there(exc) or thaw(guest)
        yield told
        return

    def enough() -> None:
        told._late.set()
        LOG.warning("instance %s: its file systems were frozen for %.0f s: they go on", guest.uuid, seconds)
        thaw(guest)

    told.thawed = False
    timer = threading.Timer(seconds, enough)
    timer.daemon = True
    timer.start()
    try:
        yield told
    finally:
        timer.cancel()
        told.thawed = thaw(guest)


def thaw(guest: Guest) -> bool:
    """Let its file systems go on; whether the agent says that they do. A guest that is not there has none."""
    try:
        guest.fs_thaw()
    except errors.InstanceNotFound:
        return True
    except _NO_ANSWER as exc:
        LOG.warning("instance %s may be frozen, and its agent does not thaw it: %s", guest.uuid, exc)
        return False
    return True


def _was_never_there(exc: errors.ComputeError) -> bool:
    """No agent, no channel: libvirt says so before anything was asked of the guest."""
    text = str(exc)
    return any(said in text for said in ("not connected", "not configured", "not available", "not running"))
