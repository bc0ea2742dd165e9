"""Real deaths in the middle of a live migration between two real hosts: workers, libvirtd, qemu, hosts, cables, a
full disk, and libvirt's last word that never comes.

Each cell asks the oracle: never two copies that run, one owner, memory and disk and counter without a hole, nothing
left over on either host, one terminal notification from each, and no person was needed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from compute_worker.objects import Instance
from compute_worker.states import OperationState
from tests.lab import faults, oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.livecell import (
    BROKER_PORTS,
    COME,
    LEAVE,
    LIBVIRT_PORTS,
    SLOW,
    LiveCell,
    live_cell,
    live_hosts,
    patient_libvirt,
    pause,
)
from tests.lab.movecell import DESTINATION, SETTLED, SOURCE, at
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

LANDED = at(LEAVE, "await_outcome", "before_do")
"""The source's worker stands still where the flight is over, and nobody was asked."""
SEEN = at(COME, "commit", "before_record")
"""The destination's worker stands still where it has seen the guest run, and has not recorded it."""
WINDOW = 4.0
"""Seconds that two copies may run where the destination is silent and libvirt lets the source's run on."""


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    with live_hosts() as made:
        yield made


@pytest.fixture
def moves(cell: Cell, lab_guest: GuestImages) -> Iterator[LiveCell]:
    with live_cell(cell, lab_guest) as made:
        yield made


# --- workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (("check_destination", "after_do"), ("make_directory", "after_do")),
        (("pre_live_migration", "before_do"), ("fetch_images", "after_do")),
        (("pre_live_migration", "after_do"), ("create_disks", "after_do")),
        (("live_migration", "before_do"), ("plug_vifs", "after_do")),
        (("live_migration", "after_do"), ("open_target", "after_do")),
        (("await_outcome", "before_do"), ("publish", "after_do")),
        (("await_outcome", "after_do"), ("await_guest", "before_do")),
        (("commit", "before_record"), ("await_guest", "after_do")),
        (("commit", "after_record"), ("commit", "before_record")),
        (("post_live_migration", "before_do"), ("commit", "after_record")),
        (("post_live_migration", "after_do"), ("post_live_migration_at_destination", "after_do")),
        (("tell_destination", "after_do"), ("tell_source", "after_do")),
    ],
    ids="-".join,
)
def test_workers_killed(moves: LiveCell, source: tuple[str, str], destination: tuple[str, str]) -> None:
    """SIGKILL of each worker at a step of its side: the guest arrives all the same."""
    moves.start(kill_at=f"{at(LEAVE, *source)},{at(COME, *destination)}")
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.arrived(instance, operation)
    assert (moves.source.deaths, moves.destination.deaths) == (1, 1)
    moves.leave(instance, DESTINATION)


@pytest.mark.parametrize("hosts", [[SOURCE], [DESTINATION], [SOURCE, DESTINATION]], ids="-".join)
def test_worker_killed_in_flight(moves: LiveCell, hosts: list[str]) -> None:
    """libvirt goes on; the successor joins."""
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    for name in hosts:
        moves.host(name).worker.kill()
    moves.source.revive()
    moves.hasten(instance)
    moves.arrived(instance, operation)
    assert [moves.host(name).deaths for name in hosts] == [1] * len(hosts)
    moves.finish(instance, DESTINATION)


# --- hypervisors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_libvirtd_killed_in_flight(moves: LiveCell, host: str) -> None:
    """The flight ends with it; the guest goes on where it was."""
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    moves.host(host).node.libvirtd.kill()
    moves.host(host).node.libvirtd.start()
    moves.stayed(instance, operation)
    moves.leave(instance, SOURCE)


@pytest.mark.parametrize(("host", "point"), [(SOURCE, LANDED), (DESTINATION, SEEN)], ids=[SOURCE, DESTINATION])
def test_libvirtd_killed_before_post(moves: LiveCell, host: str, point: str) -> None:
    moves.start(hold_at=point)
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.host(host).wait_held(point)
    moves.host(host).node.libvirtd.kill()
    moves.host(host).release(point)
    moves.host(host).node.libvirtd.start()
    moves.arrived(instance, operation)
    moves.leave(instance, DESTINATION)


def kill_qemu(moves: LiveCell, host: str) -> None:
    """Killed, and libvirt has seen it."""
    node = moves.host(host).node
    process = oracle.qemu_processes(node)[0]
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not oracle.qemu_processes(node), 10, "qemu's end")
    known = ("running", "paused")
    wait_for(lambda: node.virsh("domstate", process.uuid, check=False).stdout.strip() not in known, 10, "libvirt")


def test_qemu_of_the_destination_killed_in_flight(moves: LiveCell) -> None:
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    kill_qemu(moves, DESTINATION)
    moves.stayed(instance, operation)
    moves.leave(instance, SOURCE)


