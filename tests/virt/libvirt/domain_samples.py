"""A value for every declared property, in a domain where the schema allows it.

``SAMPLES[cls][name]`` gives the values (or a :class:`Case` with what the element needs beside them). Choices, truth
values and integers need no entry: their values come from the declaration. A text property without an entry is an error.
"""

from dataclasses import dataclass, field
from typing import Any

from compute_worker.virt.libvirt import domain as d
from compute_worker.virt.libvirt import domain_devices as dev
from compute_worker.virt.libvirt import domain_disk as disk
from compute_worker.virt.libvirt.xmlmap import Attr, Child, Children, Element, Flag, Kib, Property
from compute_worker.virt.libvirt.xmlvalues import Bool, Choice, Int

UUID = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
OTHER_UUID = "11111111-2222-4333-8444-555555555555"


@dataclass(frozen=True)
class Case:
    """Values for a property, and what else must (or, ``None``, must not) be set for the schema to accept them."""

    values: tuple[Any, ...] = ()
    beside: dict[str, Any] = field(default_factory=dict)


def minimal() -> d.Domain:
    """The least that libvirt takes."""
    return d.Domain(
        type="qemu",
        name="instance-1",
        uuid=UUID,
        memory_kib=65536,
        vcpus=1,
        os=d.Os(type="hvm"),
        devices=d.Devices(),
    )


NETWORK_DISK = {"type": "network", "source_file": None, "source_protocol": "rbd", "source_name": "pool/image"}
CHAR_BASE: dict[str, Any] = {"type": "pty"}
CHAR_SAMPLES: dict[str, Case] = {
    "source_path": Case(("/run/x.sock",), {"type": "unix"}),
    "source_host": Case(("127.0.0.1", "::1"), {"type": "tcp", "source_service": 4555}),
    "log_file": Case(("/var/lib/instances/u/console.log",)),
    "log_append": Case((), {"log_file": "/x/console.log"}),
    "alias": Case(("serial0",)),
}

BASES: dict[type[Element], dict[str, Any]] = {
    d.Domain: {},
    d.InstanceMetadata: {},
    d.BootDevice: {"dev": "hd"},
    d.Os: {"type": "hvm"},
    d.Sysinfo: {"type": "smbios"},
    d.Features: {},
    d.CpuFeature: {"name": "vmx", "policy": "disable"},
    d.Cpu: {"mode": "custom", "model": "qemu64"},
    d.Timer: {"name": "rtc"},
    d.Clock: {"offset": "utc"},
    d.SecLabel: {"type": "dynamic", "model": "apparmor"},
    d.Devices: {},
    disk.SourceHost: {"name": "10.0.0.1"},
    disk.BackingStore: {"type": "file", "format": "raw", "source_file": "/b", "backing_store": disk.BackingStore()},
    disk.IoTune: {},
    disk.Disk: {
        "type": "file",
        "device": "disk",
        "source_file": "/i/disk",
        "target_dev": "vda",
        "target_bus": "virtio",
    },
    dev.FilterParameter: {"name": "IP", "value": "10.0.0.2"},
    dev.FilterRef: {"filter": "clean-traffic"},
    dev.VirtualPort: {"type": "openvswitch"},
    dev.Interface: {"type": "bridge", "source_bridge": "br0", "mac": "52:54:00:00:00:01"},
    dev.Serial: CHAR_BASE,
    dev.Console: CHAR_BASE,
    dev.Channel: {"type": "unix", "target_type": "virtio", "target_name": dev.GUEST_AGENT},
    dev.Listen: {"type": "address"},
    dev.Graphics: {"type": "vnc"},
    dev.Video: {"model": "virtio"},
    dev.Rng: {"model": "virtio", "backend": dev.RngBackend(model="builtin")},
    dev.RngBackend: {"model": "random"},
    dev.MemBalloon: {"model": "virtio"},
    dev.Watchdog: {"model": "i6300esb"},
    dev.Input: {"type": "tablet", "bus": "usb"},
    dev.Controller: {"type": "virtio-serial"},
    dev.Panic: {},
    dev.Tpm: {"model": "tpm-crb", "backend_type": "emulator"},
}
CLASSES = tuple(BASES)

