"""The guest's XML for the host it goes to."""

from __future__ import annotations

import msgspec
import pytest

from compute_worker.config import Libvirt
from compute_worker.objects import Disk, DiskInfo, Flavor, ImageMeta, Instance, Vif
from compute_worker.virt.libvirt import xml_builder
from compute_worker.virt.libvirt.domain import Domain
from compute_worker.virt.libvirt.livemigration_xml import Journey, Place, rewrite, targets
from compute_worker.virt.libvirt.xml_builder import Hardware, Places

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
MIGRATION = "11111111-1111-4111-8111-111111111111"
HERE = Place(f"/here/{UUID}", "/here/_base")
THERE = Place(f"/there/is/{UUID}", "/there/is/_base")
DISKS = [
    Disk(name="disk", format="qcow2", virtual_size_bytes=1 << 30, backing="abc", backing_format="raw"),
    Disk(name="disk.eph0", format="qcow2", virtual_size_bytes=1 << 30, backing="ephemeral_1_ext4"),
    Disk(name="disk.config", format="raw", virtual_size_bytes=4096),
]
INSTANCE = Instance(
    uuid=UUID,
    host="node1",
    flavor=Flavor(vcpus=1, memory_mb=64),
    image=ImageMeta(id="i", kernel_id="k", ramdisk_id="r"),
    vifs=[Vif(id="22222222-2222-4222-8222-222222222222", mac="52:54:00:00:00:01", bridge="br0")],
)


def guest_xml(**options: object) -> str:
    from pathlib import Path

    places = Places(Path(HERE.instance), Path(HERE.base))
    hardware = Hardware("qemu", "x86_64", "pc-q35-7.2")
    return xml_builder.build(
        INSTANCE, DiskInfo(disks=DISKS), places, hardware, Libvirt(**options), "node1"  # type: ignore[arg-type]
    ).to_xml()


def moved(xml: str, journey: Journey, instance: Instance = INSTANCE) -> str:
    marked = msgspec.structs.replace(instance, migration=MIGRATION)
    return rewrite(xml, instance, journey, xml_builder.metadata(marked, "node1"))


def test_no_path_of_the_source_is_left() -> None:
    text = moved(guest_xml(), Journey(HERE, THERE, DISKS[:2]))
    assert "/here/" not in text
    guest = Domain.parse(text)
    assert guest.os is not None and guest.devices is not None
    assert (guest.os.kernel, guest.os.initrd) == (f"{THERE.instance}/kernel", f"{THERE.instance}/ramdisk")
    assert guest.devices.serials[0].log_file == f"{THERE.instance}/console.log"
    assert [disk.source_file for disk in guest.devices.disks] == [f"{THERE.instance}/{disk.name}" for disk in DISKS]
    backing = [disk.backing_store.source_file for disk in guest.devices.disks if disk.backing_store]
    assert backing == [f"{THERE.base}/abc", f"{THERE.base}/ephemeral_1_ext4", None]


def test_there_and_back_it_is_the_same() -> None:
    xml = Domain.parse(moved(guest_xml(), Journey(HERE, HERE))).to_xml()
    there = moved(xml, Journey(HERE, THERE, DISKS[:2]))
    assert moved(there, Journey(THERE, HERE, DISKS[:2])) == xml


def test_a_disk_that_travelled_whole_stands_on_nothing() -> None:
    whole = [msgspec.structs.replace(disk, backing=None) for disk in DISKS[:2]]
    guest = Domain.parse(moved(guest_xml(), Journey(HERE, THERE, whole)))
    assert guest.devices is not None
    for disk in guest.devices.disks:
        assert disk.backing_store is not None and disk.backing_store.source_file is None


def test_without_disks_that_travel_the_chain_keeps_its_shape() -> None:
    guest = Domain.parse(moved(guest_xml(), Journey(HERE, THERE)))
    assert guest.devices is not None
    first = guest.devices.disks[0].backing_store
    assert first is not None and first.source_file == f"{THERE.base}/abc" and first.format == "raw"


def test_what_is_not_ours_stays() -> None:
    """CVE-2020-17376 is about paths that mean something else there; one outside the instance is its owner's to name."""
    guest = Domain.parse(guest_xml())
    assert guest.devices is not None
    guest.devices.disks[1].source_file = "/dev/mapper/volume"
    guest.devices.disks[2].source_file = f"{HERE.instance}/../other/disk"
    found = Domain.parse(moved(guest.to_xml(), Journey(HERE, THERE, DISKS[:2])))
    assert found.devices is not None
    assert found.devices.disks[1].source_file == "/dev/mapper/volume"
    assert found.devices.disks[2].source_file != f"{THERE.instance}/disk.config"


def test_it_says_by_which_migration_it_comes() -> None:
    guest = Domain.parse(moved(guest_xml(), Journey(HERE, THERE)))
    assert guest.instance is not None
    assert (guest.instance.owner, guest.instance.migration) == ("node1", MIGRATION)


@pytest.mark.parametrize(("listen", "wanted"), [("10.0.0.2", "10.0.0.2"), ("", "127.0.0.1")])
def test_graphics_listen_there(listen: str, wanted: str) -> None:
    guest = Domain.parse(moved(guest_xml(graphics="vnc"), Journey(HERE, THERE, graphics_listen=listen)))
    assert guest.devices is not None
    assert [item.address for item in guest.devices.graphics[0].listens] == [wanted]


def test_interfaces_are_plugged_in_by_their_mac() -> None:
    other = msgspec.structs.replace(
        INSTANCE, vifs=[msgspec.structs.replace(INSTANCE.vifs[0], bridge="br7", devname="tapx")]
    )
    guest = Domain.parse(moved(guest_xml(), Journey(HERE, THERE), other))
    assert guest.devices is not None
    assert (guest.devices.interfaces[0].source_bridge, guest.devices.interfaces[0].target_dev) == ("br7", "tapx")
    unknown = msgspec.structs.replace(INSTANCE, vifs=[])
    guest = Domain.parse(moved(guest_xml(), Journey(HERE, THERE), unknown))
    assert guest.devices is not None and guest.devices.interfaces[0].source_bridge == "br0"


def test_targets_are_exactly_the_disks_asked_for() -> None:
    assert targets(guest_xml(), HERE, ["disk", "disk.eph0"]) == ["vda", "vdb"]
    assert targets(guest_xml(), HERE, ["disk.eph0"]) == ["vdb"]
    assert targets(guest_xml(), THERE, ["disk"]) == []
