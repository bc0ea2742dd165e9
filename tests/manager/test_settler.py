"""Which operation begins by itself about a move."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from compute_worker.manager.settler import Settler, decide
from compute_worker.moves import SCHEMA, Move, Moves, Side
from compute_worker.objects import Migration, MigrationState
from compute_worker.operations.database import Database
from compute_worker.operations.schema import SCHEMA as OPERATIONS
from compute_worker.states import MigrationStatus
from tests.manager.machine import make_instance
from tests.waiting import wait_for

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


class Peers:
    """Remembers which migrations it was asked about: none of them is decided."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_migration(self, uuid: str, side: str, *, host: str) -> MigrationState:
        self.asked.append(uuid)
        return there(M.FINISHED)


@pytest.fixture
def settling(tmp_path):
    """A settler that would ask again by itself in a minute, and three moves from here that wait for a decision."""
    database = Database(tmp_path / "journal", [OPERATIONS, SCHEMA])
    moves, peers = Moves(database), Peers()
    for number in (1, 2, 3):
        instance = make_instance(number)
        told = msgspec.structs.replace(
            migration(M.FINISHED), uuid=f"cccccccc-0000-4000-8000-{number:012d}", instance=instance.uuid
        )
        move = Move(migration=told, side=Side.SOURCE, instance=instance, operation=UUID)
        database.write(lambda tx, move=move: moves.put(tx, move))
    compute = SimpleNamespace(peer_ask_interval=60.0, resize_confirm_window=0.0)
    settings = SimpleNamespace(compute=compute)
    core = SimpleNamespace(settings=settings, database=database, moves=moves, quick_peers=peers)
    settler = Settler(core, None)
    settler.start()
    yield settler, peers, moves
    settler.stop()
    database.close()


def test_only_the_move_of_an_instance_that_changed_is_asked_about(settling):
    """However many wait: else each move to a decision would cost a question for every other one."""
    settler, peers, _ = settling
    wait_for(lambda: len(peers.asked) == 3, what="each to be asked about once")
    settler.wake(make_instance(2).uuid)
    wait_for(lambda: len(peers.asked) == 4, what="a fourth question")
    settler.wake(make_instance(3).uuid)
    wait_for(lambda: len(peers.asked) == 5, what="a fifth question")
    assert [uuid[-1] for uuid in peers.asked[3:]] == ["2", "3"]


def test_it_forgets_moves_that_are_closed(settling):
    settler, peers, moves = settling
    wait_for(lambda: len(peers.asked) == 3, what="each to be asked about once")
    settler._look_at_all(moves.list()[:1])
    assert [uuid[-1] for uuid, _ in settler._due] == ["1"]
