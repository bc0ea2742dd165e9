"""From the record of an instance to the XML of its guest. Pure: the same input gives the same document.

What a guest sees of its hardware follows from its record, its ``disk.info`` and the options alone, so that a definition
made anew (at each start) is the one that it had; only the machine type is carried over from the old definition, as the
hypervisor's default grows with its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compute_worker.config import Libvirt
from compute_worker.objects import Disk as DiskRecord
from compute_worker.objects import DiskInfo, Instance, Vif
from compute_worker.virt.checks import tap_name
from compute_worker.virt.libvirt import domain as xml
from compute_worker.virt.libvirt import domain_devices as devices
from compute_worker.virt.libvirt.domain_disk import BackingStore, Disk
from compute_worker.virt.libvirt.xmlvalues import readable

CONSOLE_LOG = "console.log"
CONFIG_DRIVE = "disk.config"
KERNEL = "kernel"
RAMDISK = "ramdisk"
DEFAULT_CMDLINE = "root=/dev/vda console=ttyS0"
_X86 = frozenset({"x86_64", "i686"})


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the host brings to every guest. ``machine`` empty: the hypervisor's default; ``direct_io``: whether the
    instances' file system can (``O_DIRECT``)."""

    domain_type: str
    arch: str
    machine: str = ""
    direct_io: bool = True

    @property
    def is_x86(self) -> bool:
        """Whether guests are PCs."""
        return self.arch in _X86


@dataclass(frozen=True, slots=True)
class Places:
    """Where the instance's files are, as the hypervisor reaches them."""

    directory: Path
    base: Path


def domain_name(uuid: str) -> str:
    """libvirt's name of an instance's guest: unique, and nothing a tenant wrote."""
    return f"instance-{uuid}"


def metadata(instance: Instance, host: str) -> xml.InstanceMetadata:
    """What the guest carries of its record: enough to say who may start it."""
    return xml.InstanceMetadata(
        uuid=instance.uuid,
        owner=instance.host or host,
        generation=instance.generation,
        migration=instance.migration,
    )


def build(
    instance: Instance, info: DiskInfo, places: Places, hardware: Hardware, options: Libvirt, host: str
) -> xml.Domain:
    """The whole guest.

    :param host: this worker's name, the owner where the record names none.
    """
    return xml.Domain(
        type=hardware.domain_type,
        name=domain_name(instance.uuid),
        uuid=instance.uuid,
        title=readable(instance.name) or None,
        instance=metadata(instance, host),
        memory_kib=instance.flavor.memory_mb * 1024,
        current_memory_kib=instance.flavor.memory_mb * 1024,
        vcpus=instance.flavor.vcpus,
        sysinfo=_sysinfo(instance),
        os=_os(instance, places, hardware),
        features=xml.Features(acpi=True, apic=True) if hardware.is_x86 else None,
        cpu=_cpu(hardware, options),
        clock=_clock(hardware),
        on_poweroff="destroy",
        on_reboot="restart",
        on_crash="destroy",
        devices=_devices(instance, info, places, hardware, options),
    )


def _sysinfo(instance: Instance) -> xml.Sysinfo:
    return xml.Sysinfo(
        type="smbios",
        manufacturer="compute-worker",
        product="Virtual Machine",
        serial=instance.uuid,
        uuid=instance.uuid,
        family="Virtual Machine",
    )


def _os(instance: Instance, places: Places, hardware: Hardware) -> xml.Os:
    image = instance.image
    made = xml.Os(type="hvm", arch=hardware.arch, machine=hardware.machine or None, smbios_mode="sysinfo")
    if image.kernel_id is None:
        made.boot = [xml.BootDevice(dev="hd")]
        return made
    words = [image.properties.get("os_command_line") or DEFAULT_CMDLINE, instance.kernel_cmdline]
    made.kernel = str(places.directory / KERNEL)
    made.initrd = str(places.directory / RAMDISK) if image.ramdisk_id is not None else None
    made.cmdline = readable(" ".join(word.strip() for word in words if word.strip()))
    return made


def _cpu(hardware: Hardware, options: Libvirt) -> xml.Cpu | None:
    """An emulated processor is none of the host's: only a named model makes sense there."""
    mode = options.cpu_mode
    if mode == "custom" and options.cpu_model:
        return xml.Cpu(mode="custom", match="exact", model=options.cpu_model, model_fallback="forbid")
    if mode in ("host-model", "host-passthrough") and hardware.domain_type == "kvm":
        return xml.Cpu(mode=mode, check="partial" if mode == "host-model" else "none")
    return None


