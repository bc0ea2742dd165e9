"""The destination's answers, one by one: each twice, each late, each hostile."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.virt.libvirt.transfer import requests
from compute_worker.virt.libvirt.transfer.export import Listening
from tests.virt.libvirt.transfer.support import (
    MIB,
    OTHER_MIGRATION,
    UUID,
    Pair,
    migration,
    noise,
    processes,
)
from tests.waiting import wait_for

Make = Callable[..., Pair]
OPEN = {"ask": "open", "name": "disk", "size": 3 * MIB, "window": MIB}


@pytest.fixture
def two(pair: Make) -> Pair:
    return pair(nbd_plaintext=True)


def listening(two: Pair) -> list[int]:
    return processes("qemu-nbd", str(two.arrived("disk")))


def test_begin_marks_the_directory_and_writes_the_record(two: Pair) -> None:
    for _ in range(2):
        answer = two.peer({"ask": "begin"})
    assert answer["path"] == str(two.there.path(UUID)) and answer["address"] == "127.0.0.1"
    record = two.there.read_record(UUID)
    assert record is not None and record.migration == two.migration.uuid
    assert "part" in {left.kind for left in two.there.list_leftovers()}


def test_begin_never_takes_what_is_there(two: Pair) -> None:
    two.there.create(UUID)
    (two.there.path(UUID) / "disk").write_bytes(b"somebody's")
    with pytest.raises(errors.DestinationDiskExists):
        two.peer({"ask": "begin"})
    two.peer({"ask": "remove"})
    assert (two.there.path(UUID) / "disk").read_bytes() == b"somebody's"


def test_begin_after_death_between_making_and_marking(two: Pair) -> None:
    two.there.create(UUID)
    (two.there.path(UUID) / "incoming.part.part").write_bytes(b"")
    two.peer({"ask": "begin"})
    assert two.there.read_record(UUID) is not None


def test_nothing_is_done_for_another_migration(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    two.migration = migration(OTHER_MIGRATION)
    with pytest.raises(errors.DestinationDiskExists):
        two.peer({"ask": "begin"})
    for request in (OPEN, {"ask": "finish", "name": "disk", "size": 1}, {"ask": "map", "name": "disk"}):
        with pytest.raises(errors.MigrationFailed):
            two.peer(request)
    two.peer({"ask": "remove"})
    assert two.arrived("disk.part").exists()


def test_open_twice_is_one_process(two: Pair) -> None:
    two.peer({"ask": "begin"})
    ports = {two.peer(OPEN)["port"] for _ in range(3)}
    assert len(ports) == 1
    wait_for(lambda: len(listening(two)) == 1, what="one qemu-nbd")
    assert two.arrived("disk.part").stat().st_size == 3 * MIB


def test_windows_are_kept_over_a_restart(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    assert two.peer({"ask": "windows", "name": "disk", "done": [(0, 0)]})["windows"] == [[0, 0]]
    assert two.peer({"ask": "windows", "name": "disk", "done": [(2, 2), (7, 9)]})["windows"] == [[0, 0], [2, 2]]
    two.restart()
    assert two.peer(OPEN)["windows"] == [[0, 0], [2, 2]]


def test_a_lost_part_is_not_believed(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    two.peer({"ask": "windows", "name": "disk", "done": [(0, 2)]})
    two.restart()
    two.arrived("disk.part").unlink()
    assert two.peer(OPEN)["windows"] == []


def test_finish_gives_the_name_once(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    for _ in range(2):
        two.peer({"ask": "finish", "name": "disk", "size": 3 * MIB})
    assert not listening(two)
    assert two.arrived().stat().st_size == 3 * MIB and two.arrived().stat().st_mode & 0o777 == 0o600
    assert two.peer(OPEN) == {"complete": True}
    assert not two.arrived("disk.windows.part").exists()


def test_finish_of_a_short_part_is_refused(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer({"ask": "place", "name": "disk"})
    with pytest.raises(errors.MigrationFailed, match="0 bytes instead of 5"):
        two.peer({"ask": "finish", "name": "disk", "size": 5})
    assert not two.arrived().exists()


def test_finish_of_nothing_is_refused(two: Pair) -> None:
    two.peer({"ask": "begin"})
    with pytest.raises(errors.Broken):
        two.peer({"ask": "finish", "name": "disk", "size": 5})


def test_remove_leaves_nothing(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    for _ in range(2):
        two.peer({"ask": "remove", "name": "disk"})
    assert two.tree() == set() and not listening(two)
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    for _ in range(2):
        two.peer({"ask": "remove"})
    assert two.tree() == set() and not listening(two)


def test_remove_of_one_keeps_the_other(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    two.peer({**OPEN, "name": "disk.local"})
    two.peer({"ask": "remove", "name": "disk"})
    assert f"{UUID}/disk.local.part" in two.tree() and f"{UUID}/disk.part" not in two.tree()


def test_settled_disks_are_no_longer_the_migrations(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    two.peer({"ask": "finish", "name": "disk", "size": 3 * MIB})
    for _ in range(2):
        two.receiver.settle(two.instance)
    assert two.tree() == {UUID, f"{UUID}/disk", f"{UUID}/instance.json"}
    two.peer({"ask": "remove"})
    two.peer({"ask": "remove", "name": "disk"})
    assert two.arrived().exists()


def test_nobody_sends_and_it_ends(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer(OPEN)
    (export,) = two.receiver._exports.values()
    export._touched -= 1000
    wait_for(lambda: not export.alive, what="qemu-nbd to end")
    assert two.peer(OPEN)["port"] and two.receiver._exports[UUID, "disk"] is not export


def test_qemu_nbd_dies_with_its_worker(tmp_path: Path) -> None:
    script = (
        "import sys,time; from pathlib import Path; from tests.virt.libvirt.transfer.support import Pair\n"
        "two = Pair(Path(sys.argv[1]), nbd_plaintext=True); two.peer({'ask': 'begin'})\n"
        f"two.peer({OPEN!r}); print('up', flush=True); time.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None and worker.stdout.readline() == b"up\n"
        wait_for(lambda: processes("qemu-nbd", str(tmp_path)), what="qemu-nbd to run")
    finally:
        worker.kill()
        worker.communicate()
    wait_for(lambda: not processes("qemu-nbd", str(tmp_path)), what="qemu-nbd to die with its worker")


def test_a_forgotten_rsync_is_ended(two: Pair, tmp_path: Path) -> None:
    """CVE-2015-3241: a copy that went on after its instance was deleted."""
    two.peer({"ask": "begin"})
    two.peer({"ask": "place", "name": "disk"})
    fake = tmp_path / "rsync"
    fake.symlink_to(sys.executable)
    script = f"import time; f = open({str(two.arrived('disk.part'))!r}, 'ab'); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([str(fake), "-c", script], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        two.peer({"ask": "remove"})
        assert child.wait(5) == -9
    finally:
        child.kill()
        child.communicate()


def test_pages_of_a_scattered_file(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer({"ask": "place", "name": "disk"})
    with open(two.arrived("disk.part"), "wb") as file:
        for number in range(requests.PAGE + 10):
            os.pwrite(file.fileno(), b"x", number * 8192)
    first = two.peer({"ask": "map", "name": "disk"})
    assert len(first["extents"]) == requests.PAGE and len(msgspec.json.encode(first)) < 500_000
    rest = two.peer({"ask": "map", "name": "disk", "at": first["next"]})
    assert len(rest["extents"]) == 10 and rest["next"] is None


def test_zeros_and_digests(two: Pair) -> None:
    two.peer({"ask": "begin"})
    two.peer({"ask": "place", "name": "disk"})
    two.arrived("disk.part").write_bytes(bytes(MIB) + noise(MIB))
    assert two.peer({"ask": "zeros", "name": "disk", "ranges": [(0, MIB)]}) == {"zero": True}
    assert two.peer({"ask": "zeros", "name": "disk", "ranges": [(0, 10), (MIB, MIB + 9)]}) == {"zero": False}
    one = two.peer({"ask": "digest", "name": "disk", "at": 0, "length": MIB})
    assert one == {"sha256": "30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58"}
    with pytest.raises(errors.InvalidCommand):
        two.peer({"ask": "zeros", "name": "disk", "ranges": [(0, 1 << 40)]})


NAMED = sorted(ask for ask, kind in requests.KINDS.items() if issubclass(kind, requests.NameRequest))
NAMES = ["../disk", "/etc/passwd", "", ".", "..", "-n", "a/b", "disk\n", "disk.part", "instance.json", "disk.info",
         "disk.windows", "a" * 200, None, 7, "incoming", "di\0sk"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ask", NAMED)
def test_names_that_are_no_disks(two: Pair, ask: str, name: Any) -> None:
    two.peer({"ask": "begin"})
    before = two.tree()
    fields = {"size": 1, "window": 4096, "at": 0, "length": 1, "ranges": []}
    with pytest.raises(errors.InvalidCommand):
        two.receiver.answer(two.instance, two.migration, {"ask": ask, "name": name, **fields})
    assert two.tree() == before


@pytest.mark.parametrize("request_", [{}, {"ask": "delete"}, {"ask": None}, {"ask": "open"}, {**OPEN, "size": -1},
                                      {**OPEN, "window": 0}, {**OPEN, "size": 1 << 70},
                                      {"ask": "probe", "name": "../../etc/hostname", "content": "0" * 32},
                                      {"ask": "digest", "name": "disk", "at": 0, "length": 1 << 40}])  # fmt: skip
def test_what_is_no_request(two: Pair, request_: dict[str, Any]) -> None:
    two.peer({"ask": "begin"})
    with pytest.raises(errors.InvalidCommand):
        two.receiver.answer(two.instance, two.migration, request_)


def test_a_link_in_place_of_a_part_is_not_followed(two: Pair, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"of the host")
    two.peer({"ask": "begin"})
    two.arrived("disk.part").symlink_to(victim)
    for request in ({"ask": "place", "name": "disk"}, {"ask": "map", "name": "disk"}):
        with pytest.raises(errors.Broken):
            two.peer(request)
    assert victim.read_bytes() == b"of the host"


steps = st.sampled_from(
    [
        {"ask": "begin"}, OPEN, {"ask": "place", "name": "disk"}, {"ask": "windows", "name": "disk", "done": [(0, 0)]},
        {"ask": "stop", "name": "disk"}, {"ask": "finish", "name": "disk", "size": 3 * MIB}, {"ask": "close"},
        {"ask": "remove", "name": "disk"}, {"ask": "remove"}, {"ask": "map", "name": "disk"}, {"ask": "restart"},
    ]
)  # fmt: skip


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=12))
def test_any_order_ends_clean(two: Pair, asked: list[dict[str, Any]]) -> None:
    for request in asked:
        if request["ask"] == "restart":
            two.restart()
            continue
        try:
            two.peer(request)
        except errors.Broken:
            continue
    two.peer({"ask": "remove"})
    assert two.tree() == set()
    wait_for(lambda: not listening(two), what="no qemu-nbd")


@pytest.mark.parametrize("ports", ["", "10900", "7-1", "0-5", "1-70000", "a-b"])
def test_ports_that_are_none(pair: Make, ports: str) -> None:
    with pytest.raises(errors.Broken, match=r"transfer\.ports"):
        pair(ports=ports)


def test_a_taken_port_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Listening("127.0.0.1", port, port + 20).bind() as found:
            assert port < found.getsockname()[1] <= port + 20
        with pytest.raises(errors.HypervisorBusy):
            Listening("127.0.0.1", port, port).bind()


def test_an_address_of_another_host() -> None:
    with pytest.raises(errors.Broken, match=r"transfer\.listen_address"):
        Listening("192.0.2.1", 10900, 10999).bind()


def test_facts_name_what_is_missing(pair: Make) -> None:
    facts = pair().peer({"ask": "facts"})
    assert facts["tls"] is False and "tls_dir" in facts["tls_problem"]
