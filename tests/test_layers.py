"""Who may import whom, read from the syntax trees: also imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "compute_worker"
MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=[str(m.relative_to(ROOT)) for m in MODULES])

PROGRAMS = {"cmd", "ctl", "demo", "worker", "embedded"}
FORBIDDEN = {
    "virt": {"manager", "rpc", "operations", "store", "claims", "telemetry"} | PROGRAMS,
    "operations": {"virt", "manager", "rpc", "images", "network", "store", "claims"} | PROGRAMS,
    "images": {"manager", "rpc", "operations", "store", "claims"} | PROGRAMS,
    "network": {"manager", "rpc", "operations", "store", "claims"} | PROGRAMS,
    "manager": {"rpc", "images", "network"} | PROGRAMS,
}
"""Room -> rooms and modules of ours that it does not know."""

ONLY = {
    "errors": set(),
    "states": set(),
    "objects": {"states", "errors"},
    "messages": set(),
    "logcontext": set(),
    "config": set(),
    "rpc": {"rpc", "objects", "errors", "states", "messages", "config", "logcontext", "threads", "version"},
}
"""Room or module -> all that it may know of ours."""


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: -node.level] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def ours(path: Path) -> set[str]:
    """First names below our package that a module imports."""
    return {name.split(".")[1] for name in imports_of(path) if name.startswith(f"{PACKAGE}.")}


@each_module
def test_rooms(path: Path) -> None:
    room = room_of(path)
    known = ours(path)
    assert not known & FORBIDDEN.get(room, set())
    if room in ONLY:
        assert known <= ONLY[room] | {room}


@each_module
def test_nothing_imports_eventlet(path: Path) -> None:
    assert not [n for n in imports_of(path) if n.split(".")[0] in ("eventlet", "greenlet", "gevent")]


@each_module
def test_manager_knows_the_contract_and_no_driver(path: Path) -> None:
    if room_of(path) != "manager":
        return
    of_virt = {name.split(".")[2] for name in imports_of(path) if name.startswith(f"{PACKAGE}.virt.")}
    assert of_virt <= {"driver"}


@each_module
def test_drivers_do_not_know_each_other(path: Path) -> None:
    names = {name for name in imports_of(path) if name.startswith(f"{PACKAGE}.virt.")}
    relative = path.relative_to(ROOT / PACKAGE).parts
    if relative[:2] == ("virt", "libvirt"):
        assert not [n for n in names if ".fake" in n or ".simulated" in n]
    elif relative[0] == "virt":
        assert not [n for n in names if n.startswith(f"{PACKAGE}.virt.libvirt")]


@each_module
def test_libvirt_is_imported_by_its_driver_only(path: Path) -> None:
    if path.relative_to(ROOT / PACKAGE).parts[:2] != ("virt", "libvirt"):
        assert "libvirt" not in {name.split(".")[0] for name in imports_of(path)}


def test_the_reader_sees_late_and_relative_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    module = tmp_path / PACKAGE / "virt" / "x.py"
    module.parent.mkdir(parents=True)
    late = "def f():\n    from compute_worker.manager import core\n    import eventlet\n"
    module.write_text(f"from ..rpc import client\n{late}")
    assert set(imports_of(module)) == {"compute_worker.rpc.client", "compute_worker.manager.core", "eventlet"}
    assert ours(module) == {"rpc", "manager"}
