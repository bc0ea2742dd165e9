from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.objects import Capacity, HostState
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.discovery import find_hosts
from compute_worker.rpc.transport import get_transport
from tests.rpc.hosts import Host

NOTHING = Capacity(total=0, usable=0)


def state(host: str) -> HostState:
    return HostState(host=host, vcpus=NOTHING, memory_mb=NOTHING, disk_gb=NOTHING)


def answering(host: Host, api: ComputeAPI) -> Host:
    """`host`, which answers an announcement as a worker does."""
    host.notebook.on_announce = lambda topic: api.host_announced(topic, state(host.name))
    return host


def test_every_host_is_found(transport: Any, api: ComputeAPI, tmp_path: Path) -> None:
    with Host(transport, tmp_path / "a", "find-a") as a, Host(transport, tmp_path / "b", "find-b") as b:
        for host in (a, b):
            answering(host, api)
        found = find_hosts(transport, api, timeout=10, enough=lambda found: len(found) >= 2)
    assert [host.host for host in found] == ["find-a", "find-b"]


def test_answers_that_are_none_are_passed_over(transport: Any, api: ComputeAPI, host: Host) -> None:
    def answer(topic: str) -> None:
        prepared = api._broadcaster.prepare(topic=topic)
        prepared.cast({}, "something_else")
        prepared.cast({}, "host_announced", state={"host": "../x"})
        prepared.cast({}, "host_announced")
        api.host_announced(topic, state(host.name))

    host.notebook.on_announce = answer
    found = find_hosts(transport, api, timeout=10, enough=bool)
    assert [item.host for item in found] == [host.name]


def test_nobody_there_is_an_empty_list(transport: Any, api: ComputeAPI) -> None:
    assert find_hosts(transport, api, timeout=0.2) == []


def test_no_broker_is_an_error() -> None:
    nowhere = get_transport("rabbit://u:p@127.0.0.1:1/x")
    with pytest.raises(errors.PeerUnavailable, match="no broker"):
        find_hosts(nowhere, ComputeAPI(nowhere, retry=0), timeout=1)
