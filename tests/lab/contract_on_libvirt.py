"""The libvirt driver keeps the contract of every driver. Run inside a host of the lab by ``test_libvirt_driver``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lab.libvirt_world import LibvirtWorld
from tests.lab.settings import IMAGES_PATH
from tests.virt import contract, contract_snapshot
from tests.virt.world import SNAPSHOT


@pytest.fixture
def world() -> Iterator[LibvirtWorld]:
    world = LibvirtWorld()
    yield world
    world.close()


class TestSpawn(contract.SpawnContract):
    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(moves=st.lists(contract.MOVES, min_size=4, max_size=14))
    def test_parts_in_any_order_a_crash_can_make(self, world: LibvirtWorld, moves: list[str]) -> None:
        contract.SpawnContract.test_parts_in_any_order_a_crash_can_make.hypothesis.inner_test(self, world, moves)


class TestRefusals(contract.RefusalContract):
    pass


class TestLifecycle(contract.LifecycleContract):
    pass


class TestFacts(contract.FactsContract):
    pass


class SnapshotWorld(LibvirtWorld):
    supports = frozenset({SNAPSHOT})


class TestSnapshots(contract_snapshot.SnapshotContract):
    @pytest.fixture
    def world(self) -> Iterator[SnapshotWorld]:
        world = SnapshotWorld()
        before = world.images()
        yield world
        for name in world.images() - before:
            Path(IMAGES_PATH, name).unlink()
        world.close()
