from __future__ import annotations

from pathlib import Path

from compute_worker.virt.libvirt.transfer import plan
from compute_worker.virt.libvirt.transfer.plan import Plan


def sample() -> Plan:
    return Plan(token="precopy-1", size=1000, cluster=10, window=100, data=[(0, 20), (190, 310)], blank=[(20, 30)])


def test_windows_are_those_that_it_touches() -> None:
    assert sample().planned == [(0, 30), (190, 310)]
    assert sample().windows(sample().planned) == [0, 1, 2, 3]
    assert sample().windows([(100, 200)]) == [1]


def test_only_the_top_layer_counts() -> None:
    layers = [
        {"start": 0, "length": 10, "depth": 0, "present": True, "zero": False, "data": True},
        {"start": 10, "length": 10, "depth": 0, "present": True, "zero": True, "data": False},
        {"start": 20, "length": 10, "depth": 1, "present": True, "zero": False, "data": True},
        {"start": 30, "length": 10, "depth": 0, "present": False, "zero": True, "data": False},
        {"start": 40, "length": 10, "depth": 0, "present": True, "zero": False, "data": True},
        {"start": 50, "length": 10, "depth": 0, "present": True, "zero": False, "data": True},
    ]
    assert plan.from_layers(layers) == ([(0, 10), (40, 60)], [(10, 20)])


def test_kept_and_read(tmp_path: Path) -> None:
    assert plan.read(tmp_path, "disk") is None
    plan.path_of(tmp_path, "disk").parent.mkdir()
    plan.write(tmp_path, "disk", sample())
    assert plan.read(tmp_path, "disk") == sample()
    plan.path_of(tmp_path, "disk").write_bytes(b'{"token": 7}')
    assert plan.read(tmp_path, "disk") is None
