"""The tables of states: total, and without surprises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.states import (
    COMMANDS,
    EXPECTED_POWER,
    MigrationStatus,
    OperationState,
    PowerState,
    TaskState,
    VmState,
    allowed,
    observed,
    ran_before,
    settled,
)

commands = st.sampled_from(sorted(COMMANDS))
vm_states = st.sampled_from(VmState)
power_states = st.sampled_from(PowerState)

DESIGNED = {
    "terminate_instance",
    "start_instance",
    "stop_instance",
    "reboot_instance",
    "reboot_instance_hard",
    "pause_instance",
    "unpause_instance",
    "suspend_instance",
    "resume_instance",
    "resize_instance",
    "confirm_resize",
    "revert_resize",
    "live_migration",
    "snapshot_instance",
    "backup_instance",
}


def test_every_command_on_an_instance_has_a_rule() -> None:
    assert set(COMMANDS) == DESIGNED


def test_every_lifecycle_message_has_a_rule() -> None:
    from compute_worker.manager.lifecycle import LifecycleEndpoint
    from compute_worker.messages import MessageKind, messages_of

    told = {m.name for m, _ in messages_of(LifecycleEndpoint) if m.kind is MessageKind.COMMAND}
    assert told - {"build_and_run_instance"} <= set(COMMANDS)
    assert "start_instance" in told


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_rules_are_complete(name: str) -> None:
    rule = COMMANDS[name]
    assert rule.vm_states, "a command that may never come"
    assert VmState.DELETED not in rule.vm_states, "the deleted take no command"
    assert rule.settled_in is None or rule.settled_in in rule.vm_states, "the settled must be let in, to be accepted"
    assert rule.settled_in is None or rule.settled_in in EXPECTED_POWER


def test_task_states_tell_commands_apart() -> None:
    tasks = [rule.task_state for rule in COMMANDS.values()]
    assert len(set(tasks)) == len(tasks)
    assert set(tasks) <= set(TaskState)


def test_delete_may_always_come() -> None:
    assert COMMANDS["terminate_instance"].vm_states == set(VmState) - {VmState.DELETED}


@given(commands, vm_states)
def test_allowed_reads_the_table_and_says_why(command: str, state: VmState) -> None:
    may, reason = allowed(command, state)
    assert may == (state in COMMANDS[command].vm_states)
    assert command in reason and str(state) in reason
    if not may:
        assert all(str(wanted) in reason for wanted in COMMANDS[command].vm_states)


def test_unknown_command_is_an_error_of_ours() -> None:
    with pytest.raises(KeyError):
        allowed("make_coffee", VmState.ACTIVE)


@given(commands, vm_states, power_states)
def test_settled_needs_record_and_hypervisor(command: str, state: VmState, power: PowerState) -> None:
    if settled(command, state, power):
        assert allowed(command, state)[0]
        assert COMMANDS[command].settled_in is state
        assert observed(state, power)[0] is state


@pytest.mark.parametrize(
    ("command", "state", "power", "expected"),
    [
        ("start_instance", VmState.ACTIVE, PowerState.RUNNING, True),
        ("start_instance", VmState.ACTIVE, PowerState.CRASHED, False),
        ("start_instance", VmState.STOPPED, PowerState.SHUTDOWN, False),
        ("stop_instance", VmState.STOPPED, PowerState.SHUTDOWN, True),
        ("stop_instance", VmState.STOPPED, PowerState.RUNNING, False),
        ("reboot_instance", VmState.ACTIVE, PowerState.RUNNING, False),
        ("suspend_instance", VmState.SUSPENDED, PowerState.SUSPENDED, True),
        ("terminate_instance", VmState.STOPPED, PowerState.SHUTDOWN, False),
    ],
)
def test_settled_by_example(command: str, state: VmState, power: PowerState, expected: bool) -> None:
    assert settled(command, state, power) is expected


@given(vm_states, power_states)
def test_observed_converges_at_once(state: VmState, power: PowerState) -> None:
    after, reason = observed(state, power)
    assert reason
    assert observed(after, power)[0] is after


@given(vm_states, power_states)
def test_observed_never_invents(state: VmState, power: PowerState) -> None:
    after, _ = observed(state, power)
    if state not in EXPECTED_POWER:
        assert after is state, "only a settled state follows the hypervisor"
    elif after is not VmState.ERROR:
        assert EXPECTED_POWER[after] is power
    else:
        assert power in (PowerState.CRASHED, PowerState.NOSTATE)


@pytest.mark.parametrize(
    ("state", "power", "after"),
    [
        (VmState.ACTIVE, PowerState.SHUTDOWN, VmState.STOPPED),
        (VmState.ACTIVE, PowerState.PAUSED, VmState.PAUSED),
        (VmState.STOPPED, PowerState.RUNNING, VmState.ACTIVE),
        (VmState.ACTIVE, PowerState.CRASHED, VmState.ERROR),
        (VmState.STOPPED, PowerState.NOSTATE, VmState.ERROR),
        (VmState.BUILDING, PowerState.RUNNING, VmState.BUILDING),
        (VmState.RESIZED, PowerState.SHUTDOWN, VmState.RESIZED),
        (VmState.DELETED, PowerState.RUNNING, VmState.DELETED),
    ],
)
def test_observed_by_example(state: VmState, power: PowerState, after: VmState) -> None:
    assert observed(state, power)[0] is after


def test_expected_powers_tell_vm_states_apart() -> None:
    assert len(set(EXPECTED_POWER.values())) == len(EXPECTED_POWER)


@given(vm_states, power_states)
def test_ran_before(state: VmState, power: PowerState) -> None:
    ran = ran_before(state, power)
    if state is VmState.STOPPED:
        assert not ran
    if state in (VmState.ACTIVE, VmState.PAUSED):
        assert ran
    if state is VmState.RESIZED:
        assert ran == (power in (PowerState.RUNNING, PowerState.PAUSED))


def test_final_operation_states() -> None:
    assert {state for state in OperationState if state.final} == {"done", "undone", "refused"}


@pytest.mark.parametrize("kind", [VmState, TaskState, PowerState, MigrationStatus, OperationState])
def test_values_are_plain_words(kind: type[VmState]) -> None:
    assert all(str(member) == member.value and member.value for member in kind)


def test_migration_statuses_are_the_design_s() -> None:
    assert [str(s) for s in MigrationStatus] == [
        "pre-migrating", "migrating", "post-migrating", "finished", "confirming", "confirmed", "reverting", "reverted",
        "error", "queued", "preparing", "running", "running (post-copy)", "completed", "cancelled", "failed",
    ]  # fmt: skip
