"""Cold moves of the libvirt driver keep the contract of every driver: over libvirt's test driver, on both backends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.virt import contract_moves
from tests.virt.libvirt.moveworld import MoveWorld


@pytest.fixture(params=["qcow2", "raw"])
def world(request: pytest.FixtureRequest, move_world: Callable[..., MoveWorld]) -> MoveWorld:
    return move_world(images_type=request.param)


class TestColdMove(contract_moves.ColdMoveContract):
    pass
