"""The states of instances, migrations and operations, and which command may come in which of them.

Names are nova's. The tables are data: :func:`allowed` is the only reader of ``COMMANDS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class VmState(StrEnum):
    """What an instance is when nothing is being done to it."""

    BUILDING = "building"
    ACTIVE = "active"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    RESIZED = "resized"
    ERROR = "error"
    DELETED = "deleted"


class TaskState(StrEnum):
    """What is being done to an instance; ``None`` in the record when nothing is."""

    SPAWNING = "spawning"
    DELETING = "deleting"
    POWERING_ON = "powering-on"
    POWERING_OFF = "powering-off"
    REBOOTING = "rebooting"
    REBOOTING_HARD = "rebooting_hard"
    PAUSING = "pausing"
    UNPAUSING = "unpausing"
    SUSPENDING = "suspending"
    RESUMING = "resuming"
    RESIZE_PREP = "resize_prep"
    RESIZE_MIGRATING = "resize_migrating"
    RESIZE_MIGRATED = "resize_migrated"
    RESIZE_FINISH = "resize_finish"
    RESIZE_CONFIRMING = "resize_confirming"
    RESIZE_REVERTING = "resize_reverting"
    MIGRATING = "migrating"
    IMAGE_SNAPSHOT = "image_snapshot"
    IMAGE_BACKUP = "image_backup"
    IMAGE_PENDING_UPLOAD = "image_pending_upload"
    IMAGE_UPLOADING = "image_uploading"


class PowerState(StrEnum):
    """What the hypervisor says of the guest. ``NOSTATE``: it has no such guest."""

    NOSTATE = "nostate"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    CRASHED = "crashed"
    SUSPENDED = "suspended"


class MigrationStatus(StrEnum):
    """A cold move's life, then a live one's."""

    PRE_MIGRATING = "pre-migrating"
    MIGRATING = "migrating"
    POST_MIGRATING = "post-migrating"
    FINISHED = "finished"
    CONFIRMING = "confirming"
    CONFIRMED = "confirmed"
    REVERTING = "reverting"
    REVERTED = "reverted"
    ERROR = "error"
    QUEUED = "queued"
    PREPARING = "preparing"
    RUNNING = "running"
    RUNNING_POSTCOPY = "running (post-copy)"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class OperationState(StrEnum):
    """queued -> running -> (done | undoing -> undone); ``refused`` never began."""

    QUEUED = "queued"
    RUNNING = "running"
    UNDOING = "undoing"
    DONE = "done"
    UNDONE = "undone"
    REFUSED = "refused"

    @property
    def final(self) -> bool:
        """Whether nothing more will happen."""
        return self in (OperationState.DONE, OperationState.UNDONE, OperationState.REFUSED)


@dataclass(frozen=True, slots=True)
class Command:
    """When a command may come, and what the instance says meanwhile.

    ``settled_in``: the vm state in which the command has nothing to do and is accepted as done.
    """

    vm_states: frozenset[VmState]
    task_state: TaskState
    settled_in: VmState | None = None


def _in(*states: VmState) -> frozenset[VmState]:
    return frozenset(states)


_V = VmState
_T = TaskState
_ANY = frozenset(VmState) - {VmState.DELETED}

COMMANDS: Mapping[str, Command] = {
    "terminate_instance": Command(_ANY, _T.DELETING),
    "start_instance": Command(_in(_V.STOPPED, _V.ERROR, _V.ACTIVE), _T.POWERING_ON, settled_in=_V.ACTIVE),
    "stop_instance": Command(
        _in(_V.ACTIVE, _V.PAUSED, _V.ERROR, _V.STOPPED), _T.POWERING_OFF, settled_in=_V.STOPPED
    ),
    "reboot_instance": Command(_in(_V.ACTIVE, _V.PAUSED), _T.REBOOTING),
    "reboot_instance_hard": Command(
        _in(_V.ACTIVE, _V.PAUSED, _V.SUSPENDED, _V.STOPPED, _V.ERROR), _T.REBOOTING_HARD
    ),
    "pause_instance": Command(_in(_V.ACTIVE, _V.PAUSED), _T.PAUSING, settled_in=_V.PAUSED),
    "unpause_instance": Command(_in(_V.PAUSED, _V.ACTIVE), _T.UNPAUSING, settled_in=_V.ACTIVE),
    "suspend_instance": Command(_in(_V.ACTIVE, _V.SUSPENDED), _T.SUSPENDING, settled_in=_V.SUSPENDED),
    "resume_instance": Command(_in(_V.SUSPENDED, _V.ACTIVE), _T.RESUMING, settled_in=_V.ACTIVE),
    "resize_instance": Command(_in(_V.ACTIVE, _V.STOPPED, _V.PAUSED), _T.RESIZE_MIGRATING),
    "confirm_resize": Command(_in(_V.RESIZED), _T.RESIZE_CONFIRMING),
    "revert_resize": Command(_in(_V.RESIZED), _T.RESIZE_REVERTING),
    "live_migration": Command(_in(_V.ACTIVE, _V.PAUSED), _T.MIGRATING),
    "snapshot_instance": Command(_in(_V.ACTIVE, _V.STOPPED, _V.PAUSED, _V.SUSPENDED), _T.IMAGE_SNAPSHOT),
    "backup_instance": Command(_in(_V.ACTIVE, _V.STOPPED, _V.PAUSED, _V.SUSPENDED), _T.IMAGE_BACKUP),
}


def allowed(command: str, vm_state: VmState) -> tuple[bool, str]:
    """Whether ``command`` may come in ``vm_state``, and the reason in words."""
    rule = COMMANDS[command]
    if vm_state in rule.vm_states:
        return True, f"{command} may come in {vm_state}"
    wanted = ", ".join(sorted(rule.vm_states))
    return False, f"{command} needs vm_state {wanted}; it is {vm_state}"


def settled(command: str, vm_state: VmState, power_state: PowerState) -> bool:
    """Whether the wish is already true on the record *and* at the hypervisor, so that nothing is to do."""
    rule = COMMANDS[command]
    return rule.settled_in is not None and vm_state is rule.settled_in and power_state is EXPECTED_POWER[vm_state]


EXPECTED_POWER: Mapping[VmState, PowerState] = {
    VmState.ACTIVE: PowerState.RUNNING,
    VmState.PAUSED: PowerState.PAUSED,
    VmState.SUSPENDED: PowerState.SUSPENDED,
    VmState.STOPPED: PowerState.SHUTDOWN,
}
"""The power state that goes with a settled vm state; the others go with any."""


def observed(vm_state: VmState, power: PowerState) -> tuple[VmState, str]:
    """What the record becomes when the hypervisor says ``power`` outside any operation, and why.

    Changes records, never guests. A guest whose process died is ``ERROR`` (crashed); one that shut itself down is
    ``STOPPED``; one somebody paused or resumed by hand follows.
    """
    if vm_state not in EXPECTED_POWER:
        return vm_state, f"{vm_state} does not follow the hypervisor"
    if EXPECTED_POWER[vm_state] is power:
        return vm_state, "as recorded"
    if power in (PowerState.CRASHED, PowerState.NOSTATE):
        return VmState.ERROR, "the guest crashed" if power is PowerState.CRASHED else "the guest is gone"
    for state, expected in EXPECTED_POWER.items():
        if expected is power:
            return state, f"the hypervisor says {power}"
    return vm_state, f"{power} says nothing"


def ran_before(vm_state: VmState, power: PowerState) -> bool:
    """Whether a guest that moves is started where it arrives: it ran, or was paused, when the move began.

    ``power`` decides where the vm state does not say it (``RESIZED`` in a revert).
    """
    if vm_state is VmState.RESIZED:
        return power in (PowerState.RUNNING, PowerState.PAUSED)
    return vm_state in (VmState.ACTIVE, VmState.PAUSED)
