from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from compute_worker.virt.libvirt import backup_xml

SCRATCH = {"vda": Path("/i/vda.scratch")}


def test_a_pull_backup_names_every_disk() -> None:
    root = ET.fromstring(backup_xml.pull(Path("/i/nbd"), SCRATCH, ["vdb", "sda"]))
    assert root.find("server").attrib == {"transport": "unix", "socket": "/i/nbd"}  # type: ignore[union-attr]
    assert {disk.get("name"): disk.get("backup") for disk in root.iter("disk")} == {
        "vda": "yes", "vdb": "no", "sda": "no",
    }  # fmt: skip
    assert root.find("./disks/disk/scratch").get("file") == "/i/vda.scratch"  # type: ignore[union-attr]
    assert root.find("incremental") is None and "exportbitmap" not in backup_xml.pull(Path("/i/nbd"), SCRATCH, [])


def test_an_incremental_one_tells_since_when() -> None:
    root = ET.fromstring(backup_xml.pull(Path("/i/nbd"), SCRATCH, [], "token"))
    assert [child.tag for child in root] == ["incremental", "server", "disks"]
    assert root.findtext("incremental") == "token"
    assert root.find("./disks/disk").get("exportbitmap") == backup_xml.BITMAP  # type: ignore[union-attr]


def test_a_checkpoint_keeps_a_bitmap_of_its_name() -> None:
    root = ET.fromstring(backup_xml.checkpoint("token", ["vda"], ["sda"]))
    assert root.findtext("name") == "token"
    assert [dict(disk.attrib) for disk in root.iter("disk")] == [
        {"name": "vda", "checkpoint": "bitmap", "bitmap": "token"},
        {"name": "sda", "checkpoint": "no"},
    ]
