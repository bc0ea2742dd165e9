"""Sides of moves as rows."""

from __future__ import annotations

import pytest

from compute_worker import errors
from compute_worker import moves as moves_module
from compute_worker.moves import Move, Moves, Side
from compute_worker.objects import DiskInfo, Flavor, ImageMeta, Instance, Migration
from compute_worker.operations.database import Database
from compute_worker.operations.schema import SCHEMA
from compute_worker.states import MigrationStatus

INSTANCE = Instance(
    uuid="00000000-0000-4000-8000-000000000001", flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="i")
)
FIRST, SECOND = (f"cccccccc-0000-4000-8000-00000000000{n}" for n in (1, 2))


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "journal.sqlite", (SCHEMA, moves_module.SCHEMA))
    yield database
    database.close()


def move(uuid: str = FIRST, side: Side = Side.SOURCE, **changes) -> Move:
    migration = Migration(uuid=uuid, instance=INSTANCE.uuid, source_host="a", dest_host=changes.pop("dest", "b"))
    return Move(migration=migration, side=side, instance=INSTANCE, operation=uuid, **changes)


def test_both_sides_of_a_move_in_place_are_two_rows(database):
    moves = Moves(database)
    for side in Side:
        database.write(lambda tx, s=side: moves.put(tx, move(side=s, dest="a")))
    assert {m.side for m in moves.list()} == set(Side)
    assert all(m.same_host for m in moves.list())
    assert moves.get(FIRST, Side.SOURCE).other == "a"


def test_both_sides_work_on_the_same_files_in_place_and_on_shared_storage():
    assert move(dest="a").one_directory
    assert move(disk_info=DiskInfo(shared=True)).one_directory
    assert not move().one_directory and not move(disk_info=DiskInfo()).one_directory


def test_what_is_closed_is_listed_only_when_asked_for(database):
    moves = Moves(database)
    database.write(lambda tx: moves.put(tx, move()))
    database.write(lambda tx: moves.put(tx, move(SECOND)))
    database.write(lambda tx: moves.change(tx, FIRST, Side.SOURCE, MigrationStatus.CONFIRMED))
    assert [m.migration.uuid for m in moves.list()] == [SECOND]
    assert [m.migration.uuid for m in moves.list(open_only=False)] == [SECOND, FIRST]
    assert [m.migration.uuid for m in database.read(lambda tx: moves.of(tx, INSTANCE.uuid))] == [SECOND]
    moves.prune(older_than=1e12)
    assert [m.migration.uuid for m in moves.list(open_only=False)] == [SECOND]


def test_a_delete_closes_everything(database):
    moves = Moves(database)
    database.write(lambda tx: moves.put(tx, move()))
    database.write(lambda tx: moves.close_all(tx, INSTANCE.uuid))
    assert moves.list() == []
    assert moves.get(FIRST, Side.SOURCE).refused == "the instance was deleted"


def test_a_side_that_is_not_this_hosts(database):
    moves = Moves(database)
    with pytest.raises(errors.MigrationNotFound, match=FIRST):
        moves.get(FIRST, Side.DESTINATION)
    assert database.write(lambda tx: moves.change(tx, FIRST, Side.SOURCE, forced=True)) is None
