"""Hosts and clients over the broker inside this process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.rpc.hosts import Host


@pytest.fixture
def transport() -> Iterator[Any]:
    transport = get_transport("kombu+memory://")
    yield transport
    transport.cleanup()


@pytest.fixture
def name() -> str:
    """A host name of the test's own: the memory broker is one for the whole process."""
    return f"node-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def host(transport: Any, tmp_path: Path, name: str) -> Iterator[Host]:
    with Host(transport, tmp_path, name) as host:
        yield host


@pytest.fixture
def api(transport: Any) -> ComputeAPI:
    return ComputeAPI(transport, timeout=10)
