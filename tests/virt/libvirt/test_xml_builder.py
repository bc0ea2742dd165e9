"""The guest's XML from its record: valid by libvirt's schema whatever the record, and what it must say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker.config import Libvirt
from compute_worker.objects import Disk, DiskInfo, Flavor, ImageMeta, Instance, Vif
from compute_worker.virt.libvirt import xml_builder
from compute_worker.virt.libvirt.domain import Domain
from compute_worker.virt.libvirt.xml_builder import Hardware, Places
from tests.virt.libvirt.schema import errors_of

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
VIF = "99999999-9999-4999-8999-999999999999"
PLACES = Places(Path("/i", UUID), Path("/i/_base"))
PC = Hardware("qemu", "x86_64", "pc-i440fx-7.2")
ROOT = Disk(name="disk", format="qcow2", virtual_size_bytes=1 << 30, backing="abc", backing_format="raw")
SWAP = Disk(name="disk.swap", format="raw", virtual_size_bytes=1 << 20)
CONFIG = Disk(name="disk.config", format="raw", virtual_size_bytes=1 << 20)


def instance(**changes: Any) -> Instance:
    fields = {"uuid": UUID, "name": "n", "flavor": Flavor(vcpus=2, memory_mb=96), "image": ImageMeta(id="i")}
    return Instance(**(fields | changes))


def build(made: Instance, *disks: Disk, hardware: Hardware = PC, **options: Any) -> Domain:
    """Built, checked against the schema, and read back."""
    info = DiskInfo(disks=list(disks or (ROOT,)))
    text = xml_builder.build(made, info, PLACES, hardware, Libvirt(**options), "node1").to_xml()
    assert errors_of(text) == []
    return Domain.parse(text)


def test_sizes_names_and_metadata() -> None:
    made = instance(name="web <1>", host="node7", generation=3, migration=VIF)
    domain = build(made)
    assert (domain.name, domain.uuid, domain.title) == (f"instance-{UUID}", UUID, "web <1>")
    assert (domain.memory_kib, domain.vcpus, domain.type) == (96 * 1024, 2, "qemu")
    record = domain.instance
    assert record and (record.owner, record.generation, record.migration) == ("node7", 3, VIF)
    assert domain.sysinfo and domain.sysinfo.serial == UUID


def test_the_owner_is_this_host_where_the_record_names_none() -> None:
    record = build(instance()).instance
    assert record and (record.owner, record.migration) == ("node1", None)


def test_every_disk_says_its_format_and_ends_its_chain() -> None:
    root, swap, config = build(instance(), ROOT, SWAP, CONFIG).devices.disks  # type: ignore[union-attr]
    assert (root.target_dev, root.driver_type, root.source_file) == ("vda", "qcow2", f"/i/{UUID}/disk")
    assert root.backing_store and root.backing_store.source_file == "/i/_base/abc"
    assert root.backing_store.format == "raw" and root.backing_store.backing_store is not None
    assert root.backing_store.backing_store.type is None
    assert (swap.target_dev, swap.driver_type) == ("vdb", "raw")
    assert swap.backing_store is not None and swap.backing_store.type is None
    assert (config.device, config.readonly, config.target_bus) == ("cdrom", True, "ide")


@pytest.mark.parametrize(
    ("mode", "direct_io", "cache", "io"),
    [
        ("none", True, "none", "native"),
        ("none", False, "writeback", "threads"),
        ("writethrough", True, "writethrough", "threads"),
    ],
)
def test_native_io_needs_direct_io(mode: str, direct_io: bool, cache: str, io: str) -> None:
    hardware = Hardware("qemu", "x86_64", "pc", direct_io)
    disk = build(instance(), hardware=hardware, disk_cachemode=mode).devices.disks[0]  # type: ignore[union-attr]
    assert (disk.driver_cache, disk.driver_io) == (cache, io)


def test_boot_from_kernel_and_ramdisk() -> None:
    image = ImageMeta(id="i", kernel_id="k", ramdisk_id="r")
    system = build(instance(image=image, kernel_cmdline="quiet")).os
    assert system and (system.kernel, system.initrd) == (f"/i/{UUID}/kernel", f"/i/{UUID}/ramdisk")
    assert system.cmdline == "root=/dev/vda console=ttyS0 quiet"
    assert len(system.boot) == 0


def test_an_image_may_bring_its_own_command_line() -> None:
    image = ImageMeta(id="i", kernel_id="k", properties={"os_command_line": "console=hvc0"})
    system = build(instance(image=image)).os
    assert system and (system.cmdline, system.initrd) == ("console=hvc0", None)


def test_boot_from_disk() -> None:
    system = build(instance()).os
    assert system and system.kernel is None and [b.dev for b in system.boot] == ["hd"]
    assert system.machine == "pc-i440fx-7.2"


@pytest.mark.parametrize(
    ("domain_type", "options", "mode"),
    [
        ("qemu", {}, None),
        ("kvm", {}, "host-model"),
        ("kvm", {"cpu_mode": "host-passthrough"}, "host-passthrough"),
        ("kvm", {"cpu_mode": "none"}, None),
        ("qemu", {"cpu_mode": "custom", "cpu_model": "Nehalem"}, "custom"),
    ],
)
def test_an_emulated_processor_is_not_the_host_s(domain_type: str, options: dict[str, Any], mode: str | None) -> None:
    cpu = build(instance(), hardware=Hardware(domain_type, "x86_64"), **options).cpu
    assert (cpu.mode if cpu else None) == mode


def test_interfaces() -> None:
    vifs = [
        Vif(id=VIF, mac="52:54:00:00:00:01", bridge="br0", model="e1000", mtu=1400),
        Vif(id=UUID, mac="52:54:00:00:00:02", devname="mine0"),
    ]
    bridged, loose = build(instance(vifs=vifs)).devices.interfaces  # type: ignore[union-attr]
    assert (bridged.type, bridged.source_bridge, bridged.target_dev) == ("bridge", "br0", "tap99999999-99")
    assert (bridged.model, bridged.mtu, bridged.link_state) == ("e1000", 1400, None)
    assert (loose.type, loose.target_dev, loose.link_state) == ("ethernet", "mine0", "down")


def test_console_agent_randomness_and_statistics() -> None:
    devices = build(instance()).devices
    assert devices is not None
    assert devices.serials[0].log_file == f"/i/{UUID}/console.log" and devices.serials[0].log_append
    assert devices.channels[0].target_name == "org.qemu.guest_agent.0"
    assert devices.rngs[0].backend and devices.rngs[0].backend.device == "/dev/urandom"
    assert devices.memballoon and devices.memballoon.stats_period == 10
    assert len(devices.graphics) == 0


def test_what_is_switched_off_is_not_there() -> None:
    devices = build(instance(), guest_agent=False, rng_device="", mem_stats_period=0).devices
    assert devices is not None
    assert (len(devices.channels), len(devices.rngs)) == (0, 0)
    assert devices.memballoon and devices.memballoon.stats_period is None


def test_graphics_listen_where_they_are_told() -> None:
    devices = build(instance(), graphics="vnc", graphics_listen="127.0.0.9").devices
    assert devices is not None
    assert devices.graphics[0].listens[0].address == "127.0.0.9"
    assert len(devices.videos) == 1


@pytest.mark.parametrize(
    ("arch", "machine", "bus"), [("x86_64", "pc-q35-7.2", "sata"), ("x86_64", "pc", "ide"), ("aarch64", "virt", "scsi")]
)
def test_the_config_drive_s_bus(arch: str, machine: str, bus: str) -> None:
    disks = build(instance(), ROOT, CONFIG, hardware=Hardware("qemu", arch, machine)).devices.disks  # type: ignore[union-attr]
    assert disks[-1].target_bus == bus


def test_more_than_26_disks_have_names() -> None:
    many = [Disk(name=f"disk.eph{n}", format="raw", virtual_size_bytes=1) for n in range(30)]
    names = [disk.target_dev for disk in build(instance(), *many).devices.disks]  # type: ignore[union-attr]
    assert names[25:28] == ["vdz", "vdaa", "vdab"] and len(set(names)) == 30


TEXT = st.text(max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=TEXT, cmdline=TEXT, kernel=st.booleans())
def test_no_text_of_a_tenant_breaks_out(name: str, cmdline: str, kernel: bool) -> None:
    """Words of people end up as the text of one element, or not at all; libvirt's name is none of theirs."""
    image = ImageMeta(id="i", kernel_id="k" if kernel else None)
    made = instance(name=name.replace("\n", " "), image=image, kernel_cmdline=cmdline)
    info = DiskInfo(disks=[ROOT])
    text = xml_builder.build(made, info, PLACES, PC, Libvirt(), "node1").to_xml()
    plain = xml_builder.build(instance(image=image), info, PLACES, PC, Libvirt(), "node1").to_xml()
    assert _tags(text) - {"title"} == _tags(plain) - {"title"}
    assert Domain.parse(text).name == f"instance-{UUID}"


def _tags(text: str) -> set[str]:
    import xml.etree.ElementTree as ET

    return {node.tag for node in ET.fromstring(text).iter()}
