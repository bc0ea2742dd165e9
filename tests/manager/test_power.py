from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker.config import Compute
from compute_worker.manager.power import patience
from compute_worker.operations.executor import Point
from compute_worker.states import OperationState, TaskState
from tests.manager.machine import Machine, make_instance, quiet_deaths

UUID = make_instance().uuid
OPERATION = "bbbbbbbb-0000-4000-8000-000000000001"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    quiet_deaths(monkeypatch)
    machine = Machine(tmp_path)
    machine.do("build_and_run_instance", make_instance())
    yield machine
    machine.close()


@pytest.mark.parametrize(
    ("kind", "args", "seconds"),
    [
        ("stop_instance", {"clean_shutdown": True, "shutdown_timeout": None}, 60.0),
        ("stop_instance", {"clean_shutdown": True, "shutdown_timeout": 5.0}, 5.0),
        ("stop_instance", {"clean_shutdown": True, "shutdown_timeout": 0.0}, 0.0),
        ("stop_instance", {"clean_shutdown": False, "shutdown_timeout": 5.0}, 0.0),
        ("reboot_instance", {"reboot_type": "SOFT"}, 120.0),
        ("reboot_instance_hard", {"reboot_type": "HARD"}, 0.0),
    ],
)
def test_patience(kind, args, seconds):
    assert patience(Compute(), kind, args) == seconds


@pytest.mark.parametrize("command", ["stop_instance", "reboot_instance"])
def test_a_repetition_after_the_configuration_changed_is_the_same_operation(machine, command):
    machine.do(command, UUID, operation=OPERATION)
    for option in ("shutdown_timeout", "soft_reboot_timeout", "shutdown_retry_interval"):
        object.__setattr__(machine.settings.compute, option, 77.0)
    machine.kill()
    machine.restart()
    assert machine.send(command, UUID, operation=OPERATION) == OPERATION


def test_other_arguments_are_a_conflict(machine):
    machine.do("stop_instance", UUID, operation=OPERATION)
    with pytest.raises(errors.OperationConflict):
        machine.send("stop_instance", UUID, operation=OPERATION, shutdown_timeout=3.0)


def test_a_soft_reboot_is_no_repetition_of_a_hard_one(machine):
    machine.do("reboot_instance", UUID, operation=OPERATION)
    with pytest.raises(errors.OperationConflict):
        machine.send("reboot_instance", UUID, operation=OPERATION, reboot_type="HARD")


def deleted_at_the_end_of(machine, kind, step, send):
    """The task on record when a delete comes after the last step's work and its operation has written its end."""
    seen = []
    machine.at[kind, step, "do", Point.AFTER_DO] = lambda: machine.send(
        "terminate_instance", UUID, operation=OPERATION
    )
    machine.at[kind, step, "do", Point.AFTER_RECORD] = lambda: seen.append(machine.instance(UUID).task_state)
    assert machine.outcome(send()).state is OperationState.DONE
    assert machine.outcome(OPERATION).state is OperationState.DONE
    return seen


def test_a_record_that_is_being_deleted_keeps_saying_so(machine):
    seen = deleted_at_the_end_of(machine, "stop_instance", "power_off", lambda: machine.send("stop_instance", UUID))
    assert seen == [TaskState.DELETING]


def test_so_does_one_that_is_deleted_as_its_build_ends(tmp_path):
    machine = Machine(tmp_path)
    build = lambda: machine.send("build_and_run_instance", make_instance())  # noqa: E731
    assert deleted_at_the_end_of(machine, "build_and_run_instance", "resume_guest", build) == [TaskState.DELETING]
    machine.close()
