"""``<domain>``: the whole description of a guest, as declared elements.

Built by :mod:`compute_worker.virt.libvirt.driver`'s callers from an instance, and parsed to be rewritten before a
migration; what is not declared here survives that. Formats, bounds and the meaning of each element:
https://libvirt.org/formatdomain.html.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from compute_worker.virt.libvirt.domain_devices import (
    Channel,
    Console,
    Controller,
    Graphics,
    Input,
    Interface,
    MemBalloon,
    Panic,
    Rng,
    Serial,
    Tpm,
    Video,
    Watchdog,
)
from compute_worker.virt.libvirt.domain_disk import Disk
from compute_worker.virt.libvirt.xmlmap import Attr, Child, Children, Element, Flag, Kib, Text
from compute_worker.virt.libvirt.xmlvalues import ON_OFF, YES_NO, Choice, Int

METADATA_URI = "https://compute-worker/xmlns/instance/1"
METADATA_PREFIX = "cw"
_METADATA_TAG = f"{{{METADATA_URI}}}instance"

# ElementTree keeps prefixes in one table per process; these two only choose how ours and QEMU's namespaces look.
ET.register_namespace(METADATA_PREFIX, METADATA_URI)
ET.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")


class InstanceMetadata(Element):
    """Whose guest this is: read at start to rebuild a lost store (an instance's owner, generation, migration)."""

    TAG = _METADATA_TAG

    uuid = Attr("./@uuid")
    owner = Attr("./@owner")
    generation = Attr("./@generation", Int())
    migration = Attr("./@migration")


class BootDevice(Element):
    """One entry of the firmware's boot order."""

    TAG = "boot"

    dev = Attr("./@dev", Choice("hd", "cdrom", "network", "fd"))


class Os(Element):
    """How the guest boots: by firmware from a disk, or straight into a kernel."""

    TAG = "os"

    firmware = Attr("./@firmware", Choice("bios", "efi"))
    type = Text("./type", Choice("hvm"))
    arch = Attr("./type/@arch")
    machine = Attr("./type/@machine")
    loader = Text("./loader")
    loader_readonly = Attr("./loader/@readonly", YES_NO)
    loader_secure = Attr("./loader/@secure", YES_NO)
    loader_type = Attr("./loader/@type", Choice("rom", "pflash"))
    nvram = Text("./nvram")
    nvram_template = Attr("./nvram/@template")
    kernel = Text("./kernel")
    initrd = Text("./initrd")
    cmdline = Text("./cmdline")
    boot = Children("./boot", BootDevice)
    bootmenu = Attr("./bootmenu/@enable", YES_NO)
    smbios_mode = Attr("./smbios/@mode", Choice("sysinfo", "emulate", "host"))


class Sysinfo(Element):
    """What the guest reads in its SMBIOS tables."""

    TAG = "sysinfo"

    type = Attr("./@type", Choice("smbios"))
    manufacturer = Text("./system/entry[@name='manufacturer']")
    product = Text("./system/entry[@name='product']")
    version = Text("./system/entry[@name='version']")
    serial = Text("./system/entry[@name='serial']")
    uuid = Text("./system/entry[@name='uuid']")
    family = Text("./system/entry[@name='family']")


class Features(Element):
    """Features of the virtual machine; a flag is on where its element is there."""

    TAG = "features"

    acpi = Flag("./acpi")
    apic = Flag("./apic")
    pae = Flag("./pae")
    smm = Attr("./smm/@state", ON_OFF)
    pmu = Attr("./pmu/@state", ON_OFF)
    vmport = Attr("./vmport/@state", ON_OFF)
    kvm_hidden = Attr("./kvm/hidden/@state", ON_OFF)


class CpuFeature(Element):
    """One CPU flag."""

    TAG = "feature"

    policy = Attr("./@policy", Choice("force", "require", "optional", "disable", "forbid"))
    name = Attr("./@name")


class Cpu(Element):
    """The guest's CPU."""

    TAG = "cpu"

    mode = Attr("./@mode", Choice("custom", "host-model", "host-passthrough", "maximum"))
    match = Attr("./@match", Choice("minimum", "exact", "strict"))
    check = Attr("./@check", Choice("none", "partial", "full"))
    migratable = Attr("./@migratable", ON_OFF)
    model = Text("./model")
    model_fallback = Attr("./model/@fallback", Choice("allow", "forbid"))
    vendor = Text("./vendor")
    sockets = Attr("./topology/@sockets", Int(1))
    dies = Attr("./topology/@dies", Int(1))
    cores = Attr("./topology/@cores", Int(1))
    threads = Attr("./topology/@threads", Int(1))
    features = Children("./feature", CpuFeature)


class Timer(Element):
    """A clock device and what happens to ticks that came too late."""

    TAG = "timer"

    name = Attr("./@name", Choice("rtc", "pit", "hpet", "tsc", "kvmclock", "hypervclock", "platform"))
    track = Attr("./@track", Choice("boot", "guest", "wall", "realtime"))
    tickpolicy = Attr("./@tickpolicy", Choice("delay", "catchup", "merge", "discard"))
    present = Attr("./@present", YES_NO)


class Clock(Element):
    """The guest's hardware clock."""

    TAG = "clock"

    offset = Attr("./@offset", Choice("utc", "localtime", "timezone", "variable"))
    timezone = Attr("./@timezone")
    adjustment = Attr("./@adjustment")
    basis = Attr("./@basis", Choice("utc", "localtime"))
    timers = Children("./timer", Timer)


class SecLabel(Element):
    """Confinement by SELinux or AppArmor; ``none`` leaves the guest unconfined."""

    TAG = "seclabel"

    type = Attr("./@type", Choice("none", "dynamic", "static"))
    model = Attr("./@model")
    relabel = Attr("./@relabel", YES_NO)
    label = Text("./label")


class Devices(Element):
    """All devices. ``emulator`` is left to libvirt unless set."""

    TAG = "devices"

    emulator = Text("./emulator")
    disks = Children("./disk", Disk)
    controllers = Children("./controller", Controller)
    interfaces = Children("./interface", Interface)
    serials = Children("./serial", Serial)
    consoles = Children("./console", Console)
    channels = Children("./channel", Channel)
    inputs = Children("./input", Input)
    tpm = Child("./tpm", Tpm)
    graphics = Children("./graphics", Graphics)
    videos = Children("./video", Video)
    watchdog = Child("./watchdog", Watchdog)
    memballoon = Child("./memballoon", MemBalloon)
    rngs = Children("./rng", Rng)
    panics = Children("./panic", Panic)


class Domain(Element):
    """A guest."""

    TAG = "domain"

    type = Attr("./@type", Choice("kvm", "qemu", "test"))
    id = Attr("./@id", Int())
    name = Text("./name")
    uuid = Text("./uuid")
    title = Text("./title")
    description = Text("./description")
    instance = Child(f"./metadata/{_METADATA_TAG}", InstanceMetadata)
    memory_kib = Kib("./memory")
    current_memory_kib = Kib("./currentMemory")
    vcpus = Text("./vcpu", Int(1))
    vcpu_placement = Attr("./vcpu/@placement", Choice("static", "auto"))
    vcpu_cpuset = Attr("./vcpu/@cpuset")
    vcpu_current = Attr("./vcpu/@current", Int(1))
    iothreads = Text("./iothreads", Int())
    sysinfo = Child("./sysinfo", Sysinfo)
    os = Child("./os", Os)
    features = Child("./features", Features)
    cpu = Child("./cpu", Cpu)
    clock = Child("./clock", Clock)
    on_poweroff = Text("./on_poweroff", Choice("destroy", "restart", "preserve"))
    on_reboot = Text("./on_reboot", Choice("destroy", "restart", "preserve"))
    on_crash = Text("./on_crash", Choice("destroy", "restart", "preserve", "coredump-destroy", "coredump-restart"))
    devices = Child("./devices", Devices)
    seclabels = Children("./seclabel", SecLabel)
