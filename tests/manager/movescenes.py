"""Every way a cold move can go, as a scene of its matrix: what is there before, what is sent, what is true after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compute_worker import errors
from compute_worker.states import OperationState, PowerState, VmState
from tests.manager.cell import DECISION, DESTINATION, MIGRATION, OPERATION, SOURCE, UUID, WRITTEN, Cell

BROKEN = errors.GuestFailed(instance=UUID, reason="injected")
FULL = errors.DiskFull(path="instances")
MOVE_KINDS = {
    "prep_resize",
    "prep_resize_elsewhere",
    "resize_instance",
    "confirm_resize",
    "drop_resize",
    "revert_resize",
    "finish_revert_resize",
    "live_migration",
    "pre_live_migration",
}


@dataclass(frozen=True)
class MoveScene:
    """``operation``: whose kinds are killed. ``owner``: who has the instance in the end, ``None``: it is gone."""

    name: str
    send: Callable[[Cell], object]
    operation: str
    owner: str | None
    vm_state: VmState | None
    power: PowerState
    kinds: tuple[tuple[str, str], ...]
    prepare: Callable[[Cell], None] = lambda cell: cell.boot() and None
    fault: tuple[str, str, errors.ComputeError] | None = None
    outcome: dict[str, OperationState] = field(default_factory=dict)
    settled: Callable[[Cell], bool] = lambda cell: True


def stopped(cell: Cell) -> None:
    cell.boot()
    assert cell[SOURCE].do("stop_instance", UUID).state is OperationState.DONE


def resized(cell: Cell) -> None:
    cell.boot()
    cell.resized()


def confirm(cell: Cell) -> None:
    cell[DESTINATION].send("confirm_resize", UUID, MIGRATION, operation=DECISION)


def confirm_at_source(cell: Cell) -> None:
    cell[SOURCE].send("confirm_resize", UUID, MIGRATION, operation=DECISION)


def revert(cell: Cell) -> None:
    cell[DESTINATION].send("revert_resize", UUID, MIGRATION, operation=DECISION)


def copy_is_gone(cell: Cell) -> bool:
    return cell.leftovers(SOURCE) == set()


_MOVE = ((DESTINATION, "prep_resize"), (SOURCE, "resize_instance"))
_CONFIRM = ((DESTINATION, "confirm_resize"), (SOURCE, "drop_resize"))
_REVERT = ((DESTINATION, "revert_resize"), (SOURCE, "finish_revert_resize"))
_LIVE = ((SOURCE, "live_migration"), (DESTINATION, "pre_live_migration"))
_V, _P, _D, _U = VmState, PowerState, OperationState.DONE, OperationState.UNDONE


def _resize(cell: Cell) -> None:
    cell.resize()


def _migrate(cell: Cell) -> None:
    cell.migrate()


def paused(cell: Cell) -> None:
    cell.boot()
    assert cell[SOURCE].do("pause_instance", UUID).state is OperationState.DONE


def finish_is_slow(cell: Cell) -> None:
    """A lost finish reply, and a source hypervisor that waits long before it lets its copy run on."""
    cell.boot()
    cell[SOURCE].host.finish_timeout = 20.0


def failing(name: str, host: str, call: str, error: errors.ComputeError = BROKEN) -> MoveScene:
    return MoveScene(
        name, _resize, OPERATION, SOURCE, _V.ACTIVE, _P.RUNNING, _MOVE, fault=(host, call, error),
        outcome={DESTINATION: _U},
    )


SCENES = [
    MoveScene(
        "resize", _resize, OPERATION, DESTINATION, _V.RESIZED, _P.RUNNING, _MOVE,
        outcome={DESTINATION: _D, SOURCE: _D},
    ),
    MoveScene(
        "resize-stopped", _resize, OPERATION, DESTINATION, _V.RESIZED, _P.SHUTDOWN, _MOVE, stopped,
        outcome={DESTINATION: _D, SOURCE: _D},
    ),
    failing("resize-fails-in-set_aside", SOURCE, "set_aside"),
    failing("resize-fails-in-send", SOURCE, "send_disk", FULL),
    failing("resize-fails-in-grow", DESTINATION, "grow_disks", FULL),
    failing("resize-fails-in-start", DESTINATION, "start"),
    MoveScene(
        "live", _migrate, OPERATION, DESTINATION, _V.ACTIVE, _P.RUNNING, _LIVE, outcome={SOURCE: _D, DESTINATION: _D}
    ),
    MoveScene(
        "live-paused", _migrate, OPERATION, DESTINATION, _V.PAUSED, _P.PAUSED, _LIVE, paused,
        outcome={SOURCE: _D, DESTINATION: _D},
    ),
    MoveScene(
        "live-fails-in-flight", _migrate, OPERATION, SOURCE, _V.ACTIVE, _P.RUNNING, _LIVE,
        fault=(DESTINATION, "receive", FULL), outcome={SOURCE: _U},
    ),
    MoveScene(
        "live-fails-in-create", _migrate, OPERATION, SOURCE, _V.ACTIVE, _P.RUNNING, _LIVE,
        fault=(DESTINATION, "create_disks", BROKEN), outcome={SOURCE: _U},
    ),
    MoveScene(
        "live-finish-lost", _migrate, OPERATION, DESTINATION, _V.ACTIVE, _P.RUNNING, _LIVE, finish_is_slow,
        fault=(SOURCE, "migrate_finish", BROKEN), outcome={SOURCE: _D, DESTINATION: _D},
    ),
    MoveScene(
        "confirm", confirm, DECISION, DESTINATION, _V.ACTIVE, _P.RUNNING, _CONFIRM, resized,
        outcome={DESTINATION: _D}, settled=copy_is_gone,
    ),
    MoveScene(
        "confirm-at-source", confirm_at_source, DECISION, DESTINATION, _V.ACTIVE, _P.RUNNING, _CONFIRM, resized,
        outcome={SOURCE: _D}, settled=copy_is_gone,
    ),
    MoveScene(
        "revert", revert, DECISION, SOURCE, _V.ACTIVE, _P.RUNNING, _REVERT, resized,
        outcome={DESTINATION: _D, SOURCE: _D},
    ),
    MoveScene(
        "revert-fails-in-start", revert, DECISION, DESTINATION, _V.RESIZED, _P.RUNNING, _REVERT, resized,
        fault=(SOURCE, "start", BROKEN), outcome={DESTINATION: _U},
    ),
]


def check(cell: Cell, scene: MoveScene) -> None:
    """The oracle: one owner, one running copy, the bytes, nothing left over, terminal states, claims."""
    from tests.waiting import wait_for

    for name, state in scene.outcome.items():
        found = cell.outcome(name, scene.operation)
        assert found.state is state, (name, found.kind, found.state, found.error)
    wait_for(lambda: scene.settled(cell), deadline=15, what=f"{scene.name} to settle")
    cell.quiet()
    assert cell.simulated.violations == []
    assert cell.owners() == ([scene.owner] if scene.owner else [])
    if scene.owner is None:
        assert all(cell.leftovers(name) == set() for name in cell.machines)
        assert all(cell.used_mb(name) == 0 for name in cell.machines)
        return
    owner = cell[scene.owner]
    owner.settle(UUID)
    record = owner.instance(UUID)
    assert record is not None
    assert record.vm_state is scene.vm_state, record
    assert record.task_state is None
    assert owner.host.power_of(UUID) is scene.power
    assert cell.simulated.running_copies(UUID) == ([scene.owner] if scene.power is PowerState.RUNNING else [])
    assert owner.host.read_disk(UUID).endswith(WRITTEN)
    assert cell.leftovers(scene.owner) == {"directory", "domain"}
    for name in cell.machines:
        aside = scene.vm_state is _V.RESIZED and name == SOURCE
        if name != scene.owner:
            assert cell.leftovers(name) == ({"resize"} if aside else set()), name
            assert cell.used_mb(name) == (128 if aside else 0), name
    assert owner.worker.core.claims.usage()["memory_mb"].used == record.flavor.memory_mb
    ends_once(cell, scene)


def ends_once(cell: Cell, scene: MoveScene) -> None:
    """Each operation of the scene told its beginning once and its end once."""
    for name, kind in scene.kinds:
        rows = [
            n for n in cell[name].notifications()
            if n.operation == scene.operation and n.payload.get("kind") == kind
            and n.event_type.rpartition(".")[2] in ("start", "end", "error")
        ]
        said = [n.event_type.rpartition(".")[2] for n in rows]
        assert said in ([], ["start", "end"], ["start", "error"]), (name, kind, said)