def _clock(hardware: Hardware) -> xml.Clock:
    timers = [xml.Timer(name="rtc", tickpolicy="catchup")]
    if hardware.is_x86:
        timers += [xml.Timer(name="pit", tickpolicy="delay"), xml.Timer(name="hpet", present=False)]
    return xml.Clock(offset="utc", timers=timers)


def _devices(
    instance: Instance, info: DiskInfo, places: Places, hardware: Hardware, options: Libvirt
) -> xml.Devices:
    made = xml.Devices(
        disks=_disks(info.disks, places, hardware, options),
        controllers=_controllers(info, hardware, options),
        interfaces=[interface(vif) for vif in instance.vifs],
        serials=[
            devices.Serial(
                type="pty", log_file=str(places.directory / CONSOLE_LOG), log_append=True, target_port=0
            )
        ],
        memballoon=devices.MemBalloon(model="virtio", stats_period=options.mem_stats_period or None),
    )
    if options.guest_agent:
        made.channels = [devices.Channel(type="unix", target_type="virtio", target_name=devices.GUEST_AGENT)]
    if options.rng_device:
        made.rngs = [
            devices.Rng(model="virtio", backend=devices.RngBackend(model="random", device=options.rng_device))
        ]
    if options.graphics != "none":
        made.graphics = [
            devices.Graphics(
                type=options.graphics,
                port=-1,
                autoport=True,
                listens=[devices.Listen(type="address", address=options.graphics_listen)],
            )
        ]
        made.videos = [devices.Video(model="vga" if hardware.is_x86 else "virtio")]
        made.inputs = [devices.Input(type="tablet", bus="usb")]
    return made


def _controllers(info: DiskInfo, hardware: Hardware, options: Libvirt) -> list[devices.Controller]:
    made = []
    if options.graphics == "none" and hardware.is_x86:
        made.append(devices.Controller(type="usb", model="none"))
    if not hardware.is_x86 and any(disk.name == CONFIG_DRIVE for disk in info.disks):
        made.append(devices.Controller(type="scsi", index=0, model="virtio-scsi"))
    return made


def _disks(records: Sequence[DiskRecord], places: Places, hardware: Hardware, options: Libvirt) -> list[Disk]:
    plain = [record for record in records if record.name != CONFIG_DRIVE]
    made = [_disk(record, f"vd{_letters(n)}", places, hardware, options) for n, record in enumerate(plain)]
    made += [_config_drive(record, places, hardware) for record in records if record.name == CONFIG_DRIVE]
    return made


def _disk(record: DiskRecord, target: str, places: Places, hardware: Hardware, options: Libvirt) -> Disk:
    cache = options.disk_cachemode
    if cache == "none" and not hardware.direct_io:
        cache = "writeback"
    return Disk(
        type="file",
        device="disk",
        driver_name="qemu",
        driver_type=record.format,
        driver_cache=cache,
        driver_io="native" if cache == "none" else "threads",
        driver_discard="unmap" if options.disk_discard else None,
        source_file=str(places.directory / record.name),
        backing_store=_backing(record, places),
        target_dev=target,
        target_bus="virtio",
    )


def _backing(record: DiskRecord, places: Places) -> BackingStore:
    """The whole chain, ended: libvirt probes nothing and follows no name that stands in an image."""
    if record.backing is None:
        return BackingStore()
    return BackingStore(
        type="file",
        format=record.backing_format or "raw",
        source_file=str(places.base / record.backing),
        backing_store=BackingStore(),
    )


def _config_drive(record: DiskRecord, places: Places, hardware: Hardware) -> Disk:
    bus = "scsi" if not hardware.is_x86 else "sata" if "q35" in hardware.machine else "ide"
    return Disk(
        type="file",
        device="cdrom",
        driver_name="qemu",
        driver_type="raw",
        source_file=str(places.directory / record.name),
        backing_store=BackingStore(),
        target_dev="hda" if bus == "ide" else "sda",
        target_bus=bus,
        readonly=True,
    )


def _letters(number: int) -> str:
    """0: a, 25: z, 26: aa."""
    high, low = divmod(number, 26)
    return (_letters(high - 1) if high else "") + chr(ord("a") + low)


def interface(vif: Vif) -> devices.Interface:
    """A tap of libvirt's on a bridge; with no bridge: one that nothing is plugged into, its carrier off."""
    made = devices.Interface(
        type="bridge" if vif.bridge else "ethernet",
        mac=vif.mac,
        source_bridge=vif.bridge,
        target_dev=tap_name(vif.id, vif.devname),
        model=vif.model,
        mtu=vif.mtu,
    )
    if vif.bridge is None:
        made.link_state = "down"
    return made
