from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ctl.cell import IMAGE, KERNEL, CtlCell


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlCell]:
    """Two hosts that answer, with an image and a kernel."""
    directory = tmp_path_factory.mktemp("cell")
    with CtlCell(["node1", "node2"], directory, compute={"max_concurrent_builds": 2}) as cell:
        for name in (IMAGE, KERNEL):
            (directory / "images" / name).write_bytes(name.encode() * 100)
        cell.ready()
        yield cell
