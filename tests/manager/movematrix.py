"""What every part of the move matrix needs: the points that a scene passes, its messages, a death at a point."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tests.manager.cell import Cell
from tests.manager.movescenes import SCENES, MoveScene, check
from tests.waiting import wait_for


def prepared(scene: MoveScene, directory: Path) -> Cell:
    cell = Cell(directory)
    scene.prepare(cell)
    cell.quiet()
    if scene.fault is not None:
        host, call, error = scene.fault
        cell[host].host.faults.fail(call, error, times=1)
    for machine in cell.machines.values():
        machine.reached.clear()
    cell.net.sent.clear()
    return cell


@functools.cache
def points_of(name: str) -> list[tuple[str, tuple]]:
    """Every (host, point) that the scene passes when nothing dies."""
    scene = next(s for s in SCENES if s.name == name)
    with tempfile.TemporaryDirectory() as directory:
        cell = prepared(scene, Path(directory))
        scene.send(cell)
        check(cell, scene)
        cell.close()
        kinds = set(scene.kinds)
        found = [(n, p) for n, m in cell.machines.items() for p in m.reached if (n, p[0]) in kinds]
        return list(dict.fromkeys(found))


@functools.cache
def messages_of_scene(name: str) -> list[str]:
    """Every message between workers that the scene sends when nothing dies."""
    scene = next(s for s in SCENES if s.name == name)
    with tempfile.TemporaryDirectory() as directory:
        cell = prepared(scene, Path(directory))
        scene.send(cell)
        check(cell, scene)
        cell.close()
        return sorted({method for _, _, method in cell.net.sent})


CELLS = [(scene, host, point) for scene in SCENES for host, point in points_of(scene.name)]


PLAIN = [cell for cell in CELLS if cell[0].fault is None and not cell[0].name.endswith(("-stopped", "-paused"))]
"""The ways on which nothing fails by itself: what two deaths and deletes are tried on."""


def name_of(value: object) -> str:
    if isinstance(value, MoveScene):
        return value.name
    return value if isinstance(value, str) else "-".join(value)  # type: ignore[arg-type]


def killed(cell: Cell, scene: MoveScene, host: str, point: tuple, both: bool) -> None:
    machine = cell[host]
    machine.die_at = point
    if both:
        other = next(m for n, m in cell.machines.items() if n != host)
        machine.at[point] = other.kill
    scene.send(cell)
    wait_for(machine.dead.is_set, what=f"death at {point}")
    for each in cell.machines.values():
        if each.dead.is_set():
            each.restart()
    check(cell, scene)
    cell.close()
