"""Live migrations between two real hosts that mean harm, or could do some: replays of what others were caught by."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.objects import Disk, DiskInfo, Instance, MigrateData
from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.livecell import LEAVE, SLOW, LiveCell, live_cell, live_hosts
from tests.lab.movecell import DESTINATION, FLAVOR, SOURCE, at
from tests.lab.settings import INSTANCES_PATH, WORKER_UID
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SECRET = b"what another tenant kept on its ephemeral disk"
AT = 300 << 20
EPHEMERAL = "disk.local"
BAD_HOSTS = [
    "-oProxyCommand=touch pwned", "node2;touch pwned", "../node2", "node2/system?command=touch", "$(touch pwned)",
    "root@node2", "node2 --unsafe", "", "a" * 300,
]  # fmt: skip
BAD_NAMES = ["../../pwned", "/etc/pwned", "-pwned", "disk;touch pwned", "a/b", "..", ""]


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    with live_hosts() as made:
        yield made


@pytest.fixture
def moves(cell: Cell, lab_guest: GuestImages) -> Iterator[LiveCell]:
    with live_cell(cell, lab_guest) as made:
        yield made


def whole(moves: LiveCell, host: str, instance: Instance, name: str) -> tuple[str, bool]:
    """Digest of all that the guest would read of a disk, and whether the other tenant's bytes are in it."""
    node, copy = moves.host(host).node, "/var/tmp/whole.raw"
    path = f"{INSTANCES_PATH}/{instance.uuid}/{name}"
    node.run("qemu-img", "convert", "-U", "-f", moves.disks(host, instance.uuid)[name], "-O", "raw", path, copy)
    digest, found = hashlib.sha256(), False
    with open(node.path(copy), "rb") as raw:
        while block := raw.read(4 << 20):
            digest.update(block)
            found = found or SECRET in block
    node.path(copy).unlink()
    return digest.hexdigest(), found


def test_a_base_with_the_bytes_of_another_guest(moves: LiveCell) -> None:
    """CVE-2013-7130: under the name of the ephemeral disk's base the destination has somebody else's bytes. The guest
    that comes never reads one of them, and its disk is what it was."""
    moves.start()
    instance = moves.boot(flavor=FLAVOR)
    info = json.loads((moves.source.node.instances / instance.uuid / "disk.info").read_text())
    name = next(disk["backing"] for disk in info["disks"] if disk["name"] == EPHEMERAL)
    base = moves.source.node.instances / "_base" / name
    theirs = moves.destination.node.instances / "_base" / name
    theirs.parent.mkdir(mode=0o700, exist_ok=True)
    moves.destination.node.run("chown", f"{WORKER_UID}:{WORKER_UID}", f"{INSTANCES_PATH}/_base")
    _spoil(base, theirs)
    moves.destination.node.run("chown", f"{WORKER_UID}:{WORKER_UID}", f"{INSTANCES_PATH}/_base/{name}")
    before = whole(moves, SOURCE, instance, EPHEMERAL)
    _, operation = moves.migrate(instance)
    moves.arrived(instance, operation)
    assert whole(moves, DESTINATION, instance, EPHEMERAL) == before == (before[0], False)
    moves.finish(instance, DESTINATION)
    theirs.unlink()


def _spoil(base: Path, copy: Path) -> None:
    """The same size, other bytes."""
    with open(copy, "wb") as made:
        made.truncate(base.stat().st_size)
        made.seek(AT)
        made.write(SECRET)


def test_the_definition_at_the_destination_names_its_own_devices(moves: LiveCell) -> None:
    """CVE-2020-17376: live or defined, the guest names files, addresses and interfaces of the host where it is, also
    after it was booted there from its definition."""
    for host in moves.hosts:
        moves.start_one(host, libvirt={"graphics": "vnc", "graphics_listen": host.node.address})
    instance = moves.boot(flavor=FLAVOR)
    _, operation = moves.migrate(instance)
    moves.arrived(instance, operation)
    _names_its_own(moves, instance)
    moves.destination.do("reboot_instance", instance.uuid, "HARD")
    moves.assert_goes_on(instance, DESTINATION, 2)
    _names_its_own(moves, instance)
    moves.leave(instance, DESTINATION)


