"""Exit codes, and what an operator can do about each error."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from compute_worker import errors
from compute_worker.errors import ComputeError


class Exit(IntEnum):
    """What the exit status of ``compute-workerctl`` says."""

    OK = 0
    FAILED = 1
    """The operation was accepted and did not end well: it was undone, or refused when its turn came."""
    USAGE = 2
    """The command line or the configuration makes no sense; nothing was sent."""
    REFUSED = 3
    """A worker said no; nothing was changed."""
    UNREACHABLE = 4
    """Broker, host or hypervisor does not answer, or ``--timeout`` ran out."""
    NOT_FOUND = 5
    """No such instance, operation or host."""
    INTERRUPTED = 130


MEANING: Mapping[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILED: "the operation failed and was undone",
    Exit.USAGE: "usage or configuration; nothing was sent",
    Exit.REFUSED: "refused by the worker; nothing was changed",
    Exit.UNREACHABLE: "broker, host or hypervisor does not answer, or --timeout ran out",
    Exit.NOT_FOUND: "no such instance, operation or host",
    Exit.INTERRUPTED: "interrupted; what was accepted goes on",
}


class UsageError(Exception):
    """The command line asks for something that cannot be meant."""


class StillRunning(ComputeError):
    """``--timeout`` ran out before the operation's end; it goes on."""

    template = "operation {operation} is still {state} ({phase}) after {seconds:.0f} s; it goes on"


class NobodyAnswers(ComputeError):
    """No host answered ``announce``."""

    template = "no host answered within {seconds:g} s"


def code_of(error: BaseException) -> Exit:
    """The exit status that goes with an error."""
    match error:
        case UsageError():
            return Exit.USAGE
        case errors.MessageUndeliverable() | errors.Retryable() | StillRunning() | NobodyAnswers():
            return Exit.UNREACHABLE
        case errors.NotFound():
            return Exit.NOT_FOUND
        case errors.Refused():
            return Exit.REFUSED
        case _:
            return Exit.FAILED


# By class, the nearest one in the tree; {names} are the error's own details, and {program} this program.
_ADVICE: Mapping[type[BaseException], str] = {
    errors.InstanceNotFound: "see `{program} list`",
    errors.OperationNotFound: "see `{program} operations`; ended ones are forgotten after some days",
    errors.InstanceBusy: "wait for it: `{program} explain {operation}`; or end it: `{program} cancel {operation}`",
    errors.InstanceExists: "choose another --uuid, or see `{program} show {instance}`",
    errors.InstanceDeleted: "boot it again under a new uuid",
    errors.OperationConflict: "choose another --operation uuid",
    errors.OperationRefusedBefore: "choose another --operation uuid",
    errors.CommandExpired: "compare the clocks: `{program} hosts` shows how far each host's is off",
    errors.InsufficientResources: "see `{program} hosts` for one with more room, or leave --host out",
    errors.HostDisabled: "choose another host, or `{program} enable {host}`",
    errors.HostFull: "try again in {retry_after:.0f} s, or choose another host",
    errors.MessageUndeliverable: "see `{program} hosts` for the hosts that answer",
    errors.PeerUnavailable: "is the broker reachable, and does compute-worker run there? (`{program} hosts`)",
    errors.HypervisorUnavailable: "the worker lives and its hypervisor does not: look at libvirtd on that host",
    errors.MigrationNotFinished: "see `{program} migrations --all`",
    errors.MigrationNotFound: "see `{program} migrations --all`",
    errors.InvalidState: "see `{program} show {instance}`",
    errors.ImageNotFound: "is it in the store that [images] store names on that host?",
    errors.ImageUnacceptable: "say what the image really is with --disk-format, or use another image",
    errors.FlavorDiskTooSmall: "give a larger root disk in --flavor",
    errors.DiskFull: "free some space on that host, or choose another one",
    errors.VifPlugTimeout: "nobody sent `{program} event INSTANCE network-vif-plugged --tag {vif}`",
    StillRunning: "see `{program} explain {operation}`, or end it by `{program} cancel {operation}`",
    NobodyAnswers: "does any compute-worker run, and is this its broker and virtual host? --discover waits longer",
}


def advice(error: BaseException, program: str = "compute-workerctl") -> str | None:
    """What to do about ``error``, in one line; ``None`` where only its message helps."""
    for cls in type(error).__mro__:
        text = _ADVICE.get(cls)
        if text is None:
            continue
        details = {"program": program, "retry_after": getattr(error, "retry_after", None) or 5.0}
        details |= getattr(error, "kwargs", {})
        try:
            return text.format(**details)
        except (KeyError, IndexError, ValueError):
            continue
    return None
