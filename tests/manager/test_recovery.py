from __future__ import annotations

import itertools

import pytest

from compute_worker.manager.recovery import (
    Action,
    GuestFacts,
    StrangerFacts,
    decide_guest,
    decide_stranger,
)
from compute_worker.states import EXPECTED_POWER, PowerState, VmState

P, V = PowerState, VmState


def guest(vm_state, power, busy=False, rebooted=False, resume=True, migrating=False, silent=False):
    return decide_guest(GuestFacts(vm_state, power, busy, rebooted, resume, migrating, silent))


@pytest.mark.parametrize(
    ("facts", "action"),
    [
        ((V.ACTIVE, P.RUNNING), Action.NOTHING),
        ((V.ACTIVE, P.SHUTDOWN), Action.RECORD),
        ((V.ACTIVE, P.NOSTATE), Action.RECORD),
        ((V.ACTIVE, P.CRASHED), Action.RECORD),
        ((V.ACTIVE, P.SHUTDOWN, False, True), Action.START),
        ((V.ACTIVE, P.NOSTATE, False, True), Action.START),
        ((V.ACTIVE, P.RUNNING, False, True), Action.NOTHING),
        ((V.ACTIVE, P.SHUTDOWN, False, True, False), Action.RECORD),
        ((V.STOPPED, P.SHUTDOWN, False, True), Action.NOTHING),
        ((V.STOPPED, P.RUNNING), Action.RECORD),
        ((V.SUSPENDED, P.SUSPENDED, False, True), Action.NOTHING),
        ((V.BUILDING, P.NOSTATE), Action.NOTHING),
        ((V.RESIZED, P.SHUTDOWN), Action.NOTHING),
        ((V.ACTIVE, P.SHUTDOWN, True, True), Action.NOTHING),
        ((V.ACTIVE, P.PAUSED, False, False, True, True), Action.NOTHING),
        ((V.PAUSED, P.RUNNING), Action.RECORD),
        ((V.ACTIVE, P.NOSTATE, False, False, True, False, True), Action.NOTHING),
        ((V.ACTIVE, P.NOSTATE, False, True, True, False, True), Action.NOTHING),
    ],
)
def test_decide_guest(facts, action):
    decided, why = guest(*facts)
    assert decided is action, why
    assert why


def test_a_guest_is_never_started_but_after_a_reboot_and_never_while_busy():
    flags = (True, False)
    for vm, power, busy, rebooted, resume, migrating in itertools.product(V, P, flags, flags, flags, flags):
        action, why = guest(vm, power, busy, rebooted, resume, migrating)
        assert why
        if action is Action.START:
            assert rebooted and resume and not busy and not migrating
            assert power is not EXPECTED_POWER[vm] and power not in (P.RUNNING, P.PAUSED)


@pytest.mark.parametrize(
    ("deleted", "record", "owner", "action"),
    [
        (True, True, "node1", Action.DELETE),
        (True, False, None, Action.DELETE),
        (False, True, "node1", Action.ADOPT),
        (False, True, "node2", Action.REPORT),
        (False, True, None, Action.REPORT),
        (False, False, None, Action.REPORT),
        (False, False, "node1", Action.REPORT),
    ],
)
def test_decide_stranger(deleted, record, owner, action):
    decided, why = decide_stranger(StrangerFacts(deleted, record, owner, "node1"))
    assert decided is action and why
