"""Real deaths in the middle of a move between two real hosts: workers, libvirtd, qemu, whoever carries the bytes,
hosts, cables, the broker, a full disk, and a delete.

Each cell asks the oracle: one owner, never two running copies, the same bytes, a counter that never jumps, nothing left
over on either host, one terminal notification from each, and no person was needed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from compute_worker.states import OperationState
from tests.lab import faults, oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.movecell import COMMIT, DESTINATION, SETTLED, SOURCE, MoveCell, at, move_cell, tls_cell
from tests.waiting import wait_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

MOVE, PREP, REVERT, BACK = "resize_instance", "prep_resize", "revert_resize", "finish_revert_resize"
CONFIRM, DROP = "confirm_resize", "drop_resize"
WARM = {"resize_precopy": "auto"}


@pytest.fixture(scope="module")
def cell(lab_machine: None) -> Iterator[Cell]:
    """Two hosts with certificates."""
    with tls_cell() as made:
        yield made


@pytest.fixture
def moves(cell: Cell, lab_guest: GuestImages) -> Iterator[MoveCell]:
    with move_cell(cell, lab_guest) as made:
        yield made


def finish(moves: MoveCell, instance, migration, verdict: str = CONFIRM) -> None:
    """Decide it, delete it, see nothing left anywhere, and end the workers."""
    if verdict == CONFIRM:
        moves.confirm(instance, migration)
        moves.delete(instance, DESTINATION)
    else:
        moves.revert(instance, migration)
        moves.delete(instance, SOURCE)
    moves.stop()


def gone_back(moves: MoveCell, instance, operation: str, patience: float = SETTLED) -> None:
    """The move came to nothing: the guest runs at the source as it did; the destination is clean. Then delete it."""
    moves.undone(instance, operation, patience)
    moves.assert_stayed(instance)
    moves.assert_owner(instance, SOURCE, "active")
    moves.delete(instance, SOURCE)
    moves.stop()


@pytest.mark.parametrize(
    ("source", "destination", "verdict", "there", "here"),
    [
        (("precopy", "after_do"), ("prepare_images", "after_do"), CONFIRM, ("save_record", "after_do"), None),
        (("power_off", "before_do"), ("ask_source", "after_do"), REVERT, ("ask_source", "after_do"), None),
        (("power_off", "after_do"), ("await_disks", "before_do"), REVERT, None, ("restore_files", "after_do")),
        (("set_aside", "after_do"), ("await_disks", "after_do"), REVERT, ("set_aside", "after_do"), None),
        (("send_disk", "before_do"), ("verify_disks", "after_do"), REVERT, None, ("start_paused", "after_do")),
        (("send_disk", "after_do"), ("grow_disks", "after_do"), REVERT, ("hand_back", "after_do"), None),
        (("verify_copy", "after_do"), ("define", "after_do"), REVERT, None, ("commit", "after_record")),
        (("hand_over", "before_do"), ("start_paused", "after_do"), REVERT, ("await_outcome", "before_do"), None),
        (("hand_over", "after_do"), ("commit", "before_record"), CONFIRM, ("tell_source", "before_do"), None),
        (("await_outcome", "before_do"), ("commit", "after_record"), CONFIRM, None, ("drop_copy", "before_do")),
        (("commit", "before_record"), ("resume_guest", "after_do"), CONFIRM, None, ("drop_copy", "after_do")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value or "none",
)  # fmt: skip
def test_workers_killed(moves: MoveCell, source, destination, verdict: str, there, here) -> None:
    """SIGKILL of each worker at a step of the move, and of one or both at a step of its verdict."""
    other = BACK if verdict == REVERT else DROP
    points = [(MOVE, source), (PREP, destination), (verdict, there), (other, here)]
    kill_at = ",".join(at(kind, *point) for kind, point in points if point)
    warm = WARM if source[0] == "precopy" else {}
    moves.start(kill_at=kill_at, hold_at=COMMIT, transfer=warm)
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.arrived(instance, operation)
    finish(moves, instance, migration, verdict)
    assert moves.source.deaths + moves.destination.deaths == kill_at.count(",") + 1


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
@pytest.mark.parametrize("transport", ["nbd", "ssh"])
def test_worker_killed_in_the_middle_of_a_disk(moves: MoveCell, host: str, transport: str) -> None:
    """What had arrived is gone on with; whoever carried it is not left behind."""
    moves.start(hold_at=COMMIT, transfer={"transport": transport, "bandwidth_mb": 4})
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    moves.host(host).worker.kill()
    moves.arrived(instance, operation)
    assert moves.host(host).deaths == 1
    finish(moves, instance, migration)


@pytest.mark.parametrize(
    ("host", "pattern", "transport"),
    [(DESTINATION, r"^(\S*/)?qemu-nbd ", "nbd"), (SOURCE, r"^rsync ", "ssh"), (DESTINATION, r"^rsync ", "ssh")],
    ids=["qemu-nbd", "rsync", "rsync-there"],
)
def test_whoever_carries_the_bytes_killed(moves: MoveCell, host: str, pattern: str, transport: str) -> None:
    moves.start(hold_at=COMMIT, transfer={"transport": transport, "bandwidth_mb": 4})
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    faults.signal_processes(moves.host(host).node, pattern, signal.SIGKILL)
    moves.arrived(instance, operation)
    finish(moves, instance, migration)


@pytest.mark.parametrize("step", ["power_off", "set_aside"])
def test_libvirtd_of_the_source_killed(moves: MoveCell, step: str) -> None:
    point = at(MOVE, step, "before_do")
    moves.start(hold_at=f"{point},{COMMIT}")
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.source.wait_held(point)
    moves.source.node.libvirtd.kill()
    moves.source.release(point)
    moves.source.node.libvirtd.start()
    moves.arrived(instance, operation)
    finish(moves, instance, migration)


@pytest.mark.parametrize("step", ["define", "start_paused"])
def test_libvirtd_of_the_destination_killed(moves: MoveCell, step: str) -> None:
    point = at(PREP, step, "before_do")
    moves.start(hold_at=f"{point},{COMMIT}")
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.destination.wait_held(point)
    moves.destination.node.libvirtd.kill()
    moves.destination.release(point)
    moves.destination.node.libvirtd.start()
    moves.arrived(instance, operation)
    finish(moves, instance, migration, REVERT)


def test_qemu_killed_while_its_disks_are_sent(moves: MoveCell) -> None:
    """The guest dies in the middle of a warm copy: the move goes on with what its disks hold, and it runs there."""
    moves.start(hold_at=COMMIT, transfer={**WARM, "bandwidth_mb": 4})
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    os.kill(oracle.qemu_processes(moves.source.node)[0].pid, signal.SIGKILL)
    moves.destination.wait_held(COMMIT)
    moves.assert_same_disks(instance)
    moves.destination.release(COMMIT)
    moves.resized(instance, operation)
    moves.assert_arrived(instance, clean=False)
    moves.assert_owner(instance, DESTINATION, "resized")
    finish(moves, instance, migration)


def test_qemu_killed_after_it_arrived(moves: MoveCell) -> None:
    """The paused guest dies before the COMMIT: it is started again, and booted there once."""
    moves.start(hold_at=COMMIT)
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.destination.wait_held(COMMIT)
    os.kill(oracle.qemu_processes(moves.destination.node)[0].pid, signal.SIGKILL)
    wait_for(lambda: not oracle.qemu_processes(moves.destination.node), 10, "qemu's end")
    moves.arrived(instance, operation)
    finish(moves, instance, migration, REVERT)


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_host_power_failure_in_the_middle_of_a_disk(moves: MoveCell, host: str) -> None:
    """A host goes off in the middle of the copy and comes back: nobody has to do anything, the move goes on."""
    moves.start(hold_at=COMMIT, transfer={"bandwidth_mb": 4})
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    moves.power_off(host)
    moves.power_on(host)
    moves.arrived(instance, operation)
    finish(moves, instance, migration)


def test_source_power_failure_after_it_handed_over(moves: MoveCell) -> None:
    """The destination needs it no more: the guest runs there while the source is off, which learns it later."""
    point = at(PREP, "verify_disks", "before_do")
    moves.start(hold_at=point)
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.destination.wait_held(point)
    moves.power_off(SOURCE)
    moves.destination.release(point)
    ended = moves.destination.outcome(operation)
    assert ended.state is OperationState.DONE
    moves.wait_boot(DESTINATION, 2)
    moves.power_on(SOURCE)
    moves.resized(instance, operation, SETTLED)
    moves.assert_arrived(instance)
    moves.assert_owner(instance, DESTINATION, "resized")
    finish(moves, instance, migration)


@pytest.mark.parametrize("step", ["grow_disks", "start_paused", "resume_guest"])
def test_destination_power_failure_after_hand_over(moves: MoveCell, step: str) -> None:
    """The source says what it waits for and starts nothing; back again, the destination goes on by itself."""
    point = at(PREP, step, "before_do")
    moves.start(hold_at=f"{point},{COMMIT}")
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    if step == "resume_guest":
        moves.destination.wait_held(COMMIT)
        moves.assert_same_disks(instance)
        moves.destination.release(COMMIT)
    moves.destination.wait_held(point)
    moves.power_off(DESTINATION)
    said = wait_for(lambda: moves.api.get_operation(operation, host=SOURCE).waiting_for, SETTLED, "it to wait")
    assert said and DESTINATION in said
    assert oracle.qemu_processes(moves.source.node) == []
    moves.power_on(DESTINATION)
    moves.destination.release(point)
    if step != "resume_guest":
        moves.destination.wait_held(COMMIT)
        moves.assert_same_disks(instance)
        moves.destination.release(COMMIT)
    moves.resized(instance, operation, SETTLED)
    moves.assert_arrived(instance)
    moves.assert_owner(instance, DESTINATION, "resized")
    finish(moves, instance, migration)


def test_destination_off_in_the_middle_of_a_disk(moves: MoveCell) -> None:
    """It stays off: the guest runs again where it was, without it. Back again, it has nothing of it."""
    moves.start(transfer={"bandwidth_mb": 4}, compute={"peer_patience": 10.0})
    instance = moves.boot()
    _, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    moves.power_off(DESTINATION)
    assert moves.source.outcome(operation).state is OperationState.UNDONE
    moves.assert_stayed(instance)
    moves.power_on(DESTINATION)
    gone_back(moves, instance, operation)


def test_taken_back_by_force_after_hand_over(moves: MoveCell) -> None:
    """The destination is off for good, an operator says so: the guest runs at the source. It returns all the same: it
    starts nothing and keeps nothing."""
    point = at(PREP, "start_paused", "after_do")
    moves.start(hold_at=point)
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.destination.wait_held(point)
    moves.power_off(DESTINATION)
    moves.source.send("take_back_instance", instance.uuid, migration.uuid, destination_is_off=True)
    assert moves.source.outcome(operation).state is OperationState.UNDONE
    moves.assert_stayed(instance)
    moves.power_on(DESTINATION)
    moves.destination.release(point)
    gone_back(moves, instance, operation)


def test_taken_back_by_force_after_it_arrived(moves: MoveCell) -> None:
    """The destination ran the guest when it went off for good. It returns all the same, starts nothing, and gives up
    what it has."""
    moves.start()
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.resized(instance, operation)
    moves.assert_arrived(instance)
    moves.power_off(DESTINATION)
    moves.source.do("take_back_instance", instance.uuid, migration.uuid, destination_is_off=True)
    moves.assert_stayed(instance)
    moves.power_on(DESTINATION)
    moves.assert_owner(instance, SOURCE, "active")
    moves.delete(instance, SOURCE)
    moves.stop()


@pytest.mark.parametrize("transport", ["nbd", "ssh"])
def test_cable_of_the_destination_pulled_in_the_middle_of_a_disk(moves: MoveCell, transport: str) -> None:
    moves.start(hold_at=COMMIT, transfer={"transport": transport, "bandwidth_mb": 4})
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    with faults.link_down(moves.destination.node):
        pause(10)
    moves.arrived(instance, operation)
    finish(moves, instance, migration)


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_cable_pulled_while_it_is_handed_over(moves: MoveCell, host: str) -> None:
    point = at(MOVE, "hand_over", "before_do")
    moves.start(hold_at=f"{point},{COMMIT}")
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.source.wait_held(point)
    with faults.link_down(moves.host(host).node):
        moves.source.release(point)
        pause(10)
    moves.arrived(instance, operation)
    finish(moves, instance, migration, REVERT)


def pause(seconds: float) -> None:
    """A fault of so long."""
    since = time.monotonic()
    wait_for(lambda: time.monotonic() - since >= seconds, seconds + 1, f"{seconds} s to pass")


def test_no_room_at_the_destination(moves: MoveCell) -> None:
    """It fills up after the guest was shut down: the guest runs again where it was, the destination is clean."""
    point = at(MOVE, "send_disk", "before_do")
    node = moves.destination.node
    with faults.disk_of(node, 192):
        moves.start(hold_at=point, claims={"disk_allocation_ratio": 100.0})
        instance = moves.boot(48)
        _, operation = moves.resize(instance)
        moves.source.wait_held(point)
        ballast = node.instances / "_base" / "ballast"
        room = os.statvfs(node.instances)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - (16 << 20)))
        moves.source.release(point)
        moves.undone(instance, operation, SETTLED)
        assert "DiskFull" in str(moves.ask("get_operation", operation, host=SOURCE).error)
        ballast.unlink()
        gone_back(moves, instance, operation)


def test_rabbitmq_stopped_for_20_seconds(moves: MoveCell) -> None:
    """The broker is away while a disk is sent: its bytes go on, the rest when it is back."""
    moves.start(hold_at=COMMIT, transfer={"bandwidth_mb": 4})
    instance = moves.boot()
    migration, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    moves.cell.rabbit.stop()
    pause(20)
    moves.cell.rabbit.start()
    moves.arrived(instance, operation)
    finish(moves, instance, migration)


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
@pytest.mark.parametrize("transport", ["nbd", "ssh", "warm"])
def test_deleted_in_the_middle_of_a_disk(moves: MoveCell, host: str, transport: str) -> None:
    """By either host: no process and no file is left on either (CVE-2015-3241)."""
    options = WARM if transport == "warm" else {"transport": transport}
    moves.start(transfer={**options, "bandwidth_mb": 2})
    instance = moves.boot()
    _, operation = moves.resize(instance)
    moves.wait_bytes(instance)
    assert [p for h in moves.hosts for p in h.node.ns.processes(r"^(\S*/)?(qemu-nbd|rsync) ")]
    moves.delete(instance, host)
    assert moves.destination.outcome(operation, SETTLED).state is OperationState.UNDONE
    moves.assert_gone(instance)
    moves.stop()


@pytest.mark.parametrize("host", [SOURCE, DESTINATION])
def test_deleted_while_it_is_resized(moves: MoveCell, host: str) -> None:
    """By either host: nothing of either copy is left (CVE-2015-3280, CVE-2016-7498)."""
    moves.start()
    instance = moves.boot()
    _, operation = moves.resize(instance)
    moves.resized(instance, operation)
    moves.assert_arrived(instance)
    moves.delete(instance, host)
    moves.stop()
