"""What the host brings."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.virt.boot import boot_id
from compute_worker.virt.libvirt import resources
from compute_worker.virt.libvirt.resources import ID_FILE, Resources, can_direct_io, instances_id


def test_resources_of_the_host(host: Any, tmp_path: Path) -> None:
    found = Resources(host, tmp_path).get()
    assert (found.vcpus, found.memory_mb, found.hypervisor_type) == (4, 4096, "TEST")
    assert 0 < found.disk_free_gb <= found.disk_gb
    assert found.boot_id == boot_id()
    assert found.cpu_info["domain_type"] == "test"


def test_they_are_asked_again_after_ten_seconds(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(resources.time, "monotonic", lambda: now[0])
    made = Resources(host, tmp_path)
    asked: list[float] = []
    ask = made._ask
    monkeypatch.setattr(made, "_ask", lambda: asked.append(now[0]) or ask())
    for now[0] in (100.0, 105.0, 110.0, 110.5, 120.0):
        made.get()
    assert asked == [100.0, 110.5]


def test_direct_io_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_direct_io(Path("/dev/shm")) in (True, False)
    real = os.open

    def refuses(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    assert can_direct_io(tmp_path) is False
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.Broken, match="nosuch"):
        can_direct_io(tmp_path / "nosuch")


def test_the_directory_says_which_it_is(host: Any, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert Resources(host, one).get().instances_id == instances_id(one) != instances_id(other) != ""
    assert [path.name for path in one.iterdir()] == [ID_FILE]
    (tmp_path / "mounted").symlink_to(one)
    assert instances_id(tmp_path / "mounted") == instances_id(one), "another host that sees the same files"


def test_hosts_that_come_at_once_agree(tmp_path: Path) -> None:
    start, seen = threading.Barrier(8), []

    def look() -> None:
        start.wait()
        seen.append(instances_id(tmp_path))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and len(set(seen)) == 1 and seen[0]
    assert [path.name for path in tmp_path.iterdir()] == [ID_FILE]


def test_an_id_that_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    (tmp_path / ID_FILE).mkdir()
    assert instances_id(tmp_path) == ""
    assert instances_id(tmp_path / "nosuch") == ""
