"""A delete that comes at any step of a move, to either host."""

from __future__ import annotations

import pytest

from compute_worker.states import OperationState
from tests.manager.cell import DESTINATION, SOURCE, UUID
from tests.manager.machine import quiet_deaths
from tests.manager.movematrix import PLAIN, name_of, prepared
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_deaths(monkeypatch)


DELETES = [(s, h, p) for s, h, p in PLAIN if p[2] == "do" and p[3] == "before_do"]


@pytest.mark.parametrize("at", [SOURCE, DESTINATION])
@pytest.mark.parametrize(("scene", "host", "point"), DELETES, ids=name_of)
def test_deleted_at_every_step(tmp_path, scene, host, point, at):
    """A delete that comes at any step, to either host, wins on both."""
    cell = prepared(scene, tmp_path)
    deletes: list[str] = []
    cell[host].at[point] = lambda: deletes.append(cell[at].send("terminate_instance", UUID))
    scene.send(cell)
    wait_for(lambda: deletes, what="the delete")
    assert cell[at].outcome(deletes[0]).state is OperationState.DONE
    cell.quiet()
    assert cell.simulated.violations == []
    assert cell.owners() == []
    assert cell.simulated.running_copies(UUID) == []
    for name in cell.machines:
        assert cell.leftovers(name) == set(), name
        assert cell.used_mb(name) == 0, name
    cell.close()
