"""What a worker does when it starts, and now and then: compare what the journal says with what the hypervisor says.

The decisions are pure (:func:`decide_guest`, :func:`decide_stranger`); :class:`Recovery` carries them out. Open
operations are not decided here: they go on by themselves, and their instances are left to them.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from compute_worker import errors
from compute_worker.manager import delete, power
from compute_worker.manager.core import Core, Wish, accept, begin
from compute_worker.messages import Context
from compute_worker.objects import Instance
from compute_worker.operations import journal
from compute_worker.operations.database import Tx
from compute_worker.operations.service import Admit, Operations
from compute_worker.states import EXPECTED_POWER, PowerState, VmState, observed
from compute_worker.virt.driver import GuestInfo

LOG = logging.getLogger(__name__)


class Action(StrEnum):
    """What is done about one guest or one stranger."""

    NOTHING = "nothing"
    START = "start"
    """It ran when the host went down: start it."""
    RECORD = "record"
    """Change the record to what the hypervisor says, and tell."""
    ADOPT = "adopt"
    """The journal was lost: write the record again from what stands beside the disks."""
    DELETE = "delete"
    """It was deleted: remove what is left."""
    REPORT = "report"
    """Not ours to touch."""


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What is known of an instance in the store."""

    vm_state: VmState
    power: PowerState
    """``NOSTATE``: the hypervisor has no such guest."""
    busy: bool
    host_rebooted: bool
    resume_wanted: bool
    migrating: bool = False
    silent: bool = False
    ran: bool = False
    """Whether the record says that it ran, where the vm state does not tell (RESIZED)."""


@dataclass(frozen=True, slots=True)
class StrangerFacts:
    """What is known of an instance uuid that the hypervisor or the disk has and the store has not."""

    deleted: bool
    has_record: bool
    owner: str | None
    this_host: str


def decide_guest(facts: GuestFacts) -> tuple[Action, str]:
    """What to do about an instance of the store, and why."""
    if facts.busy:
        return Action.NOTHING, "an open operation goes on with it"
    if facts.migrating:
        return Action.NOTHING, "a migration of it is in flight"
    if facts.silent:
        return Action.NOTHING, "the hypervisor has it and cannot say how it is"
    if EXPECTED_POWER.get(facts.vm_state) is facts.power:
        return Action.NOTHING, "as recorded"
    lost = facts.power in (PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.NOSTATE)
    ran = facts.vm_state in (VmState.ACTIVE, VmState.PAUSED) or (facts.vm_state is VmState.RESIZED and facts.ran)
    if facts.host_rebooted and lost and ran:
        if facts.resume_wanted:
            return Action.START, f"the host went down while it was {facts.vm_state}"
        return Action.RECORD, "the host went down, and resume_guests_state_on_host_boot is off"
    becomes, why = observed(facts.vm_state, facts.power)
    if becomes is facts.vm_state:
        return Action.NOTHING, why
    return Action.RECORD, why


def decide_stranger(facts: StrangerFacts) -> tuple[Action, str]:
    """What to do about a uuid that the store does not have, and why."""
    if facts.deleted:
        return Action.DELETE, "it was deleted: what is left of it goes"
    if not facts.has_record:
        return Action.REPORT, "nothing says whose it is"
    if facts.owner != facts.this_host:
        return Action.REPORT, f"its record names host {facts.owner} as owner"
    return Action.ADOPT, "its record beside its disks names this host as owner; the journal has lost it"


