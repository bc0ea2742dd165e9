"""The project keeps its own rules: layers, sizes, generated files, and what is installed."""

from __future__ import annotations

import ast
import configparser
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "compute_worker"
LONGEST_FILE = 500
LONGEST_FUNCTION = 60

# What a room of the package must not import (docstring of its own aside): a message goes down, never up.
LAYERS = {
    "virt": {"manager", "rpc", "operations", "cmd", "ctl", "telemetry"},
    "operations": {"virt", "images", "network", "manager", "rpc", "cmd", "ctl", "telemetry", "claims", "store"},
    "rpc": {"manager", "operations", "virt", "cmd", "ctl", "telemetry", "images", "network", "store", "claims"},
    "manager": {"rpc", "cmd", "ctl", "telemetry"},
    "images": {"virt", "manager", "rpc", "operations", "cmd", "ctl", "telemetry"},
    "errors": {"*"},
    "states": {"*"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def for_types_only(path: Path) -> set[str]:
    """Imports under ``if TYPE_CHECKING``: they bind nothing at run time."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom) and inner.module:
                    found |= {inner.module, *(f"{inner.module}.{alias.name}" for alias in inner.names)}
    return found


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_a_module_imports_nothing_above_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    banned = LAYERS.get(room, set())
    for name in set(imported(path)) - for_types_only(path):
        assert name.split(".")[0] != "eventlet", f"{path} imports eventlet"
        if not name.startswith("compute_worker."):
            continue
        other = name.split(".")[1]
        assert other == room or not banned & {other, "*"}, f"{room} must not import {other}"


@pytest.mark.parametrize("path", modules(), ids=names(modules()))
def test_a_module_is_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_the_sample_configuration_is_fresh(tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    code = "import sys; from oslo_config import generator; sys.exit(generator.main())"
    arguments = ["--config-file", "etc/config-generator.conf", "--output-file", str(fresh)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], check=True, cwd=ROOT, timeout=60)
    sample = ROOT / "etc" / "compute-worker.conf.sample"
    assert sample.read_text() == fresh.read_text(), "make genconfig, and commit etc/compute-worker.conf.sample"


def test_every_option_is_explained() -> None:
    from compute_worker.config import oslo_opts

    for group, options in oslo_opts():
        for option in options:
            assert option.help and option.help.endswith("."), f"[{group}] {option.name}"


def entry_points() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [line for lines in setup["entry_points"].values() for line in lines.splitlines() if line]


@pytest.mark.parametrize("entry_point", entry_points())
def test_an_entry_point_can_be_loaded(entry_point: str) -> None:
    module, attribute = entry_point.split("=")[1].strip().split(":")
    for part, needed in ((".glance", "openstack"), (".libvirt.", "libvirt")):
        if part in module:
            pytest.importorskip(needed, reason=f"{needed} is an extra and not installed here")
    assert callable(getattr(importlib.import_module(module), attribute, None))


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "etc" / "systemd" / "compute-worker.service")
    service = unit["Service"]
    assert (service["Type"], service["User"], service["NoNewPrivileges"]) == ("notify", "compute-worker", "true")
    assert (service["StateDirectoryMode"], service["CapabilityBoundingSet"]) == ("0700", "")
    assert service["KillMode"] == "mixed", "a child that outlived the worker would write beside the next one"
    analyze = subprocess.run(["sh", "-c", "command -v systemd-analyze"], capture_output=True, text=True, check=False)
    if analyze.returncode:
        return
    runnable = tmp_path / "compute-worker.service"
    text = (ROOT / "etc/systemd/compute-worker.service").read_text()
    runnable.write_text(text.replace("ExecStart=/usr/bin/compute-worker", "ExecStart=/bin/true"))
    said = subprocess.run(
        [analyze.stdout.strip(), "verify", str(runnable)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "Unknown" not in said.stderr and "Failed to parse" not in said.stderr, said.stderr


def test_no_file_names_a_machine() -> None:
    """Paths of whoever built it have no place in it."""
    banned = [f"/{'work'}/", f"/{'tmp'}/w/"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git history here: which files are the project's is not known")
    for name in listed.stdout.splitlines():
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for word in banned:
            assert word not in text, f"{name} names {word}"
