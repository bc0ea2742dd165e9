from __future__ import annotations

import base64
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, ImageMeta, InjectedFile
from compute_worker.virt.driver import SpawnRequest
from compute_worker.virt.libvirt.disks import ephemeral
from compute_worker.virt.libvirt.disks.plan import DiskPlan, plan
from tests.virt.libvirt.disks.support import instance

EVERYTHING = frozenset(ephemeral.FORMATS) | {"swap"}


def planned(
    flavor: dict[str, Any] | None = None,
    bdi: BlockDeviceInfo | None = None,
    request: SpawnRequest | None = None,
    image: ImageMeta | None = None,
    available: frozenset[str] = EVERYTHING,
    **fields: Any,
) -> DiskPlan:
    guest = instance(
        image or ImageMeta(id="img"), flavor, block_device_info=bdi or BlockDeviceInfo(), **fields
    )
    return plan(guest, request or SpawnRequest(), "ext4", available)


def names(made: DiskPlan) -> list[tuple[str, str]]:
    return [(blank.name, blank.base) for blank in made.blanks]


def eph(size_gb: int, guest_format: str | None = None) -> EphemeralDisk:
    return EphemeralDisk(size_gb=size_gb, guest_format=guest_format)


def test_nothing_asked_nothing_made() -> None:
    assert planned() == DiskPlan()


def test_the_flavor_alone() -> None:
    made = planned({"ephemeral_gb": 5, "swap_mb": 64})
    assert names(made) == [("disk.local", "ephemeral_5_ext4"), ("disk.swap", "swap_64")]
    assert [blank.size_bytes for blank in made.blanks] == [5 << 30, 64 << 20]


def test_a_list_replaces_disk_local() -> None:
    listed = BlockDeviceInfo(ephemerals=[eph(1), eph(2, "xfs"), eph(1)])
    assert names(planned({"ephemeral_gb": 5}, listed)) == [
        ("disk.eph0", "ephemeral_1_ext4"),
        ("disk.eph1", "ephemeral_2_xfs_1"),
        ("disk.eph2", "ephemeral_1_ext4_2"),
    ]


def test_swap_that_is_asked_for_overrides_within_the_flavor() -> None:
    assert names(planned({"swap_mb": 64}, BlockDeviceInfo(swap_mb=32))) == [("disk.swap", "swap_32")]
    assert names(planned({"swap_mb": 64}, BlockDeviceInfo(swap_mb=0))) == []
    with pytest.raises(errors.InvalidCommand, match="64 MiB"):
        planned({"swap_mb": 64}, BlockDeviceInfo(swap_mb=65))


def test_more_than_the_flavor_was_never_claimed() -> None:
    with pytest.raises(errors.InvalidCommand, match="exceed the 2 GiB"):
        planned({"ephemeral_gb": 2}, BlockDeviceInfo(ephemerals=[eph(1), eph(2)]))


def test_formats_nobody_can_make() -> None:
    with pytest.raises(errors.InvalidBDMFormat, match="'zfs'"):
        planned({"ephemeral_gb": 2}, BlockDeviceInfo(ephemerals=[eph(1), eph(1, "zfs")]))
    with pytest.raises(errors.InvalidBDMFormat, match="mkswap"):
        planned({"swap_mb": 1}, available=EVERYTHING - {"swap"})


def test_volumes_are_refused() -> None:
    with pytest.raises(errors.NotSupported, match="volume"):
        planned(bdi=BlockDeviceInfo(block_device_mapping=[{"connection_info": {}}]))


def test_an_image_that_needs_more_memory() -> None:
    with pytest.raises(errors.InvalidCommand, match="128 MiB"):
        planned(image=ImageMeta(id="img", min_ram_mb=128))


@pytest.mark.parametrize(
    ("fields", "request_"),
    [
        ({"config_drive": True}, SpawnRequest()),
        ({}, SpawnRequest(injected_files=[InjectedFile(path="/etc/motd", content_base64="aGk=")])),
        ({}, SpawnRequest(admin_password="sesame")),
    ],
)
def test_a_config_drive_where_something_must_be_told(fields: dict[str, Any], request_: SpawnRequest) -> None:
    assert planned(request=request_, **fields).config_drive


@pytest.mark.parametrize("content", ["no base64!", "aGk", "aGk=\n"])
def test_injected_content_must_be_base64(content: str) -> None:
    with pytest.raises(errors.InvalidCommand, match="/etc/motd"):
        planned(request=SpawnRequest(injected_files=[InjectedFile(path="/etc/motd", content_base64=content)]))


def test_injected_content_is_bounded() -> None:
    half = base64.b64encode(bytes(40_000)).decode()
    files = [InjectedFile(path=f"/x{index}", content_base64=half) for index in range(2)]
    with pytest.raises(errors.InvalidCommand, match="80000 bytes"):
        planned(request=SpawnRequest(injected_files=files))
