"""A guest without a worker: by hand-written XML, on bare libvirt."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.domain_xml import GuestDomain
from tests.lab.guest_images import GuestImages
from tests.lab.node import Node
from tests.lab.settings import INSTANCES_PATH, WORKER_UID, WORKER_USER
from tests.waiting import wait_for

UUID = "5e0d7c3a-9a55-4c2e-8c4d-0b4f6a1f0c01"
DIRECTORY = f"{INSTANCES_PATH}/{UUID}"


@contextmanager
def guest(node: Node, domain: GuestDomain, disk: Path) -> Iterator[GuestDomain]:
    """A defined and started guest on its own copy of `disk`; removed on leaving."""
    node.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
    copy = node.path(domain.disk)
    subprocess.run(["cp", "--sparse=always", str(disk), str(copy)], check=True)
    os.chown(copy, WORKER_UID, WORKER_UID)
    definition = node.path("/tmp/domain.xml")
    definition.write_text(domain.xml())
    try:
        node.virsh("define", str(definition))
        node.virsh("start", domain.name)
        yield domain
    finally:
        node.virsh("destroy", domain.name, check=False)
        node.virsh("undefine", domain.name, check=False)
        node.run("rm", "-rf", DIRECTORY)


def wait_for_ticks(node: Node, count: int, boot: int = 1, deadline: float = 60.0) -> str:
    """The console once the guest has ticked `count` times in this boot the console shows."""

    def ticked() -> str | None:
        console = oracle.read_console(node, UUID)
        found = oracle.boots(console)
        return console if len(found) >= boot and len(found[boot - 1].ticks) >= count else None

    return wait_for(ticked, deadline, f"{count} ticks on {node.name}") or ""


def direct_boot(cell: Cell, images: GuestImages, **other: str) -> GuestDomain:
    return GuestDomain(
        "lab-guest", UUID, f"{DIRECTORY}/disk", f"{DIRECTORY}/console.log",
        kernel=cell.add_image(images.kernel), initrd=cell.add_image(images.initrd), **other,
    )
