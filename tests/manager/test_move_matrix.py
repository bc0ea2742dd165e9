"""Every step of a move, with the worker of either host killed at it: nobody has to repair anything, and there are never
two running copies."""

from __future__ import annotations

import pytest

from tests.manager.machine import quiet_deaths
from tests.manager.movematrix import CELLS, killed, name_of, prepared


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.mark.parametrize(("scene", "host", "point"), CELLS, ids=name_of)
def test_one_worker_killed_here(tmp_path, scene, host, point):
    killed(prepared(scene, tmp_path), scene, host, point, both=False)


def test_the_matrix_is_as_large_as_it_should_be():
    assert len({(h, p[0], p[1]) for _, h, p in CELLS}) >= 30