def test_qemu_of_the_destination_killed_before_it_was_seen(moves: LiveCell) -> None:
    """The guest landed and died before that host's worker had looked: it is started from its disks, there."""
    before = at(COME, "await_guest", "before_do")
    moves.start(hold_at=f"{before},{LANDED}")
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.destination.wait_held(before)
    moves.source.wait_held(LANDED)
    wait_for(lambda: moves.watch.last(DESTINATION), 30, "it to tick at the destination")
    kill_qemu(moves, DESTINATION)
    moves.destination.release(before)
    moves.source.release(LANDED)
    moves.arrived(instance, operation, boot=2)
    moves.leave(instance, DESTINATION)


def test_qemu_of_the_destination_killed_before_its_commit(moves: LiveCell) -> None:
    moves.start(hold_at=SEEN)
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.destination.wait_held(SEEN)
    kill_qemu(moves, DESTINATION)
    moves.destination.release(SEEN)
    moves.arrived(instance, operation, boot=2)
    moves.leave(instance, DESTINATION)


def ended(moves: LiveCell, instance: Instance, operation: str, vm_state: str) -> None:
    """The move came to nothing, the guest is off at the source, and the record says how; it can be started there."""
    assert moves.source.outcome(operation, SETTLED).state is OperationState.UNDONE
    moves.source.assert_ended_once(instance, operation, "instance.live_migration.error")
    moves.wait_clean(DESTINATION, instance)
    wait_for(lambda: moves.ask("get_instance", instance.uuid, host=SOURCE).vm_state == vm_state, SETTLED,
             f"it to be {vm_state}")  # fmt: skip
    moves.assert_quiet()
    assert oracle.where_running(moves.cell.nodes.values()) == {}


def test_qemu_of_the_source_killed_in_flight(moves: LiveCell) -> None:
    """The guest crashed: nowhere does it run on, and the record says so. Started again it runs where it was."""
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    kill_qemu(moves, SOURCE)
    ended(moves, instance, operation, "error")
    moves.source.do("reboot_instance", instance.uuid, "HARD")
    moves.assert_goes_on(instance, SOURCE, 2)
    moves.leave(instance, SOURCE)


# --- hosts ----------------------------------------------------------------------------------------------------------


def test_power_of_the_destination_fails_in_flight(moves: LiveCell) -> None:
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    moves.power_off(DESTINATION)
    moves.power_on(DESTINATION)
    moves.stayed(instance, operation)
    moves.leave(instance, SOURCE)


def test_power_of_the_source_fails_in_flight(moves: LiveCell) -> None:
    """The guest was the source's: back again that host starts it, and the destination has nothing of it."""
    moves.start(live_migration=SLOW)
    instance = moves.boot()
    _, operation = moves.fly(instance)
    moves.power_off(SOURCE)
    wait_for(lambda: not oracle.qemu_processes(moves.destination.node), SETTLED, "the half copy's end")
    moves.power_on(SOURCE)
    moves.stayed(instance, operation, boot=2)
    moves.leave(instance, SOURCE)


@pytest.mark.parametrize("point", [at(COME, "await_guest", "before_do"), SEEN], ids=["unseen", "seen"])
def test_power_of_the_destination_fails_after_landing(moves: LiveCell, point: str) -> None:
    """The guest is the destination's; the source starts nothing, says what it waits for, and it runs again there."""
    moves.start(hold_at=f"{point},{LANDED}")
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.destination.wait_held(point)
    moves.source.wait_held(LANDED)
    wait_for(lambda: moves.watch.last(DESTINATION), 30, "it to tick at the destination")
    moves.power_off(DESTINATION)
    moves.source.release(LANDED)
    said = wait_for(lambda: moves.api.get_operation(operation, host=SOURCE).waiting_for, SETTLED, "it to wait")
    assert said and DESTINATION in said
    assert oracle.qemu_processes(moves.source.node) == []
    moves.power_on(DESTINATION)
    moves.destination.release(point)
    moves.arrived(instance, operation, boot=2)
    moves.leave(instance, DESTINATION)


def test_power_of_the_source_fails_after_landing(moves: LiveCell) -> None:
    """The guest runs at the destination while the source is off, which learns it later and removes what it has."""
    moves.start(hold_at=LANDED)
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.source.wait_held(LANDED)
    moves.power_off(SOURCE)
    assert moves.destination.outcome(operation, SETTLED).state is OperationState.DONE
    moves.power_on(SOURCE)
    moves.source.release(LANDED)
    moves.arrived(instance, operation)
    moves.leave(instance, DESTINATION)


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["make_directory", "create_disks", "open_target"])
def test_cable_pulled_during_pre(moves: LiveCell, step: str) -> None:
    point = at(COME, step, "before_do")
    moves.start(hold_at=point)
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.destination.wait_held(point)
    with faults.link_down(moves.destination.node):
        moves.destination.release(point)
        pause(4)
    moves.arrived(instance, operation)
    moves.leave(instance, DESTINATION)


