from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.discovery import find_hosts
from compute_worker.rpc.transport import get_transport
from tests.examples.daemon import Daemon
from tests.functional.conftest import rabbit  # noqa: F401
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for


@pytest.fixture
def daemons(rabbit: Rabbit, tmp_path: Path) -> Iterator[list[Daemon]]:  # noqa: F811
    """Two workers that answer, and an image `image` in their store."""
    made = [Daemon(rabbit.url(), tmp_path, f"ex{number}-{tmp_path.name[-12:]}".replace("_", "-")) for number in (1, 2)]
    (tmp_path / "images" / "image").write_bytes(b"an image")
    transport = get_transport(rabbit.url())
    api = ComputeAPI(transport)
    try:
        for daemon in made:
            daemon.start()
        names = {daemon.host for daemon in made}

        def all_answer() -> bool:
            return names <= {s.host for s in find_hosts(transport, api, 1.0, enough=lambda f: len(f) >= len(names))}

        wait_for(all_answer, 20, f"{names} to answer; see {[d.log.read_text()[-500:] for d in made]}")
        yield made
    finally:
        for daemon in made:
            daemon.stop()
        transport.cleanup()
