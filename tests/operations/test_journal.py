from __future__ import annotations

from compute_worker.operations import journal
from compute_worker.operations.database import Database
from compute_worker.operations.schema import SCHEMA
from compute_worker.states import OperationState


def test_a_page_of_open_operations_is_not_filled_up_with_ended_ones(tmp_path):
    database = Database(tmp_path / "j", (SCHEMA,))

    def add(tx, number, state):
        names = dict.fromkeys(("key", "uuid", "chain"), str(number))
        rest = {"derived_key": 0, "committed": 0, "digest": "", "kind": "k", "args": "{}"}
        journal.insert(tx, {**names, **rest, "state": state, "phase": state})

    for number in range(5):
        database.write(lambda tx, n=number: add(tx, n, OperationState.DONE))
    database.write(lambda tx: add(tx, 5, OperationState.RUNNING))
    page = database.read(lambda tx: journal.changed_since(tx, 0, limit=3, open_only=True))
    assert [entry.uuid for entry in page] == ["5"]
    assert len(database.read(lambda tx: journal.changed_since(tx, 0, limit=3))) == 3
    database.close()