@pytest.mark.parametrize(("host", "point"), [(SOURCE, LANDED), (DESTINATION, SEEN)], ids=[SOURCE, DESTINATION])
def test_cable_pulled_before_post(moves: LiveCell, host: str, point: str) -> None:
    """It has landed; neither side decides anything by itself that the other could contradict."""
    moves.start(hold_at=point)
    instance = moves.boot()
    _, operation = moves.migrate(instance)
    moves.host(host).wait_held(point)
    wait_for(lambda: moves.watch.last(DESTINATION), 30, "it to tick at the destination")
    with faults.link_down(moves.destination.node):
        moves.host(host).release(point)
        pause(4)
    moves.arrived(instance, operation)
    moves.leave(instance, DESTINATION)


def test_the_finish_reply_is_lost(moves: LiveCell) -> None:
    """The destination runs the guest, and the source's libvirt is not told (``protocol.md`` 3): its worker asks the
    other worker and ends the copy here, before libvirt lets it run on."""
    with patient_libvirt(moves.source.node, 60):
        moves.start(live_migration=SLOW)
        instance = moves.boot()
        _, operation = moves.fly(instance)
        with faults.muted(moves.destination.node, *LIBVIRT_PORTS):
            moves.hasten(instance)
            wait_for(lambda: moves.watch.last(DESTINATION), 30, "it to tick at the destination")
            since = time.monotonic()
            wait_for(lambda: not oracle.qemu_processes(moves.source.node), 30, "the source's copy to end")
            print(f"the source's copy ended {time.monotonic() - since:.1f} s after the first tick there")
        moves.arrived(instance, operation)
        moves.finish(instance, DESTINATION)


def test_the_finish_reply_is_lost_and_the_destination_is_silent(moves: LiveCell) -> None:
    """The window: nobody can say that the guest runs there. libvirt lets the copy here run on; the worker pauses it at
    once, until the destination answers; then it is ended. How long two of them ran is measured."""
    with patient_libvirt(moves.source.node, 18):
        moves.start(live_migration=SLOW)
        instance = moves.boot()
        _, operation = moves.fly(instance)
        with faults.muted(moves.destination.node, *LIBVIRT_PORTS, *BROKER_PORTS):
            moves.hasten(instance)
            wait_for(lambda: moves.watch.last(DESTINATION), 30, "it to tick at the destination")
            wait_for(lambda: moves.api.get_operation(operation, host=SOURCE).waiting_for, SETTLED, "it to wait")
            wait_for(lambda: "(user)" in said(moves, instance), SETTLED, "the copy to be held")
            pause(2)
            assert "(user)" in said(moves, instance)
        looks = moves.watch.twice_at
        window = looks[-1] - looks[0] if looks else 0.0
        print(f"two copies were seen to run for {window:.2f} s, in {len(looks)} looks")
        assert window < WINDOW
        moves.watch.twice.clear()
        for host in (moves.source, moves.destination):
            assert host.outcome(operation, SETTLED).state is OperationState.DONE
        moves.wait_clean(SOURCE, instance)
        moves.assert_owner(instance, DESTINATION, "active")
        assert moves.noise(DESTINATION, instance) == moves.filler.hexdigest()
        moves.delete(instance, DESTINATION)
        moves.watch.worked.clear()
        moves.stop()


def said(moves: LiveCell, instance: Instance) -> str:
    """State and reason of the source's copy."""
    return moves.source.node.virsh("domstate", "--reason", instance.uuid, check=False).stdout


# --- the disk -------------------------------------------------------------------------------------------------------


def test_no_room_at_the_destination(moves: LiveCell) -> None:
    """It fills up under the disks that come: the guest goes on where it was."""
    point = at(COME, "publish", "before_do")
    node = moves.destination.node
    with faults.disk_of(node, 192):
        moves.start(hold_at=point, claims={"disk_allocation_ratio": 100.0})
        instance = moves.boot(32)
        migration = moves.migration(instance, migration_type="live-migration", new_flavor=None)
        operation = moves.source.send("live_migration", instance.uuid, migration, disk_over_commit=True)
        moves.destination.wait_held(point)
        ballast = node.instances / "_base" / "ballast"
        room = os.statvfs(node.instances)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - (8 << 20)))
        moves.destination.release(point)
        moves.stayed(instance, operation)
        ballast.unlink()
        moves.leave(instance, SOURCE)
