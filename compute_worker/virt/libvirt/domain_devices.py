"""Devices other than disks: interfaces, consoles, channels, graphics and the small ones."""

from __future__ import annotations

from compute_worker.virt.libvirt.xmlmap import Attr, Child, Children, Element, Text
from compute_worker.virt.libvirt.xmlvalues import ON_OFF, YES_NO, Choice, Int

VIRTIO_MODELS = ("virtio", "virtio-transitional", "virtio-non-transitional")


class FilterParameter(Element):
    """A variable of a network filter."""

    TAG = "parameter"

    name = Attr("./@name")
    value = Attr("./@value")


class FilterRef(Element):
    """The libvirt network filter of an interface."""

    TAG = "filterref"

    filter = Attr("./@filter")
    parameters = Children("./parameter", FilterParameter)


class VirtualPort(Element):
    """How the interface joins a software switch."""

    TAG = "virtualport"

    type = Attr("./@type", Choice("openvswitch", "midonet", "802.1Qbh"))
    interface_id = Attr("./parameters/@interfaceid")
    profile_id = Attr("./parameters/@profileid")


class Interface(Element):
    """A network interface. ``ethernet``: a tap device of libvirt's, or of others (``target_managed=False``)."""

    TAG = "interface"

    type = Attr("./@type", Choice("bridge", "network", "ethernet"))
    mac = Attr("./mac/@address")
    source_bridge = Attr("./source/@bridge")
    source_network = Attr("./source/@network")
    source_portgroup = Attr("./source/@portgroup")
    virtualport = Child("./virtualport", VirtualPort)
    target_dev = Attr("./target/@dev")
    target_managed = Attr("./target/@managed", YES_NO)
    model = Attr("./model/@type")
    driver_name = Attr("./driver/@name", Choice("qemu", "vhost"))
    driver_queues = Attr("./driver/@queues", Int(1))
    filterref = Child("./filterref", FilterRef)
    boot_order = Attr("./boot/@order", Int(1))
    link_state = Attr("./link/@state", Choice("up", "down"))
    mtu = Attr("./mtu/@size", Int(68))
    alias = Attr("./alias/@name")


class CharDevice(Element):
    """What serial ports, consoles and channels have in common: where the bytes come from and go to."""

    type = Attr("./@type", Choice("pty", "file", "unix", "tcp", "null"))
    source_mode = Attr("./source/@mode", Choice("bind", "connect"))
    source_path = Attr("./source/@path")
    source_host = Attr("./source/@host")
    source_service = Attr("./source/@service", Int(1))
    source_append = Attr("./source/@append", ON_OFF)
    protocol_type = Attr("./protocol/@type", Choice("raw", "telnet"))
    log_file = Attr("./log/@file")
    log_append = Attr("./log/@append", ON_OFF)
    alias = Attr("./alias/@name")


class Serial(CharDevice):
    """A serial port."""

    TAG = "serial"

    target_type = Attr("./target/@type", Choice("isa-serial", "pci-serial", "usb-serial", "system-serial"))
    target_port = Attr("./target/@port", Int())
    target_model = Attr("./target/model/@name", Choice("isa-serial", "pci-serial", "usb-serial", "pl011", "16550a"))


class Console(CharDevice):
    """The text console; the first one mirrors the first serial port."""

    TAG = "console"

    target_type = Attr("./target/@type", Choice("serial", "virtio"))
    target_port = Attr("./target/@port", Int())


class Channel(CharDevice):
    """A private line into the guest; :data:`GUEST_AGENT` is the guest agent's."""

    TAG = "channel"

    target_type = Attr("./target/@type", Choice("virtio"))
    target_name = Attr("./target/@name")
    target_state = Attr("./target/@state", Choice("connected", "disconnected"))


GUEST_AGENT = "org.qemu.guest_agent.0"


