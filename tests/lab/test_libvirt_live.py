"""Live migration of the libvirt driver between two real hosts."""

from __future__ import annotations

import pytest

from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.test_libvirt_driver import run_inside
from tests.lab.test_libvirt_moves import other_host

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("chosen", "count", "seconds"), [("TestLiveMove", 17, 500)], ids=["contract"])
def test_live(cell: Cell, lab_guest: GuestImages, chosen: str, count: int, seconds: float) -> None:
    with other_host(cell, lab_guest):
        assert run_inside(cell, "live_on_libvirt.py", seconds, "-k", chosen) >= count
