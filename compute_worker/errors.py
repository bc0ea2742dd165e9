"""What can go wrong, as one tree with three axes.

::

    ComputeError
    |-- Refused                      nothing was changed; the command is not accepted
    |   |-- InvalidCommand           a field is missing, unknown, mistyped or out of bounds
    |   |   |-- UnknownMethod
    |   |   |-- InvalidBDMFormat     a file system format nobody can make
    |   |   `-- MessageTooLarge
    |   |-- NotFound
    |   |   |-- InstanceNotFound     never heard of it
    |   |   |-- InstanceMoved        it was here; ``host`` says where it went
    |   |   |-- OperationNotFound
    |   |   `-- MigrationNotFound
    |   |-- InstanceBusy             another operation holds it; ``retry_after`` seconds
    |   |-- InstanceExists
    |   |-- InstanceDeleted          the uuid is tombstoned: a delete wins
    |   |-- InvalidState             not in this vm, task or power state
    |   |-- NotOwner                 this host does not own the instance
    |   |-- OperationConflict        same key, other arguments
    |   |-- OperationRefusedBefore   the key is tombstoned: it was cancelled or undone
    |   |-- CommandExpired
    |   |-- MigrationNotFinished     the other decision was first; ``status``
    |   |-- NotSupported
    |   |-- MessageUndeliverable     no such host is listening (raised at the client)
    |   `-- Unschedulable            another host may take it: ``reschedulable`` is true
    |       |-- InsufficientResources
    |       |-- HostDisabled
    |       `-- HostFull             an admission limit; ``retry_after`` seconds
    |-- Retryable                    may go away by itself: the step is tried again
    |   |-- HypervisorUnavailable
    |   |-- PeerUnavailable
    |   |-- ImageStoreUnavailable
    |   |   `-- ImageImporting       it has all bytes and takes them in
    |   |-- HypervisorBusy
    |   `-- StoreBusy
    |-- Broken                       will not go away: before COMMIT the operation is undone
    |   |-- ImageUnacceptable        bytes are not what they claim, or are dangerous
    |   |   |-- ImageNotFound
    |   |   |-- ImageChecksumMismatch
    |   |   `-- FlavorDiskTooSmall
    |   |-- DestinationDiskExists
    |   |-- DiskFull
    |   |-- CommandFailed            a child process; its exit status and last line
    |   |-- GuestFailed              the hypervisor refuses to define or run the guest
    |   |-- VifPlugTimeout
    |   |-- MigrationFailed
    |   `-- DeadlineExceeded
    `-- Cancelled                    asked for; the operation is undone

Every error travels: :mod:`oslo_messaging` rebuilds it at the caller from its class name, message and keyword
arguments (``allowed_remote_exmods=["compute_worker.errors"]``). Messages are for operators and carry no secret.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ComputeError(Exception):
    """Base of all. ``template`` is filled with the keyword arguments, which stay readable as attributes.

    :param message: the whole sentence; where it is absent, the template says it.
    :param reschedulable: another host may succeed with the same command.
    :param retry_after: seconds after which the same command may succeed here, else ``None``.
    """

    template: ClassVar[str] = "compute operation failed"
    reschedulable: bool = False
    retry_after: float | None = None

    def __init__(self, message: str | None = None, **kwargs: Any) -> None:
        self.kwargs = kwargs
        for name in kwargs.keys() - _RESERVED:
            setattr(self, name, kwargs[name])
        self.message = message if message is not None else self._fill(kwargs)
        super().__init__(self.message)

    def _fill(self, kwargs: dict[str, Any]) -> str:
        try:
            return self.template.format(**kwargs)
        except (KeyError, IndexError):
            return f"{self.template} ({kwargs})" if kwargs else self.template

    def to_dict(self) -> dict[str, Any]:
        """The error as journalled and as sent in notifications: class, message, details, two hints."""
        return {
            "class": type(self).__name__,
            "message": self.message,
            "details": {k: v for k, v in self.kwargs.items() if isinstance(v, str | int | float | bool)},
            "reschedulable": self.reschedulable,
            "retry_after": self.retry_after,
        }


_RESERVED = frozenset({*dir(Exception), "message", "kwargs", "template", "to_dict", "_fill"})
"""What a detail cannot replace: details come from other hosts."""


class Refused(ComputeError):
    """Nothing was changed."""

    template = "command refused"


class Retryable(ComputeError):
    """The step is tried again with backoff; before COMMIT at most ``step_attempts`` times."""

    template = "not possible right now"
    reschedulable = True
    patient: ClassVar[bool] = False
    """Whether waiting is the only thing to do (something is down): tried again without counting."""


class Broken(ComputeError):
    """Trying again would fail again. Before COMMIT the operation is undone."""

    template = "operation failed"


class Cancelled(ComputeError):
    """Somebody asked for it: ``cancel_operation`` or a delete."""

    template = "operation was cancelled"


class InvalidCommand(Refused):
    template = "{method}: {problem}"


class UnknownMethod(InvalidCommand):
    template = "no method {method!r}"


class InvalidBDMFormat(InvalidCommand):
    template = "file system format {fmt!r} is not supported"


class MessageTooLarge(InvalidCommand):
    template = "message of {size} bytes is larger than {limit}"


class NotFound(Refused):
    template = "not found"


class InstanceNotFound(NotFound):
    template = "instance {instance} is not known on host {host}"


class InstanceMoved(NotFound):
    template = "instance {instance} has moved to host {host}: ask there"


class OperationNotFound(NotFound):
    template = "operation {operation} is not known on this host"


class MigrationNotFound(NotFound):
    template = "migration {migration} is not known on this host"


class InstanceBusy(Refused):
    template = "instance {instance} is busy: operation {operation} ({kind}, {phase}); try again later"
    retry_after = 5.0


class InstanceExists(Refused):
    template = "instance {instance} exists on this host already"


class InstanceDeleted(Refused):
    template = "instance {instance} was deleted; its uuid is never used again"


class InvalidState(Refused):
    template = "instance {instance}: {command} is not possible in {attribute} {state!r}"


class NotOwner(Refused):
    template = "instance {instance} is owned by host {host}: send the command there"


class OperationConflict(Refused):
    template = "operation key {key} was used before with other arguments (operation {operation})"


class OperationRefusedBefore(Refused):
    template = "operation {operation} was {outcome} before it could begin; use a new operation uuid"


class CommandExpired(Refused):
    template = "the command expired {seconds:.0f} s ago: send it again with a new expires_at"


class MigrationNotFinished(Refused):
    template = "migration {migration} is {status}: it was decided already"


class NotSupported(Refused):
    template = "{what} is not supported by this host"


class MessageUndeliverable(Refused):
    template = "no worker listens as {host}: is its name right, and has it ever been started?"
    reschedulable = True


class Unschedulable(Refused):
    template = "host cannot take it"
    reschedulable = True


class InsufficientResources(Unschedulable):
    template = "host {host} has not enough {resource}: {requested} asked for, {free} free"


class HostDisabled(Unschedulable):
    template = "host {host} is disabled ({reason}): it takes no new instances"


class HostFull(Unschedulable):
    template = "host {host} runs {running} operations of {limit} ({queued} wait); try again later"
    retry_after = 5.0


class HypervisorUnavailable(Retryable):
    template = "the hypervisor does not answer: {reason}"
    patient = True


class HypervisorBusy(Retryable):
    template = "the hypervisor is busy: {reason}"


class PeerUnavailable(Retryable):
    template = "host {host} does not answer"
    patient = True


class ImageStoreUnavailable(Retryable):
    template = "image store {store} does not answer: {reason}"


class ImageImporting(ImageStoreUnavailable):
    template = "image {image} is still being taken in by store {store}"
    patient = True


class StoreBusy(Retryable):
    template = "the journal is busy"


class ImageUnacceptable(Broken):
    template = "image {image} is not acceptable: {reason}"


class ImageNotFound(ImageUnacceptable):
    template = "image {image} is not in store {store}"


class ImageChecksumMismatch(ImageUnacceptable):
    template = "image {image}: {algorithm} is {actual}, expected {expected}"


class FlavorDiskTooSmall(ImageUnacceptable):
    template = "image {image} needs {needed} bytes of root disk, the flavor gives {given}"


class DestinationDiskExists(Broken):
    template = "instance {instance}: {path} is there already and is not ours to overwrite"


class DiskFull(Broken):
    template = "no space left on {path}"
    reschedulable = True


class CommandFailed(Broken):
    template = "{command} failed with status {status}: {stderr}"


class GuestFailed(Broken):
    template = "instance {instance}: {reason}"


class VifPlugTimeout(Broken):
    template = "instance {instance}: no plug event for vif {vif} in {seconds} s"
    reschedulable = True


class MigrationFailed(Broken):
    template = "migration {migration} failed: {reason}"


class DeadlineExceeded(Broken):
    template = "{what} did not end in {seconds} s"


def from_dict(data: dict[str, Any]) -> ComputeError:
    """The error that :meth:`ComputeError.to_dict` wrote; an unknown class comes back as :class:`ComputeError`, with
    the hints it had."""
    cls = globals().get(data.get("class", ""), ComputeError)
    if not (isinstance(cls, type) and issubclass(cls, ComputeError)):
        cls = ComputeError
    error = cls(data.get("message"), **data.get("details", {}))
    error.reschedulable = bool(data.get("reschedulable", error.reschedulable))
    error.retry_after = data.get("retry_after", error.retry_after)
    return error