class Listen(Element):
    """Where a graphical console listens."""

    TAG = "listen"

    type = Attr("./@type", Choice("address", "network", "socket", "none"))
    address = Attr("./@address")
    network = Attr("./@network")
    socket = Attr("./@socket")


class Graphics(Element):
    """A graphical console. ``port`` -1 with ``autoport``: libvirt picks one."""

    TAG = "graphics"

    type = Attr("./@type", Choice("vnc", "spice"))
    port = Attr("./@port", Int(-1))
    tls_port = Attr("./@tlsPort", Int(-1))
    autoport = Attr("./@autoport", YES_NO)
    websocket = Attr("./@websocket", Int(-1))
    keymap = Attr("./@keymap")
    listen = Attr("./@listen")
    listens = Children("./listen", Listen)


class Video(Element):
    """A video card; ``heads`` and ``vram`` (KiB) where the model has them."""

    TAG = "video"

    model = Attr("./model/@type", Choice("virtio", "vga", "bochs", "cirrus", "qxl", "ramfb", "none"))
    vram = Attr("./model/@vram", Int(1))
    heads = Attr("./model/@heads", Int(1))
    primary = Attr("./model/@primary", YES_NO)


class Rng(Element):
    """A source of randomness: ``rate_bytes`` every ``rate_period`` milliseconds at most."""

    TAG = "rng"

    model = Attr("./@model", Choice(*VIRTIO_MODELS))
    rate_period = Attr("./rate/@period", Int(1))
    rate_bytes = Attr("./rate/@bytes", Int(1))
    backend = Child("./backend", lambda: RngBackend)


class RngBackend(Element):
    """Where the randomness comes from; ``device`` for ``random``."""

    TAG = "backend"

    model = Attr("./@model", Choice("random", "builtin"))
    device = Text(".")


class MemBalloon(Element):
    """The balloon; ``stats_period`` in seconds makes the guest report its memory."""

    TAG = "memballoon"

    model = Attr("./@model", Choice(*VIRTIO_MODELS, "none"))
    autodeflate = Attr("./@autodeflate", ON_OFF)
    free_page_reporting = Attr("./@freePageReporting", ON_OFF)
    stats_period = Attr("./stats/@period", Int(1))


class Watchdog(Element):
    """A watchdog and what happens when the guest stops feeding it."""

    TAG = "watchdog"

    model = Attr("./@model", Choice("i6300esb", "ib700", "diag288"))
    action = Attr("./@action", Choice("reset", "shutdown", "poweroff", "pause", "none", "dump", "inject-nmi"))


class Input(Element):
    """A pointer or keyboard."""

    TAG = "input"

    type = Attr("./@type", Choice("tablet", "mouse", "keyboard"))
    bus = Attr("./@bus", Choice("ps2", "usb", "virtio"))


class Controller(Element):
    """A bus; ``usb`` with model ``none`` leaves USB out."""

    TAG = "controller"

    type = Attr("./@type", Choice("virtio-serial", "pci", "usb", "scsi", "sata", "ide"))
    index = Attr("./@index", Int())
    model = Attr("./@model")
    ports = Attr("./@ports", Int(1))
    driver_queues = Attr("./driver/@queues", Int(1))
    alias = Attr("./alias/@name")


class Panic(Element):
    """The device by which a guest says that its kernel died."""

    TAG = "panic"

    model = Attr("./@model", Choice("isa", "pseries", "hyperv", "s390"))


class Tpm(Element):
    """A TPM, emulated or the host's."""

    TAG = "tpm"

    model = Attr("./@model", Choice("tpm-tis", "tpm-crb", "tpm-spapr"))
    backend_type = Attr("./backend/@type", Choice("emulator", "passthrough"))
    backend_version = Attr("./backend/@version", Choice("1.2", "2.0"))
    backend_persistent_state = Attr("./backend/@persistent_state", YES_NO)
    encryption_secret = Attr("./backend/encryption/@secret")
    device_path = Attr("./backend/device/@path")
