"""Hypothesis strategies for whole domains that make sense."""

from typing import Any

from hypothesis import strategies as st

from compute_worker.virt.libvirt import domain as d
from compute_worker.virt.libvirt import domain_devices as dev
from compute_worker.virt.libvirt import domain_disk as disk
from compute_worker.virt.libvirt.xmlmap import Element

PATHS = st.from_regex(r"\A/[A-Za-z0-9._-]{1,20}(/[A-Za-z0-9._ &'<>-]{1,20}){0,3}\Z")
NAMES = st.from_regex(r"\A[A-Za-z0-9_.-]{1,30}\Z")
MACS = st.from_regex(r"\A52:54:00(:[0-9a-f]{2}){3}\Z")
SMALL = st.integers(min_value=1, max_value=64)


def some(cls: type[Element], optional: dict[str, st.SearchStrategy[Any]] | None = None, **required: Any) -> Any:
    """The element with all that is required and any of what is optional."""
    fixed = {k: v if isinstance(v, st.SearchStrategy) else st.just(v) for k, v in required.items()}
    return st.fixed_dictionaries(fixed, optional=optional or {}).map(lambda values: cls(**values))


def choices(cls: type[Element], name: str) -> st.SearchStrategy[str]:
    """Any value that the property may take."""
    return st.sampled_from(cls.PROPERTIES[name].converter.values)


BACKING = st.recursive(
    st.builds(disk.BackingStore),
    lambda inner: some(
        disk.BackingStore, type="file", format=st.sampled_from(disk.FORMATS), source_file=PATHS, backing_store=inner
    ),
    max_leaves=3,
)
IOTUNE = st.one_of(
    some(disk.IoTune, {"group_name": NAMES, "size_iops_sec": SMALL}, total_bytes_sec=SMALL, total_iops_sec=SMALL),
    some(disk.IoTune, {"read_iops_sec": SMALL, "write_iops_sec": SMALL}, read_bytes_sec=SMALL, write_bytes_sec=SMALL),
)
DISK_OPTIONS = {
    "driver_cache": choices(disk.Disk, "driver_cache"),
    "driver_io": choices(disk.Disk, "driver_io"),
    "driver_discard": choices(disk.Disk, "driver_discard"),
    "driver_error_policy": choices(disk.Disk, "driver_error_policy"),
    "iotune": IOTUNE,
    "boot_order": SMALL,
    "readonly": st.just(True),
    "serial": NAMES,
}
DISKS = st.one_of(
    some(
        disk.Disk,
        {**DISK_OPTIONS, "backing_store": BACKING},
        type="file",
        device=choices(disk.Disk, "device"),
        driver_name="qemu",
        driver_type=st.sampled_from(disk.FORMATS),
        source_file=PATHS,
        target_dev=st.sampled_from(["vda", "sdb", "hda"]),
        target_bus=choices(disk.Disk, "target_bus"),
    ),
    some(disk.Disk, DISK_OPTIONS, type="block", device="disk", source_dev=PATHS, target_dev="vdb", target_bus="virtio"),
    some(
        disk.Disk,
        DISK_OPTIONS,
        type="network",
        device="disk",
        source_protocol="rbd",
        source_name=NAMES,
        source_hosts=st.lists(some(disk.SourceHost, {"port": SMALL}, name="10.0.0.1"), max_size=3),
        target_dev="vdc",
    ),
)
NIC_OPTIONS = {
    "mac": MACS,
    "model": st.sampled_from(["virtio", "e1000"]),
    "mtu": st.integers(68, 9000),
    "link_state": st.sampled_from(["up", "down"]),
    "boot_order": SMALL,
    "target_dev": st.from_regex(r"\Atap[0-9a-f]{4}\Z"),
    "filterref": some(dev.FilterRef, filter="clean-traffic"),
}
INTERFACES = st.one_of(
    some(dev.Interface, NIC_OPTIONS, type="bridge", source_bridge=st.from_regex(r"\Abr[0-9]{1,3}\Z")),
    some(dev.Interface, NIC_OPTIONS, type="network", source_network=NAMES),
    some(
        dev.Interface,
        {k: v for k, v in NIC_OPTIONS.items() if k != "target_dev"},
        type="ethernet",
        target_dev="tap0",
        target_managed=st.booleans(),
    ),
)
LOG = {"log_file": PATHS, "source_append": st.booleans(), "target_port": st.integers(0, 3)}
DEVICES = some(
    d.Devices,
    {
        "tpm": some(dev.Tpm, {"backend_version": st.sampled_from(["1.2", "2.0"])}, backend_type="emulator"),
        "memballoon": some(dev.MemBalloon, {"stats_period": SMALL}, model="virtio"),
        "watchdog": some(dev.Watchdog, model="i6300esb", action=choices(dev.Watchdog, "action")),
    },
    disks=st.lists(DISKS, max_size=4),
    interfaces=st.lists(INTERFACES, max_size=3),
    controllers=st.lists(
        some(dev.Controller, {"index": SMALL}, type=st.sampled_from(["usb", "sata", "scsi"])), max_size=2
    ),
    serials=st.lists(some(dev.Serial, LOG, type="file", source_path=PATHS), max_size=1),
    consoles=st.lists(some(dev.Console, LOG, type="pty"), max_size=1),
    channels=st.lists(some(dev.Channel, type="unix", target_type="virtio", target_name=dev.GUEST_AGENT), max_size=1),
    graphics=st.lists(
        some(
            dev.Graphics,
            {
                "autoport": st.booleans(),
                "listens": st.lists(some(dev.Listen, type="address", address="::1"), max_size=1),
            },
            type=st.sampled_from(["vnc", "spice"]),
        ),
        max_size=2,
    ),
    videos=st.lists(some(dev.Video, {"heads": SMALL}, model="virtio"), max_size=1),
    inputs=st.lists(some(dev.Input, type="tablet", bus=st.sampled_from(["usb", "virtio"])), max_size=1),
    rngs=st.lists(
        some(
            dev.Rng,
            {"rate_bytes": SMALL},
            model="virtio",
            backend=some(dev.RngBackend, model=choices(dev.RngBackend, "model")),
        ),
        max_size=1,
    ),
    panics=st.lists(some(dev.Panic, {"model": st.just("isa")}), max_size=1),
)
OS = st.one_of(
    some(d.Os, {"initrd": PATHS, "cmdline": NAMES, "smbios_mode": st.just("sysinfo")}, type="hvm", kernel=PATHS),
    some(
        d.Os,
        {"arch": st.just("x86_64"), "machine": st.sampled_from(["pc", "q35"]), "bootmenu": st.booleans()},
        type="hvm",
        boot=st.lists(some(d.BootDevice, dev=choices(d.BootDevice, "dev")), max_size=3),
    ),
)
CPUS = st.one_of(
    some(d.Cpu, mode=st.sampled_from(["host-model", "host-passthrough", "maximum"])),
    some(
        d.Cpu,
        {"match": choices(d.Cpu, "match"), "check": choices(d.Cpu, "check")},
        mode="custom",
        model=NAMES,
        sockets=SMALL,
        cores=SMALL,
        threads=SMALL,
        features=st.lists(some(d.CpuFeature, policy=choices(d.CpuFeature, "policy"), name=NAMES), max_size=4),
    ),
)
METADATA = some(
    d.InstanceMetadata,
    {"migration": st.uuids().map(str)},
    uuid=st.uuids().map(str),
    owner=NAMES,
    generation=st.integers(0, 1000),
)


