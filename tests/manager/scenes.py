"""Every lifecycle operation as a scene of the kill matrix: what is there before, what is sent, what is true after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compute_worker import errors
from compute_worker.states import OperationState, PowerState, VmState
from tests.manager.machine import Machine, make_instance

UUID = make_instance().uuid
BROKEN = errors.GuestFailed(instance=UUID, reason="injected")


def boot(machine: Machine) -> None:
    assert machine.do("build_and_run_instance", make_instance()).state is OperationState.DONE


def after(*commands: str) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        boot(machine)
        for command in commands:
            assert machine.do(command, UUID).state is OperationState.DONE

    return prepare


def crashed(machine: Machine) -> None:
    boot(machine)
    machine.host.guest_crash(UUID)
    machine.settle(UUID)


def deaf(machine: Machine) -> None:
    boot(machine)
    machine.host.deaf.add(UUID)


def failing(call: str) -> Callable[[Machine], None]:
    def prepare(machine: Machine) -> None:
        machine.host.faults.fail(call, BROKEN, times=1)

    return prepare


def nothing(machine: Machine) -> None:
    """An empty host."""


def build(machine: Machine) -> str:
    return machine.send("build_and_run_instance", make_instance(), operation=OPERATION)


def snapshot(machine: Machine) -> str:
    return machine.send("snapshot_instance", UUID, "snap", operation=OPERATION)


def backup(machine: Machine) -> str:
    return machine.send("backup_instance", UUID, "backup-new", "daily", 2, operation=OPERATION)


def backed_up(machine: Machine) -> None:
    boot(machine)
    for number in range(2):
        assert machine.do("backup_instance", UUID, f"backup-{number}", "daily", 2).state is OperationState.DONE


def dropping_store(machine: Machine) -> None:
    """The connection to the store breaks twice while the image is sent."""
    boot(machine)
    machine.host.faults.fail("upload", errors.ImageStoreUnavailable(store="simulated", reason="injected"), times=2)


def silent_store(machine: Machine) -> None:
    """The upload breaks, and the store is then deaf to being told to forget the image, twice."""
    boot(machine)
    machine.host.faults.fail("upload", BROKEN, times=1)
    machine.host.faults.fail("withdraw", errors.ImageStoreUnavailable(store="simulated", reason="injected"), times=2)


def command(name: str, **arguments: object) -> Callable[[Machine], str]:
    return lambda machine: machine.send(name, UUID, operation=OPERATION, **arguments)


OPERATION = "aaaaaaaa-0000-4000-8000-000000000001"


@dataclass(frozen=True)
class Scene:
    """``effects``: how often each thing may be seen from outside after ``prepare`` (``None`` for any number)."""

    name: str
    kind: str
    prepare: Callable[[Machine], None]
    send: Callable[[Machine], str]
    state: OperationState
    vm_state: VmState | None
    power: PowerState
    effects: dict[str, int] = field(default_factory=dict)
    fault: str | None = None

    @property
    def image(self) -> str | None:
        """Id of the image that the scene's operation makes."""
        return {"snapshot_instance": "snap", "backup_instance": "backup-new"}.get(self.kind)


_D, _U, _V, _P = OperationState.DONE, OperationState.UNDONE, VmState, PowerState

SCENES = [
    Scene("build", "build_and_run_instance", nothing, build, _D, _V.ACTIVE, _P.RUNNING, {"boot": 1, "unpause": 1}),
    *(
        Scene(f"build-fails-in-{c}", "build_and_run_instance", nothing, build, _U, None, _P.NOSTATE, {"unpause": 0}, c)
        for c in ("fetch_images", "create_disks", "plug_vifs", "define", "start")
    ),
    Scene("delete", "terminate_instance", boot, command("terminate_instance"), _D, None, _P.NOSTATE, {"boot": 0}),
    Scene(
        "delete-stopped",
        "terminate_instance",
        after("stop_instance"),
        command("terminate_instance"),
        _D,
        None,
        _P.NOSTATE,
    ),
    Scene(
        "start",
        "start_instance",
        after("stop_instance"),
        command("start_instance"),
        _D,
        _V.ACTIVE,
        _P.RUNNING,
        {"boot": 1},
    ),
    Scene(
        "start-crashed", "start_instance", crashed, command("start_instance"), _D, _V.ACTIVE, _P.RUNNING, {"boot": 1}
    ),
    Scene("snapshot", "snapshot_instance", boot, snapshot, _D, _V.ACTIVE, _P.RUNNING, {"boot": 0, "kill": 0}),
    Scene("snapshot-store-silent", "snapshot_instance", silent_store, snapshot, _U, _V.ACTIVE, _P.RUNNING, {"boot": 0}),
    Scene("snapshot-again", "snapshot_instance", dropping_store, snapshot, _D, _V.ACTIVE, _P.RUNNING, {"boot": 0}),
    Scene("snapshot-paused", "snapshot_instance", after("pause_instance"), snapshot, _D, _V.PAUSED, _P.PAUSED),
    *(
        Scene(f"snapshot-fails-in-{c}", "snapshot_instance", boot, snapshot, _U, _V.ACTIVE, _P.RUNNING, {"boot": 0}, c)
        for c in ("create_image", "freeze", "upload", "publish")
    ),
    Scene("backup", "backup_instance", backed_up, backup, _D, _V.ACTIVE, _P.RUNNING, {"boot": 0, "kill": 0}),
    Scene("backup-fails", "backup_instance", boot, backup, _U, _V.ACTIVE, _P.RUNNING, {"boot": 0}, "publish"),
    Scene("backup-kept", "backup_instance", boot, backup, _D, _V.ACTIVE, _P.RUNNING, {"boot": 0}, "store_list"),
    Scene("stop", "stop_instance", boot, command("stop_instance"), _D, _V.STOPPED, _P.SHUTDOWN, {"boot": 0, "kill": 0}),
    Scene(
        "stop-deaf",
        "stop_instance",
        deaf,
        command("stop_instance"),
        _D,
        _V.STOPPED,
        _P.SHUTDOWN,
        {"boot": 0, "kill": 1},
    ),
    Scene(
        "reboot", "reboot_instance", boot, command("reboot_instance"), _D, _V.ACTIVE, _P.RUNNING, {"boot": 1, "kill": 0}
    ),
    Scene(
        "reboot-hard",
        "reboot_instance_hard",
        boot,
        command("reboot_instance", reboot_type="HARD"),
        _D,
        _V.ACTIVE,
        _P.RUNNING,
        {"boot": 1, "kill": 1},
    ),
    Scene("pause", "pause_instance", boot, command("pause_instance"), _D, _V.PAUSED, _P.PAUSED, {"pause": 1}),
    Scene(
        "unpause",
        "unpause_instance",
        after("pause_instance"),
        command("unpause_instance"),
        _D,
        _V.ACTIVE,
        _P.RUNNING,
        {"unpause": 1},
    ),
    Scene(
        "suspend", "suspend_instance", boot, command("suspend_instance"), _D, _V.SUSPENDED, _P.SUSPENDED, {"suspend": 1}
    ),
    Scene(
        "resume",
        "resume_instance",
        after("suspend_instance"),
        command("resume_instance"),
        _D,
        _V.ACTIVE,
        _P.RUNNING,
        {"restore": 1, "boot": 0},
    ),
    Scene(
        "repair-leftovers",
        "repair_leftovers",
        nothing,
        lambda machine: machine.send("repair_leftovers", operation=OPERATION),
        _D,
        None,
        _P.NOSTATE,
        {"boot": 0},
    ),
]
