"""Bridges: found, missing, or something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_worker.errors import GuestFailed
from compute_worker.network.vifs import check_bridges, is_bridge
from compute_worker.objects import Flavor, ImageMeta, Instance, Vif

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
VIF = "99999999-9999-4999-8999-999999999999"


@pytest.fixture
def sys_net(tmp_path: Path) -> Path:
    (tmp_path / "br0" / "bridge").mkdir(parents=True)
    (tmp_path / "eth0").mkdir()
    return tmp_path


def instance(*bridges: str | None) -> Instance:
    vifs = [Vif(id=VIF, mac=f"52:54:00:00:00:0{number}", bridge=name) for number, name in enumerate(bridges)]
    return Instance(uuid=UUID, flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="i"), vifs=vifs)


def test_a_bridge_that_is_there(sys_net: Path) -> None:
    assert is_bridge("br0", sys_net)
    assert not is_bridge("eth0", sys_net)
    check_bridges(instance("br0", None), sys_net)


@pytest.mark.parametrize(("name", "why"), [("br9", "does not exist on this host"), ("eth0", "is not a Linux bridge")])
def test_a_bridge_that_is_not(sys_net: Path, name: str, why: str) -> None:
    with pytest.raises(GuestFailed, match=f"{VIF} wants bridge {name}, which {why}") as caught:
        check_bridges(instance("br0", name), sys_net)
    assert caught.value.instance == UUID  # type: ignore[attr-defined]