SAMPLES: dict[type[Element], dict[str, Case]] = {
    d.Domain: {
        "name": Case(("instance-1", "a b", "ü")),
        "uuid": Case((OTHER_UUID,)),
        "title": Case(("web server",)),
        "description": Case(("what it is for",)),
        "vcpu_cpuset": Case(("0-3,^2", "1")),
    },
    d.InstanceMetadata: {
        "uuid": Case((UUID,)),
        "owner": Case(("node1",)),
        "migration": Case((OTHER_UUID,)),
    },
    d.Os: {
        "arch": Case(("x86_64", "aarch64")),
        "machine": Case(("pc", "q35", "pc-q35-7.2")),
        "loader": Case(("/usr/share/OVMF/OVMF_CODE.fd",)),
        "nvram": Case(("/var/lib/nvram/x.fd",)),
        "nvram_template": Case(("/usr/share/OVMF/OVMF_VARS.fd",), {"nvram": "/n"}),
        "kernel": Case(("/i/kernel",)),
        "initrd": Case(("/i/ramdisk",), {"kernel": "/i/kernel"}),
        "cmdline": Case(("console=ttyS0 quiet \"a\" 'b' <&>",), {"kernel": "/i/kernel"}),
    },
    d.Sysinfo: {
        "manufacturer": Case(("compute_worker",)),
        "product": Case(("compute_worker",)),
        "version": Case(("1.0",)),
        "serial": Case((UUID,)),
        "uuid": Case((UUID,)),
        "family": Case(("Virtual Machine",)),
    },
    d.CpuFeature: {"name": Case(("pcid", "spec-ctrl"))},
    d.Cpu: {
        "model": Case(("qemu64", "Skylake-Client-IBRS")),
        "migratable": Case((), {"mode": "host-passthrough", "model": None}),
        "vendor": Case(("Intel",)),
        "sockets": Case((1, 2), {"cores": 2, "threads": 1}),
        "dies": Case((1,), {"sockets": 1, "cores": 2, "threads": 1}),
        "cores": Case((2,), {"sockets": 1, "threads": 1}),
        "threads": Case((2,), {"sockets": 1, "cores": 2}),
    },
    d.Timer: {
        "track": Case((), {"name": "rtc"}),
        "tickpolicy": Case((), {"name": "pit"}),
    },
    d.Clock: {
        "timezone": Case(("Europe/Zurich",), {"offset": "timezone"}),
        "adjustment": Case(("123", "-60"), {"offset": "variable"}),
        "basis": Case((), {"offset": "variable"}),
    },
    d.SecLabel: {
        "type": Case(("none", "dynamic"), {"model": "apparmor"}),
        "model": Case(("apparmor", "selinux")),
        "label": Case(("libvirt-x",), {"type": "static"}),
        "relabel": Case((True,)),
    },
    d.Devices: {"emulator": Case(("/usr/bin/qemu-system-x86_64",))},
    disk.SourceHost: {
        "transport": Case(("tcp", "rdma")),
        "name": Case(("10.0.0.1", "::1", "ceph.example")),
        "socket": Case(("/run/nbd.sock",), {"transport": "unix", "name": None}),
    },
    disk.BackingStore: {
        "type": Case(("file",)),
        "source_file": Case(("/b/_base/0a",)),
        "source_dev": Case(("/dev/vg/lv",), {"type": "block", "source_file": None}),
        "source_protocol": Case(("rbd",), NETWORK_DISK),
        "source_name": Case(("pool/img",), NETWORK_DISK),
        "source_hosts": Case((), NETWORK_DISK),
    },
    disk.IoTune: {"group_name": Case(("gold",), {"total_iops_sec": 100})},
    disk.Disk: {
        "type": Case(("file",)),
        "auth_username": Case(("cinder",), {"auth_secret_type": "ceph", "auth_secret_uuid": UUID}),
        "auth_secret_type": Case((), {"auth_username": "u", "auth_secret_uuid": UUID}),
        "auth_secret_uuid": Case((OTHER_UUID,), {"auth_username": "u", "auth_secret_type": "ceph"}),
        "source_file": Case(("/var/lib/instances/u/disk", "/a b/&'\"<>.qcow2")),
        "source_dev": Case(("/dev/vg/lv",), {"type": "block", "source_file": None}),
        "source_protocol": Case(("rbd",), NETWORK_DISK),
        "source_name": Case(("pool/img",), NETWORK_DISK),
        "source_hosts": Case((), NETWORK_DISK),
        "target_dev": Case(("vda", "sdb", "hdc")),
        "serial": Case((UUID,)),
        "alias": Case(("virtio-disk0",)),
    },
    dev.FilterParameter: {"name": Case(("IP",)), "value": Case(("10.0.0.1",))},
    dev.FilterRef: {"filter": Case(("clean-traffic", "no-mac-spoofing"))},
    dev.VirtualPort: {
        "type": Case(("openvswitch", "802.1Qbh")),
        "interface_id": Case((UUID,)),
        "profile_id": Case(("port-profile",)),
    },
    dev.Interface: {
        "type": Case(("bridge", "ethernet"), {"source_bridge": None}),
        "mac": Case(("52:54:00:12:34:56", "fa:16:3e:00:00:01")),
        "source_bridge": Case(("br0", "br-int")),
        "source_network": Case(("default",), {"type": "network", "source_bridge": None}),
        "source_portgroup": Case(("gold",), {"type": "network", "source_bridge": None, "source_network": "default"}),
        "target_dev": Case(("tap0f7a4ac5-4b",)),
        "target_managed": Case((), {"type": "ethernet", "source_bridge": None, "target_dev": "tap0"}),
        "model": Case(("virtio", "e1000")),
        "mtu": Case((1450, 9000)),
        "alias": Case(("net0",)),
    },
    dev.Serial: {**CHAR_SAMPLES, "target_model": Case((), {"target_type": "isa-serial"})},
    dev.Console: CHAR_SAMPLES,
    dev.Channel: {**CHAR_SAMPLES, "target_name": Case((dev.GUEST_AGENT,))},
    dev.Listen: {
        "type": Case(("address", "socket", "none")),
        "address": Case(("127.0.0.1", "::")),
        "network": Case(("default",), {"type": "network"}),
        "socket": Case(("/run/vnc.sock",), {"type": "socket"}),
    },
    dev.Graphics: {
        "port": Case((-1, 5901)),
        "tls_port": Case((-1, 5902), {"type": "spice"}),
        "websocket": Case((-1, 5701)),
        "keymap": Case(("en-us",)),
        "listen": Case(("0.0.0.0", "::1")),
    },
    dev.Rng: {"rate_period": Case((1000,), {"rate_bytes": 1024})},
    dev.RngBackend: {"device": Case(("/dev/urandom", "/dev/hwrng"))},
    dev.Controller: {
        "type": Case(("virtio-serial", "usb", "scsi", "sata", "ide")),
        "model": Case(("none", "qemu-xhci"), {"type": "usb"}),
        "ports": Case((16,)),
        "driver_queues": Case((4,), {"type": "scsi", "model": "virtio-scsi"}),
        "alias": Case(("virtio-serial0",)),
    },
    dev.Tpm: {
        "backend_type": Case(("emulator", "passthrough")),
        "encryption_secret": Case((OTHER_UUID,)),
        "device_path": Case(("/dev/tpm0",), {"backend_type": "passthrough"}),
    },
}


