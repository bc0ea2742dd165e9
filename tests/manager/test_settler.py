"""Which operation begins by itself about a move."""

from __future__ import annotations

import pytest

from compute_worker.manager.settler import decide
from compute_worker.moves import Move, Side
from compute_worker.objects import Migration, MigrationState
from compute_worker.states import MigrationStatus
from tests.manager.machine import make_instance

M = MigrationStatus
UUID = "cccccccc-0000-4000-8000-000000000001"


def migration(status: M, dest: str = "node2") -> Migration:
    return Migration(
        uuid=UUID, instance=make_instance().uuid, source_host="node1", dest_host=dest, status=status
    )


def side(of: Side, status: M, **changes) -> Move:
    dest = changes.pop("dest", "node2")
    return Move(migration=migration(status, dest), side=of, instance=make_instance(), operation=UUID, **changes)


def there(status: M) -> MigrationState:
    return MigrationState(migration=migration(status), side="destination", operation=UUID)


@pytest.mark.parametrize(
    ("move", "answer", "window", "begins"),
    [
        (side(Side.DESTINATION, M.FINISHED, finished_at=0.0), None, 0.0, None),
        (side(Side.DESTINATION, M.FINISHED, finished_at=0.0), None, 200.0, None),
        (side(Side.DESTINATION, M.FINISHED, finished_at=0.0), None, 50.0, "confirm_resize"),
        (side(Side.DESTINATION, M.REVERTING, finished_at=0.0), None, 50.0, None),
        (side(Side.SOURCE, M.FINISHED), None, 50.0, None),
        (side(Side.SOURCE, M.FINISHED), there(M.FINISHED), 50.0, None),
        (side(Side.SOURCE, M.FINISHED), there(M.REVERTING), 50.0, None),
        (side(Side.SOURCE, M.FINISHED), there(M.CONFIRMING), 0.0, "drop_resize"),
        (side(Side.SOURCE, M.FINISHED), there(M.CONFIRMED), 0.0, "drop_resize"),
        (side(Side.SOURCE, M.FINISHED, forced=True), there(M.CONFIRMED), 0.0, None),
        (side(Side.SOURCE, M.FINISHED, dest="node1"), there(M.CONFIRMED), 0.0, None),
        (side(Side.SOURCE, M.POST_MIGRATING), there(M.CONFIRMED), 0.0, None),
    ],
)
def test_decide(move, answer, window, begins):
    kind, why = decide(move, answer, 100.0, window)
    assert kind == begins
    assert why
