"""Cold moves of the libvirt driver keep the contract of every driver: over libvirt's test driver, on both backends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virt import contract_moves
from tests.virt.libvirt.conftest import NODE
from tests.virt.libvirt.moveworld import MoveWorld

_numbers = itertools.count()


@pytest.fixture(params=["qcow2", "raw"])
def world(request: pytest.FixtureRequest, tmp_path: Path, able: None) -> Iterator[MoveWorld]:
    uris = {}
    for name in (MoveWorld.a, MoveWorld.b):
        path = tmp_path / f"{name}-{next(_numbers)}.xml"
        path.write_text(NODE)
        uris[name] = f"test://{path}"
    options = {"images_type": request.param}
    made = MoveWorld(tmp_path, uris, {MoveWorld.a: options, MoveWorld.b: options})
    yield made
    made.close()


class TestColdMove(contract_moves.ColdMoveContract):
    pass