def case_of(cls: type[Element], prop: Property[Any]) -> Case:
    """The values to try, from the table or from what the property declares; ``KeyError`` names a missing one."""
    case = SAMPLES.get(cls, {}).get(prop.name, Case())
    values = case.values or default_values(prop)
    if not values:
        raise KeyError(f"add a sample for {cls.__name__}.{prop.name} to domain_samples.SAMPLES")
    return Case(values, case.beside)


def default_values(prop: Property[Any]) -> tuple[Any, ...]:
    """Values that follow from the declaration; none for free text."""
    if isinstance(prop, Flag):
        return (True,)
    if isinstance(prop, Kib):
        return (1, 4194304)
    if isinstance(prop, Child):
        return (prop.cls(**BASES[prop.cls]),)
    if isinstance(prop, Children):
        return ([build(prop.cls)], [build(prop.cls), build(prop.cls)])
    converter = prop.converter if isinstance(prop, Attr) or hasattr(prop, "converter") else None
    if isinstance(converter, Choice):
        return converter.values
    if isinstance(converter, Bool):
        return (True, False)
    if isinstance(converter, Int):
        low = max(converter.minimum, 0)
        return (low, low + 1, 4096)
    return ()


def build(cls: type[Element]) -> Any:
    """A valid element of the class."""
    if cls is d.Domain:
        return minimal()
    return cls(**{name: v.copy() if isinstance(v, Element) else v for name, v in BASES[cls].items()})


def place(element: Element) -> d.Domain:
    """A domain with the element where it belongs, and what it needs around it."""
    if isinstance(element, d.Domain):
        return element
    domain = minimal()
    match element:
        case disk.SourceHost():
            return place(disk.Disk(**{**BASES[disk.Disk], **NETWORK_DISK, "source_hosts": [element]}))
        case disk.BackingStore():
            return place(disk.Disk(**BASES[disk.Disk], backing_store=element))
        case disk.IoTune():
            return place(disk.Disk(**BASES[disk.Disk], iotune=element))
        case dev.FilterParameter():
            return place(dev.FilterRef(filter="f", parameters=[element]))
        case dev.FilterRef():
            return place(dev.Interface(**BASES[dev.Interface], filterref=element))
        case dev.VirtualPort():
            return place(dev.Interface(**BASES[dev.Interface], virtualport=element))
        case dev.Listen():
            return place(dev.Graphics(type="vnc", listens=[element]))
        case dev.RngBackend():
            return place(dev.Rng(model="virtio", backend=element))
        case d.CpuFeature():
            return place(d.Cpu(**BASES[d.Cpu], features=[element]))
        case d.Timer():
            return place(d.Clock(offset="utc", timers=[element]))
        case d.BootDevice():
            return place(d.Os(type="hvm", boot=[element]))
        case d.Devices():
            domain.devices = element
            return domain
    for holder in (domain, domain.devices):
        for prop in type(holder).PROPERTIES.values():
            if isinstance(prop, Child | Children) and isinstance(element, prop.cls) and prop.cls is type(element):
                setattr(holder, prop.name, element if isinstance(prop, Child) else [element])
                return domain
    raise LookupError(f"no place for {element!r}")
