"""The same with the workers of both hosts killed at once."""

from __future__ import annotations

import pytest

from tests.manager.machine import quiet_deaths
from tests.manager.movematrix import PLAIN, killed, name_of, prepared


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


@pytest.mark.parametrize(("scene", "host", "point"), PLAIN, ids=name_of)
def test_both_workers_killed_here(tmp_path, scene, host, point):
    killed(prepared(scene, tmp_path), scene, host, point, both=True)
