"""Live migrations between two real hosts, by message: with local disks and with one directory, aborted, encrypted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from compute_worker import errors
from compute_worker.states import OperationState
from tests.lab import certs
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.livecell import SLOW, LiveCell, live_cell, live_hosts, restart_libvirtd
from tests.lab.movecell import DESTINATION, FLAVOR, SETTLED, SOURCE, shared_instances
from tests.lab.settings import WORKER_UID

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

BUSY = "quiet lab.noga lab.dirty=16"
"""A guest that rewrites 16 MiB for ever."""


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    with live_hosts() as made:
        yield made


@pytest.fixture
def moves(cell: Cell, lab_guest: GuestImages) -> Iterator[LiveCell]:
    with live_cell(cell, lab_guest) as made:
        yield made


@pytest.mark.parametrize("directory", ["local", "shared"])
def test_there_and_back(moves: LiveCell, directory: str) -> None:
    """Its console and its counter have no hole, its memory is its memory, its disks are its disks."""
    with ExitStack() as stack:
        if directory == "shared":
            stack.enter_context(shared_instances(moves))
        moves.start()
        instance = moves.boot(flavor=FLAVOR)
        _, operation = moves.migrate(instance)
        moves.arrived(instance, operation)
        migration, operation = moves.migrate(instance, DESTINATION, SOURCE)
        moves.arrived(instance, operation, source=DESTINATION, destination=SOURCE)
        assert moves.ask("get_instance", instance.uuid, host=SOURCE).migration is None
        with pytest.raises(errors.InstanceMoved):
            moves.ask("get_instance", instance.uuid, host=DESTINATION)
        told = moves.ask("get_migration", migration.uuid, "source", host=DESTINATION)
        assert told.migration.status == "completed"
        moves.finish(instance, SOURCE)


def test_aborted_in_the_middle(moves: LiveCell) -> None:
    """The guest goes on where it was; tried again it gets there."""
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    migration, operation = moves.fly(instance)
    moves.source.do("live_migration_abort", instance.uuid, migration.uuid)
    assert "cancelled" in moves.stayed(instance, operation)
    with pytest.raises(errors.InvalidState, match="is over"):
        moves.api.live_migration_abort(instance.uuid, migration.uuid, host=SOURCE)
    _, operation = moves.fly(instance)
    moves.hasten(instance)
    moves.arrived(instance, operation)
    moves.finish(instance, DESTINATION)


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_deleted_in_the_middle(moves: LiveCell, host: str) -> None:
    """By either host: neither copy is left, and nothing of them."""
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    moves.delete(instance, host)
    assert moves.source.outcome(operation, SETTLED).state is OperationState.UNDONE
    moves.stop()


# --- TLS ------------------------------------------------------------------------------------------------------------


@contextmanager
def certificate_of(moves: LiveCell, host: str, name: str) -> Iterator[None]:
    """The host has the certificate of another."""
    node = moves.host(host).node
    pki = node.directory / "etc" / "pki"
    certs.make_certificate(moves.cell.state / "ca", pki, name, "10.79.0.99")
    certs.install_for_host(pki, WORKER_UID)
    restart_libvirtd(node)
    try:
        yield
    finally:
        certs.make_certificate(moves.cell.state / "ca", pki, host, node.address)
        certs.install_for_host(pki, WORKER_UID)
        restart_libvirtd(node)


@contextmanager
def no_certificate(moves: LiveCell, host: str) -> Iterator[None]:
    """The host's guests have none; its libvirtd has."""
    directory = moves.host(host).node.directory / "etc" / "pki" / "qemu"
    kept = [path.rename(path.with_suffix(".kept")) for path in directory.glob("*-cert.pem") if path.stem != "ca-cert"]
    assert len(kept) == 2
    try:
        yield
    finally:
        for path in kept:
            path.rename(path.with_suffix(".pem"))


def test_a_destination_with_the_certificate_of_another_host(moves: LiveCell) -> None:
    """Not a byte of the guest goes to it, by no other way either."""
    with certificate_of(moves, DESTINATION, "node9"):
        moves.start(live_migration={"tls": "auto"})
        instance = moves.boot()
        _, operation = moves.migrate(instance)
        assert "certificate" in moves.stayed(instance, operation).lower()
        moves.leave(instance, SOURCE)


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_a_missing_certificate(moves: LiveCell, host: str) -> None:
    """Where TLS is required nothing goes, least of all plain."""
    with no_certificate(moves, host):
        moves.start(live_migration={"tls": "required"})
        instance = moves.boot()
        _, operation = moves.migrate(instance)
        said = moves.stayed(instance, operation)
        assert "tls = required" in said and "is missing" in said
        moves.leave(instance, SOURCE)


def test_encrypted(moves: LiveCell) -> None:
    """Where both hosts have certificates QEMU sends by TLS, to a host of that name alone."""
    moves.start(live_migration={**SLOW, "tls": "required"})
    instance = moves.boot()
    _, operation = moves.fly(instance)
    used = moves.source.node.virsh("qemu-monitor-command", instance.uuid, "--hmp", "info migrate_parameters").stdout
    assert re.search(rf"tls-creds: '\w+'\s+tls-hostname: '{DESTINATION}'", used), used
    moves.hasten(instance)
    moves.arrived(instance, operation)
    moves.finish(instance, DESTINATION)
