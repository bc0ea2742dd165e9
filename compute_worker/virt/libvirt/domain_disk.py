"""``<disk>``: hard disks and CD-ROMs, on files, block devices or the network."""

from __future__ import annotations

from compute_worker.virt.libvirt.xmlmap import Attr, Child, Children, Element, Flag, Text
from compute_worker.virt.libvirt.xmlvalues import ON_OFF, Choice, Int

STORAGE_TYPES = ("file", "block", "network")
FORMATS = ("raw", "qcow2")


class SourceHost(Element):
    """A server of a network disk: an address and port, or a unix socket."""

    TAG = "host"

    transport = Attr("./@transport", Choice("tcp", "rdma", "unix"))
    name = Attr("./@name")
    port = Attr("./@port", Int(1))
    socket = Attr("./@socket")


class BackingStore(Element):
    """What an overlay stands on. An empty one ends the chain, so that libvirt does not probe for more."""

    TAG = "backingStore"

    type = Attr("./@type", Choice(*STORAGE_TYPES))
    format = Attr("./format/@type", Choice(*FORMATS))
    source_file = Attr("./source/@file")
    source_dev = Attr("./source/@dev")
    source_protocol = Attr("./source/@protocol", Choice("rbd", "nbd", "iscsi"))
    source_name = Attr("./source/@name")
    source_hosts = Children("./source/host", SourceHost)
    backing_store: Child[BackingStore] = Child("./backingStore", lambda: BackingStore)


class IoTune(Element):
    """Throttling. Totals exclude the read and write figures of the same kind. Bytes and operations a second."""

    TAG = "iotune"

    total_bytes_sec = Text("./total_bytes_sec", Int())
    read_bytes_sec = Text("./read_bytes_sec", Int())
    write_bytes_sec = Text("./write_bytes_sec", Int())
    total_iops_sec = Text("./total_iops_sec", Int())
    read_iops_sec = Text("./read_iops_sec", Int())
    write_iops_sec = Text("./write_iops_sec", Int())
    total_bytes_sec_max = Text("./total_bytes_sec_max", Int())
    total_iops_sec_max = Text("./total_iops_sec_max", Int())
    size_iops_sec = Text("./size_iops_sec", Int())
    group_name = Text("./group_name")


class Disk(Element):
    """One disk. ``device="cdrom"`` with ``readonly`` makes a CD-ROM."""

    TAG = "disk"

    type = Attr("./@type", Choice(*STORAGE_TYPES))
    device = Attr("./@device", Choice("disk", "cdrom"))
    driver_name = Attr("./driver/@name", Choice("qemu"))
    driver_type = Attr("./driver/@type", Choice(*FORMATS))
    driver_cache = Attr(
        "./driver/@cache", Choice("default", "none", "writeback", "writethrough", "directsync", "unsafe")
    )
    driver_error_policy = Attr("./driver/@error_policy", Choice("stop", "report", "ignore", "enospace"))
    driver_io = Attr("./driver/@io", Choice("threads", "native", "io_uring"))
    driver_discard = Attr("./driver/@discard", Choice("unmap", "ignore"))
    driver_detect_zeroes = Attr("./driver/@detect_zeroes", Choice("off", "on", "unmap"))
    driver_iothread = Attr("./driver/@iothread", Int(1))
    driver_queues = Attr("./driver/@queues", Int(1))
    auth_username = Attr("./auth/@username")
    auth_secret_type = Attr("./auth/secret/@type", Choice("ceph", "iscsi"))
    auth_secret_uuid = Attr("./auth/secret/@uuid")
    source_file = Attr("./source/@file")
    source_dev = Attr("./source/@dev")
    source_protocol = Attr("./source/@protocol", Choice("rbd", "nbd", "iscsi"))
    source_name = Attr("./source/@name")
    source_index = Attr("./source/@index", Int(1))
    source_hosts = Children("./source/host", SourceHost)
    backing_store = Child("./backingStore", BackingStore)
    target_dev = Attr("./target/@dev")
    target_bus = Attr("./target/@bus", Choice("virtio", "scsi", "sata", "ide", "usb", "fdc"))
    iotune = Child("./iotune", IoTune)
    readonly = Flag("./readonly")
    shareable = Flag("./shareable")
    transient = Flag("./transient")
    serial = Text("./serial")
    boot_order = Attr("./boot/@order", Int(1))
    alias = Attr("./alias/@name")
    copy_on_read = Attr("./driver/@copy_on_read", ON_OFF)
