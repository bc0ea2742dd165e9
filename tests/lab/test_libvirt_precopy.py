"""Warm resize on a real libvirt, run in a host as the worker's user."""

from __future__ import annotations

import pytest

from tests.lab.cell import Cell
from tests.lab.test_libvirt_driver import images, run_inside

__all__ = ["images"]
pytestmark = pytest.mark.lab


@pytest.mark.timeout(300)
def test_precopy(cell: Cell, images: None) -> None:
    assert run_inside(cell, "precopy_on_libvirt.py", 280) == 4
