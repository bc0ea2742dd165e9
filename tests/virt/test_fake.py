"""The fake driver keeps the contract of every driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.virt import contract, contract_moves, contract_snapshot
from tests.virt.fakeworld import FakeWorld


@pytest.fixture
def world() -> Iterator[FakeWorld]:
    world = FakeWorld()
    yield world
    assert world.cell.violations == []
    world.close()


class TestSpawn(contract.SpawnContract):
    pass


class TestRefusals(contract.RefusalContract):
    pass


class TestLifecycle(contract.LifecycleContract):
    pass


class TestFacts(contract.FactsContract):
    pass


class TestColdMoves(contract_moves.ColdMoveContract):
    pass


class TestLiveMoves(contract_moves.LiveMoveContract):
    pass


class TestSnapshots(contract_snapshot.SnapshotContract):
    pass
