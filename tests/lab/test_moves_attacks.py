"""Moves between two real hosts of guests, and with peers, that mean harm: replays of what others were caught by."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compute_worker import errors
from tests.lab import certs, oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.movecell import COMMIT, DESTINATION, FLAVOR, SETTLED, SOURCE, MoveCell, at, move_cell, tls_cell
from tests.lab.settings import INSTANCES_PATH, WORKER_UID

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

SECRET = "/var/lib/compute-worker/secret"
BEFORE_EXT4 = 1024
"""Bytes at the start of a disk that its ext4 leaves alone: a header fits, and the guest still finds its files."""
SENDING = at("resize_instance", "send_disk", "before_do")


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    with tls_cell() as made:
        yield made


@pytest.fixture
def moves(cell: Cell, lab_guest: GuestImages) -> Iterator[MoveCell]:
    with move_cell(cell, lab_guest) as made:
        yield made


def hostile_header(directory: Path) -> bytes:
    """The start of a qcow2 whose backing file is the host's secret."""
    image = directory / "hostile.qcow2"
    options = f"compat=0.10,backing_file={SECRET},backing_fmt=raw"
    words = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", options, str(image), "1G"]
    subprocess.run(words, check=True, timeout=30)
    header = image.read_bytes()[:BEFORE_EXT4]
    assert SECRET.encode() in header
    return header


@pytest.mark.parametrize("images_type", ["raw", "qcow2"])
def test_a_header_written_by_the_guest_stays_its_data(moves: MoveCell, images_type: str, tmp_path: Path) -> None:
    """CVE-2016-2140, CVE-2026-24708: a guest writes a qcow2 header that names a file of the host over its disk. Moved,
    grown and brought back the disk keeps its format and its bytes, and nobody opens that file."""
    header = hostile_header(tmp_path)
    for host in moves.hosts:
        host.node.path(SECRET).write_text("the host's own\n" * 8192)
    moves.start(hold_at=COMMIT, libvirt={"images_type": images_type}, transfer={"resize_precopy": "auto"})
    instance = moves.boot(prepare=lambda made: moves.write(made, 0, header), flavor=FLAVOR)
    assert moves.disks(SOURCE, instance.uuid)["disk"] == images_type
    migration, operation = moves.resize(instance)
    moves.arrived(instance, operation)
    _is_what_it_was(moves, DESTINATION, instance, images_type, header)
    assert oracle.seen_disks(moves.watch.console(DESTINATION))["vda"]["size"] == str(2 << 30)
    moves.revert(instance, migration)
    _is_what_it_was(moves, SOURCE, instance, images_type, header)
    moves.delete(instance, SOURCE)
    for host in moves.hosts:
        host.node.path(SECRET).unlink()
    moves.stop()


def _is_what_it_was(moves: MoveCell, host: str, instance, images_type: str, header: bytes) -> None:
    node = moves.host(host).node
    assert moves.disks(host, instance.uuid)["disk"] == images_type
    assert moves.read(host, instance, 0, BEFORE_EXT4) == header
    xml = node.virsh("dumpxml", instance.uuid).stdout
    assert SECRET not in xml and f"type='{images_type}'" in xml
    opened = node.run("sh", "-c", "ls -l /proc/[0-9]*/fd 2>/dev/null; true").stdout
    assert f"{instance.uuid}/disk" in opened and SECRET not in opened
    said = json.loads(node.run("qemu-img", "info", "-U", "--output=json", "-f", images_type,
                               f"{INSTANCES_PATH}/{instance.uuid}/disk").stdout)  # fmt: skip
    assert SECRET not in json.dumps(said)


@contextmanager
def certificate_of(moves: MoveCell, name: str, address: str) -> Iterator[None]:
    """The destination shows a certificate of the right authority for another host."""
    pki = moves.destination.node.directory / "etc" / "pki"
    certs.make_certificate(moves.cell.state / "ca", pki, name, address)
    certs.install_for_host(pki, WORKER_UID)
    try:
        yield
    finally:
        certs.make_certificate(moves.cell.state / "ca", pki, DESTINATION, moves.destination.node.address)
        certs.install_for_host(pki, WORKER_UID)


@pytest.mark.parametrize(("precopy", "boot"), [("auto", 1), ("never", 2)])
def test_a_destination_with_the_certificate_of_another_host(moves: MoveCell, precopy: str, boot: int) -> None:
    """Nothing is sent to it, by no other transport either, and the guest runs where it was; where disks are sent before
    it is shut down, it never even was."""
    with certificate_of(moves, "node9", "10.79.0.99"):
        moves.start(transfer={"resize_precopy": precopy})
        instance = moves.boot()
        _, operation = moves.resize(instance)
        moves.undone(instance, operation, SETTLED)
        error = moves.ask("get_operation", operation, host=SOURCE).error
        assert error and "certificate" in error["message"], error
        moves.assert_stayed(instance, boot)
        moves.assert_owner(instance, SOURCE, "active")
        moves.delete(instance, SOURCE)
        moves.stop()


BAD_HOSTS = ["-oProxyCommand=touch pwned", "node1;touch pwned", "../node1", "node1 -x", "$(touch pwned)", "root@node1"]
BAD_NAMES = ["../../pwned", "/etc/pwned", "-pwned", "disk;touch pwned", "a/b", "..", "", "incoming.part", "disk.info"]


def test_names_that_are_more_than_names(moves: MoveCell) -> None:
    """Hosts and disks are names before anything is done with them: refused where they come in, and nothing happened."""
    moves.start(hold_at=SENDING)
    instance = moves.boot(0)
    record = moves.ask("get_instance", instance.uuid, host=SOURCE)
    for name in BAD_HOSTS:
        with pytest.raises(errors.InvalidCommand):
            moves.api.prep_resize(record, moves.migration(instance, source_host=name), host=DESTINATION)
        with pytest.raises(errors.InvalidCommand):
            moves.api.prep_resize(record, moves.migration(instance, alternates=[name]), host=DESTINATION)
    migration, operation = moves.resize(instance)
    moves.source.wait_held(SENDING)
    before = _files(moves)
    for name in BAD_NAMES:
        for ask in ("open", "place", "finish", "remove", "map"):
            request = {"ask": ask, "name": name, "size": 4096, "window": 1 << 20, "at": 0}
            if ask == "remove" and not name:
                continue
            with pytest.raises(errors.InvalidCommand):
                moves.api.answer_peer(migration.uuid, request, host=DESTINATION)
    assert _files(moves) == before
    moves.source.release(SENDING)
    moves.resized(instance, operation)
    moves.assert_arrived(instance)
    moves.delete(instance, DESTINATION)
    for host in moves.hosts:
        found = host.node.run("find", "/tmp", "/etc", "/var/lib/compute-worker", "-name", "*pwned*").stdout
        assert found == ""
    moves.stop()


def _files(moves: MoveCell) -> list[str]:
    node = moves.destination.node
    return sorted(str(path.relative_to(node.instances)) for path in node.instances.rglob("*"))