def _names_its_own(moves: LiveCell, instance: Instance) -> None:
    node, other = moves.destination.node, moves.source.node
    for which in ([], ["--inactive"]):
        xml = node.virsh("dumpxml", instance.uuid, *which).stdout
        assert other.address not in xml and other.name not in xml
        assert f"address='{node.address}'" in xml
        named = re.findall(r"(?:file|path)='(/[^']+)'", xml)
        assert len([path for path in named if path.startswith(f"{INSTANCES_PATH}/{instance.uuid}/")]) >= 3, named
        missing = [path for path in named if path.startswith(INSTANCES_PATH) and not node.path(path).exists()]
        assert missing == []
        taps = re.findall(r"<target dev='(tap[^']*)'", xml)
        assert which or set(taps) == set(oracle.interfaces(node)), (taps, oracle.interfaces(node))


def test_what_was_prepared_is_gone_after_a_rollback(moves: LiveCell) -> None:
    """CVE-2015-2687: directory, disks, interfaces and claims of a guest that does not come are nobody's to keep."""
    point = at(LEAVE, "live_migration", "before_do")
    moves.start(hold_at=point, live_migration=SLOW)
    instance = moves.boot(flavor=FLAVOR)
    migration, operation = moves.migrate(instance)
    moves.source.wait_held(point)
    node = moves.destination.node
    assert oracle.files(node, instance.uuid)
    assert moves.ask("get_host_state", host=DESTINATION).memory_mb.used == instance.flavor.memory_mb
    moves.source.do("live_migration_abort", instance.uuid, migration.uuid)
    moves.source.release(point)
    moves.stayed(instance, operation)
    _nothing_at_the_destination(moves)
    migration, operation = moves.fly(instance)
    wait_for(lambda: oracle.interfaces(node), 10, "its interface at the destination")
    moves.source.do("live_migration_abort", instance.uuid, migration.uuid)
    moves.stayed(instance, operation)
    _nothing_at_the_destination(moves)
    moves.leave(instance, SOURCE)


def _nothing_at_the_destination(moves: LiveCell) -> None:
    assert oracle.leftovers(moves.destination.node) == []
    assert moves.ask("get_host_state", host=DESTINATION).memory_mb.used == 0


def test_names_that_are_more_than_names(moves: LiveCell) -> None:
    """Hosts and disks are names before anything is done with them: refused where they come in, and nothing happened."""
    moves.start()
    instance = moves.boot(0)
    record = moves.ask("get_instance", instance.uuid, host=SOURCE)
    live = {"migration_type": "live-migration", "new_flavor": None}
    for name in BAD_HOSTS:
        with pytest.raises(errors.InvalidCommand):
            moves.api.live_migration(instance.uuid, moves.migration(instance, dest_host=name, **live), host=SOURCE)
        with pytest.raises(errors.InvalidCommand):
            bad = moves.migration(instance, source_host=name, **live)
            moves.api.check_can_live_migrate_destination(record, bad, host=DESTINATION)
    migration = moves.migration(instance, **live)
    for name in BAD_NAMES:
        disks = [Disk(name=name, format="raw", virtual_size_bytes=1 << 20)]
        for data in (
            MigrateData(migration=migration.uuid, disks=disks),
            MigrateData(migration=migration.uuid, instance_path=f"/x/{name}\n", files={name: "eA=="}),
        ):
            with pytest.raises(errors.InvalidCommand):
                moves.api.pre_live_migration(
                    record, migration, data, DiskInfo(disks=disks), operation=str(uuid.uuid4()), host=DESTINATION
                )
    assert oracle.leftovers(moves.destination.node) == []
    _, operation = moves.migrate(instance)
    moves.arrived(instance, operation)
    moves.leave(instance, DESTINATION)
    for host in moves.hosts:
        found = host.node.run("find", "/tmp", "/etc", "/var/lib/compute-worker", "-name", "*pwned*").stdout
        assert found == ""