def domains() -> st.SearchStrategy[d.Domain]:
    """Whole domains."""
    return some(
        d.Domain,
        {
            "title": NAMES,
            "instance": METADATA,
            "current_memory_kib": st.integers(1024, 1 << 30),
            "vcpu_current": SMALL,
            "vcpu_cpuset": st.sampled_from(["0", "0-3", "0,2,^3"]),
            "sysinfo": some(d.Sysinfo, type="smbios", serial=st.uuids().map(str), product=NAMES),
            "features": some(d.Features, {"acpi": st.just(True), "apic": st.just(True), "vmport": st.booleans()}),
            "cpu": CPUS,
            "clock": some(
                d.Clock,
                offset=st.sampled_from(["utc", "localtime"]),
                timers=st.lists(some(d.Timer, name="rtc", tickpolicy=choices(d.Timer, "tickpolicy")), max_size=2),
            ),
            "on_poweroff": choices(d.Domain, "on_poweroff"),
            "on_reboot": choices(d.Domain, "on_reboot"),
            "on_crash": choices(d.Domain, "on_crash"),
            "seclabels": st.lists(some(d.SecLabel, type="none"), max_size=1),
        },
        type=choices(d.Domain, "type"),
        name=NAMES,
        uuid=st.uuids().map(str),
        memory_kib=st.integers(1024, 1 << 30),
        vcpus=SMALL,
        os=OS,
        devices=DEVICES,
    )
