"""Snapshots on a real libvirt, run in a host as the worker's user."""

from __future__ import annotations

import pytest

from tests.lab.cell import Cell
from tests.lab.test_libvirt_driver import images, run_inside

__all__ = ["images"]
pytestmark = pytest.mark.lab


@pytest.mark.timeout(600)
def test_snapshots(cell: Cell, images: None) -> None:
    """Live, incremental, off, paused, saved, raw, compressed; deaths in between; a header that a guest wrote."""
    assert run_inside(cell, "snapshot_on_libvirt.py", 580) >= 20


@pytest.mark.timeout(400)
def test_contract(cell: Cell, images: None) -> None:
    assert run_inside(cell, "contract_on_libvirt.py::TestSnapshots", 380) >= 15