class Recovery:
    """Compares, at start and whenever the hypervisor comes back."""

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations
        self._interrupted: set[str] | None = None
        self._told: dict[str, tuple[Action, str]] = {}

    def is_interrupted(self, instance: str) -> bool:
        """Whether the host went down under an operation on it: when that has ended, compare before it is recorded."""
        return self._interrupted is not None and instance in self._interrupted

    def compare(self) -> dict[str, tuple[Action, str]]:
        """Look at every instance and every stranger, act, and return what was decided by uuid.

        :raises HypervisorUnavailable: it does not answer; call again when it does.
        """
        boot_id = self._core.driver.get_available_resource().boot_id
        rebooted = bool(boot_id) and self._core.database.read(_last_boot) not in (None, boot_id)
        # Once for each instance; a guest that stopped after that stopped by itself.
        since = self._interrupted if rebooted else set()
        interrupted: set[str] = set()
        before = {instance.uuid: instance.seq for instance in self._core.store.list()}
        guests = {guest.uuid: guest for guest in self._core.driver.list_instances()}
        busy = {e.instance for e in self._core.database.read(journal.open_entries)}
        known = self._core.store.list()
        decided = {}
        for i in known:
            facts = self._facts(i, guests.get(i.uuid), i.uuid in busy, rebooted and (since is None or i.uuid in since))
            decided[i.uuid] = self._guest(i, facts, before.get(i.uuid))
            if facts.busy and decide_guest(replace(facts, busy=False))[0] is Action.START:
                interrupted.add(i.uuid)
        moving = {move.instance.uuid for move in self._core.moves.list()}
        decided |= self._strangers(guests, set(decided) | {uuid for uuid in busy if uuid} | moving)
        self._interrupted = interrupted
        if not interrupted:
            self._core.database.write(lambda tx: _remember_boot(tx, boot_id))
        self._tell({uuid: (action, why) for uuid, (action, why) in decided.items() if action is not Action.NOTHING})
        return decided

    def _tell(self, decided: dict[str, tuple[Action, str]]) -> None:
        """Log what changed since the last time: a guest of somebody else is no news every ten minutes."""
        for instance, (action, why) in decided.items():
            if self._told.get(instance) != (action, why) or action is not Action.REPORT:
                LOG.warning("instance %s: %s: %s", instance, action, why)
        self._told = decided

    def _facts(self, instance: Instance, guest: GuestInfo | None, busy: bool, rebooted: bool) -> GuestFacts:
        return GuestFacts(
            vm_state=instance.vm_state,
            power=guest.power_state if guest else PowerState.NOSTATE,
            busy=busy,
            host_rebooted=rebooted,
            resume_wanted=self._core.settings.compute.resume_guests_state_on_host_boot,
            migrating=guest.migrating if guest else False,
            silent=guest.silent if guest else False,
            ran=instance.power_state is PowerState.RUNNING,
        )

    def _guest(self, instance: Instance, facts: GuestFacts, seq: int | None) -> tuple[Action, str]:
        action, why = decide_guest(facts)
        if action is Action.START:
            self._start(instance)
        elif action is Action.RECORD:
            record_observed(self._core, self._operations, instance.uuid, facts.power, why, seq)
        return action, why

    def _start(self, instance: Instance) -> None:
        def admit(tx: Tx) -> bool:
            if instance.vm_state is VmState.RESIZED:
                begin(self._core.store, tx, instance, "start_instance")
                return False
            # What it is now, whatever it was: a paused guest is started too, and one that cannot be is stopped.
            self._core.store.change(tx, instance.uuid, vm_state=VmState.STOPPED, power_state=PowerState.SHUTDOWN)
            return power.admit(self._core, tx, instance.uuid, "start_instance")

        self._command("start_instance", instance.uuid, admit)

    def _command(self, kind: str, instance: str, admit: Admit) -> None:
        context = Context(request_id=f"req-{uuid.uuid4()}", message_id=str(uuid.uuid4()))
        try:
            accept(self._operations, context, kind, Wish(None, None, False), admit, instance=instance)
        except errors.Refused as exc:
            LOG.warning("instance %s: %s at start was refused: %s", instance, kind, exc)

    def _strangers(self, guests: dict[str, GuestInfo], known: set[str]) -> dict[str, tuple[Action, str]]:
        records = {record.uuid: record for record in self._core.driver.list_records()}
        found = {left.uuid for left in self._core.driver.list_leftovers()} | set(guests) | set(records)
        decided = {}
        for stranger in sorted(found - known):
            record, guest = records.get(stranger), guests.get(stranger)
            owner = guest.owner if guest is not None and guest.owner else record.host if record else None
            facts = StrangerFacts(
                deleted=self._core.database.read(lambda tx, u=stranger: self._core.store.is_deleted(tx, u)),  # type: ignore[misc]
                has_record=record is not None,
                owner=owner,
                this_host=self._core.host,
            )
            action, why = decide_stranger(facts)
            if action is Action.ADOPT and record is not None and not self._adopt(record, guest):
                action, why = Action.NOTHING, "an operation began with it while the hypervisor was asked"
            elif action is Action.DELETE:
                self._delete(record or delete.nameless(stranger))
            decided[stranger] = (action, why)
        return decided

    def _adopt(self, record: Instance, guest: GuestInfo | None) -> bool:
        """Write the record again; false when the store or an open move has the instance: then nothing was lost."""
        power_state = guest.power_state if guest else PowerState.SHUTDOWN
        by_power = {expected: state for state, expected in EXPECTED_POWER.items()}
        adopted = msgspec.structs.replace(
            record, vm_state=by_power.get(power_state, VmState.ERROR), task_state=None, power_state=power_state
        )

        def write(tx: Tx) -> bool:
            if self._core.store.has_row(tx, adopted.uuid) or self._core.moves.of(tx, adopted.uuid):
                return False
            self._core.store.put(tx, adopted)
            self._core.claims.force(tx, adopted)
            return True

        return self._core.database.write(write)

    def _delete(self, record: Instance) -> None:
        def admit(tx: Tx) -> bool:
            self._core.store.put(tx, record)
            return delete.admit(self._core, tx, record.uuid)

        self._command("terminate_instance", record.uuid, admit)


def record_observed(
    core: Core, operations: Operations, instance: str, found: PowerState, why: str, seq: int | None
) -> bool:
    """Change the record to what the hypervisor says, unless an operation is at it; tell by notification.

    :param seq: the record's, from before the hypervisor was asked: when it has changed since, an operation may have
        begun and ended meanwhile, and what was seen is of its middle. Its end is followed by a look of its own.

    Returns whether anything changed. Guests are never touched by this.
    """

    def write(tx: Tx) -> bool:
        record = core.store.find(tx, instance)
        if record is None or record.seq != seq or journal.open_entries(tx, instance):
            return False
        becomes, _ = observed(record.vm_state, found)
        if becomes is record.vm_state and found is record.power_state:
            return False
        fault = why if becomes is VmState.ERROR else record.fault
        core.store.change(tx, instance, vm_state=becomes, power_state=found, fault=fault)
        body = {
            "instance": instance,
            "kind": "power_state",
            "state": becomes.value,
            "power_state": found.value,
            "reason": why,
        }
        crashed = becomes is VmState.ERROR
        operations.outbox.add(tx, "instance.power_state", body, priority="ERROR" if crashed else "INFO")
        return True

    changed = core.database.write(write)
    if changed:
        operations.outbox.ring()
        LOG.warning("instance %s: power state %s outside any operation: %s", instance, found, why)
    return changed


def _last_boot(tx: Tx) -> str | None:
    row = tx.execute("SELECT value FROM meta WHERE name = 'boot_id'").fetchone()
    return str(row[0]) if row else None


def _remember_boot(tx: Tx, boot_id: str) -> None:
    tx.execute("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?)", (boot_id,))
