"""The guest's XML for the host it goes to: paths, listen addresses, interfaces. Pure.

The running guest's XML and its definition are both rewritten (CVE-2020-17376: a definition that keeps the source's
paths opens what lies there at the destination, at the guest's next start). Addresses on the guest's buses stay as they
are: it must not see that it moved. A path that does not lie in the instance's directory or among the bases is not ours
and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from compute_worker.objects import Disk as DiskRecord
from compute_worker.objects import Instance
from compute_worker.virt.checks import tap_name
from compute_worker.virt.libvirt import domain_devices as devices
from compute_worker.virt.libvirt.domain import Domain, InstanceMetadata
from compute_worker.virt.libvirt.domain_disk import BackingStore, Disk


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of one host that a guest's XML names: the instance's own, and that of bases."""

    instance: str
    base: str


@dataclass(frozen=True, slots=True)
class Journey:
    """What changes. ``disks``: those whose backing is named anew, as the destination has them; ``graphics_listen``:
    empty: left as it is."""

    here: Place
    there: Place
    disks: Sequence[DiskRecord] = ()
    graphics_listen: str = ""

    def path(self, path: str) -> str:
        """A path of the source as the destination has it."""
        for old, new in ((self.here.instance, self.there.instance), (self.here.base, self.there.base)):
            try:
                return str(PurePosixPath(new) / PurePosixPath(path).relative_to(old))
            except ValueError:
                continue
        return path

    def disk_name(self, path: str | None) -> str:
        """The name of one of the instance's own disks; empty: it is none."""
        parent = PurePosixPath(path or "")
        return parent.name if str(parent.parent) == self.here.instance else ""


def rewrite(xml: str, instance: Instance, journey: Journey, metadata: InstanceMetadata) -> str:
    """The XML for the destination."""
    guest = Domain.parse(xml)
    guest.instance = metadata
    if guest.os is not None:
        guest.os.kernel = journey.path(guest.os.kernel) if guest.os.kernel else None
        guest.os.initrd = journey.path(guest.os.initrd) if guest.os.initrd else None
    if guest.devices is not None:
        for disk in guest.devices.disks:
            _rewrite_disk(disk, journey)
        for line in (*guest.devices.serials, *guest.devices.consoles, *guest.devices.channels):
            line.log_file = journey.path(line.log_file) if line.log_file else None
        for display in guest.devices.graphics:
            _rewrite_graphics(display, journey)
        for interface in guest.devices.interfaces:
            _rewrite_interface(interface, instance)
    return guest.to_xml()


def targets(xml: str, place: Place, names: Sequence[str]) -> list[str]:
    """Where the guest sees the disks of these names (``vda``), in the guest's order."""
    guest, journey = Domain.parse(xml), Journey(place, place)
    disks = guest.devices.disks if guest.devices is not None else ()
    return [disk.target_dev for disk in disks if disk.target_dev and journey.disk_name(disk.source_file) in names]


def _rewrite_disk(disk: Disk, journey: Journey) -> None:
    name = journey.disk_name(disk.source_file)
    if disk.source_file:
        disk.source_file = journey.path(disk.source_file)
    record = next((record for record in journey.disks if record.name == name), None)
    if record is not None:
        disk.backing_store = _backing(record, journey.there)
    else:
        _rewrite_backing(disk.backing_store, journey)


def _backing(record: DiskRecord, place: Place) -> BackingStore:
    if record.backing is None:
        return BackingStore()
    return BackingStore(
        type="file",
        format=record.backing_format or "raw",
        source_file=f"{place.base}/{record.backing}",
        backing_store=BackingStore(),
    )


def _rewrite_backing(layer: BackingStore | None, journey: Journey) -> None:
    while layer is not None:
        if layer.source_file:
            layer.source_file = journey.path(layer.source_file)
        layer = layer.backing_store


def _rewrite_graphics(display: devices.Graphics, journey: Journey) -> None:
    if not journey.graphics_listen:
        return
    display.listen = None
    display.listens = [devices.Listen(type="address", address=journey.graphics_listen)]


def _rewrite_interface(interface: devices.Interface, instance: Instance) -> None:
    """By its MAC: what the record says of where it is plugged in."""
    vif = next((vif for vif in instance.vifs if vif.mac == interface.mac), None)
    if vif is None:
        return
    if vif.bridge is not None and interface.type == "bridge":
        interface.source_bridge = vif.bridge
    interface.target_dev = tap_name(vif.id, vif.devname)
