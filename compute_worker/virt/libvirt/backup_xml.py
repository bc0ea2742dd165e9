"""What libvirt is told of a backup in pull mode and of a checkpoint.

https://libvirt.org/formatbackup.html, https://libvirt.org/formatcheckpoint.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

BITMAP = "dirty"
"""An incremental backup says under this name what was written since."""


def pull(socket: Path, scratch: Mapping[str, Path], others: Iterable[str], since: str = "") -> str:
    """A backup that is read at ``socket``.

    :param scratch: by target of the disk, the qcow2 that keeps what the guest overwrites; the disk's export has the
        target's name.
    :param others: the guest's other disks.
    :param since: the checkpoint that it is told from; empty: none.
    """
    root = ET.Element("domainbackup", mode="pull")
    if since:
        ET.SubElement(root, "incremental").text = since
    ET.SubElement(root, "server", transport="unix", socket=str(socket))
    disks = ET.SubElement(root, "disks")
    for name, path in scratch.items():
        disk = ET.SubElement(disks, "disk", name=name, backup="yes", type="file", exportname=name)
        if since:
            disk.set("exportbitmap", BITMAP)
        ET.SubElement(disk, "driver", type="qcow2")
        ET.SubElement(disk, "scratch", file=str(path))
    for name in others:
        ET.SubElement(disks, "disk", name=name, backup="no")
    return ET.tostring(root, encoding="unicode")


def checkpoint(name: str, targets: Iterable[str], others: Iterable[str]) -> str:
    """A checkpoint that keeps a bitmap of its own name in these disks."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    disks = ET.SubElement(root, "disks")
    for target in targets:
        ET.SubElement(disks, "disk", name=target, checkpoint="bitmap", bitmap=name)
    for target in others:
        ET.SubElement(disks, "disk", name=target, checkpoint="no")
    return ET.tostring(root, encoding="unicode")
