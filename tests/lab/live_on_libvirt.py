"""Live migration between two real hosts: the contract, and what only guests show. Run inside the first host by
``test_libvirt_live``; the second has an agent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.two_hosts import TwoHosts
from tests.virt import contract_moves


@pytest.fixture
def world() -> Iterator[TwoHosts]:
    world = TwoHosts(resize_precopy="never")
    yield world
    world.close()


class TestLiveMove(contract_moves.LiveMoveContract):
    pass
