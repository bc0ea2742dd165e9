"""Cold moves between two real hosts: the contract, and what only guests show. Run inside the first host by
``test_libvirt_moves``; the second has an agent."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors, objects
from compute_worker.objects import DiskInfo, ImageMeta, Instance, Migration
from compute_worker.virt.driver import Part
from compute_worker.virt.libvirt.guest import Guest
from tests.lab import oracle
from tests.lab.libvirt_world import DATA, INITRD, KERNEL, lab_image
from tests.lab.settings import IMAGES_PATH
from tests.lab.two_hosts import TwoHosts
from tests.virt import contract_moves
from tests.virt.contract import assert_nothing, booted
from tests.virt.contract_moves import active, migration_of
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.world import moving, peer, run, undo
from tests.waiting import wait_for

NBD = {"transport": "nbd", "nbd_plaintext": True, "compare": "full", "resize_precopy": "never"}
SSH = {"transport": "ssh", "compare": "full", "resize_precopy": "never"}
AUTO = {"transport": "auto", "compare": "full", "resize_precopy": "never"}
WARM = {"transport": "nbd", "nbd_plaintext": True, "compare": "full", "resize_precopy": "auto"}
MOVES = st.sampled_from(["do", "do", "again", "undo", "restart"])


@pytest.fixture
def transfer() -> dict[str, Any]:
    return NBD


@pytest.fixture
def world(transfer: dict[str, Any]) -> Iterator[TwoHosts]:
    world = TwoHosts(**transfer)
    yield world
    world.close()


class TestColdMove(contract_moves.ColdMoveContract):
    """As hosts are configured unless somebody says otherwise: what a running guest has is sent first."""

    @pytest.fixture
    def transfer(self) -> dict[str, Any]:
        return WARM

    @settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(moves=st.lists(MOVES, min_size=4, max_size=14))
    def test_parts_in_any_order_a_crash_can_make(self, world: TwoHosts, moves: list[str]) -> None:
        contract_moves.ColdMoveContract.test_parts_in_any_order_a_crash_can_make.hypothesis.inner_test(
            self, world, moves
        )


def begin(
    world: TwoHosts, image: ImageMeta | None = None, cmdline: str = "quiet", **changes: Any
) -> tuple[Instance, Migration, list[Part]]:
    """A guest that has ticked on the first host, and is to go to the second (or where ``changes`` say)."""
    driver, instance = booted(world, kernel_cmdline=cmdline, **({"image": image} if image else {}))
    world.memory(world.a, instance.uuid)
    migration = migration_of(world, instance, **changes)
    instance = moving(active(instance), migration)
    ask = peer(world, instance, migration)
    return instance, migration, driver.migrate_disk_and_power_off(instance, migration, 60, 1, ask)


def arrive(
    world: TwoHosts, instance: Instance, migration: Migration, told: Mapping[str, Any], **flavor: int
) -> Instance:
    there = msgspec.structs.replace(
        instance, host=migration.dest_host, flavor=msgspec.structs.replace(instance.flavor, **flavor)
    )
    info = objects.decode(told["disk_info"], DiskInfo, "test")
    run(world.driver(migration.dest_host).finish_migration(there, migration, info), RecordingJob())
    return there


def wait_boot(world: TwoHosts, host: str, uuid: str, number: int) -> str:
    """The guest has booted for the ``number``-th time of its life and ticks on that host; its console."""

    def ticked() -> str:
        console = world.console(host, uuid)
        boots = oracle.boots(console)
        return console if boots and boots[-1].number == number and boots[-1].ticks else ""

    return wait_for(ticked, 60, f"boot {number} on {host}") or ""


@pytest.mark.parametrize("transfer", [NBD, SSH], ids=["nbd", "ssh"])
def test_a_guest_goes_there_grown_and_comes_back(world: TwoHosts) -> None:
    """It shuts itself down, finds its data and the larger disk there, and, reverted, what it was here."""
    instance, migration, parts = begin(world, migration_type="resize")
    job = RecordingJob()
    told = run(parts, job)
    console = world.instances / f"{instance.uuid}_resize" / "console.log"
    assert "LAB: CLEAN SHUTDOWN" in console.read_text(errors="replace")
    sent = {phase: (done, total) for phase, done, total in job.reports if phase.startswith("send_")}
    assert {"send_disk", "send_disk.eph0", "send_disk.swap"} <= sent.keys()
    assert all(done == total for done, total in sent.values())
    there = arrive(world, instance, migration, told, root_gb=2, swap_mb=32)
    assert world.processes(world.b, "qemu-nbd") == []
    world.driver(world.b).unpause(there)
    disks = oracle.seen_disks(wait_boot(world, world.b, instance.uuid, 2))
    assert (disks["vda"]["size"], disks["vdb"]["label"]) == (str(2 << 30), "ephemeral0")
    assert (disks["vdc"]["fs"], disks["vdc"]["size"]) == ("swap", str(32 << 20))
    run(world.driver(world.b).set_aside(there, migration), RecordingJob())
    run(world.driver(world.a).finish_revert_migration(instance, migration), RecordingJob())
    world.driver(world.a).unpause(instance)
    disks = oracle.seen_disks(wait_boot(world, world.a, instance.uuid, 2))
    assert disks["vda"]["size"] == str(1 << 30)
    world.driver(world.b).confirm_migration(there, migration, RecordingJob())
    assert_nothing(world, world.b, instance.uuid)


def test_on_one_host_the_disk_grows_too(world: TwoHosts) -> None:
    instance, migration, parts = begin(world, dest_host=world.a, migration_type="resize")
    there = arrive(world, instance, migration, run(parts, RecordingJob()), root_gb=2)
    world.driver(world.a).unpause(there)
    console = wait_boot(world, world.a, instance.uuid, 2)
    assert oracle.seen_disks(console)["vda"]["size"] == str(2 << 30)
    world.driver(world.a).confirm_migration(instance, migration, RecordingJob())
    assert world.power(world.a, instance.uuid) == "running"


def test_an_image_that_is_gone_from_the_store_comes_from_the_source(world: TwoHosts) -> None:
    """Base, kernel and ramdisk, which the destination has never seen."""
    names = {name: f"{name}-{uuid.uuid4()}" for name in (KERNEL, INITRD, DATA)}
    for name, copy in names.items():
        shutil.copyfile(Path(IMAGES_PATH, name), Path(IMAGES_PATH, copy))
    image = lab_image(id=names[DATA], kernel_id=names[KERNEL], ramdisk_id=names[INITRD])
    instance, migration, parts = begin(world, image=image)
    for copy in names.values():
        Path(IMAGES_PATH, copy).unlink()
    there = arrive(world, instance, migration, run(parts, RecordingJob()))
    world.driver(world.b).unpause(there)
    wait_boot(world, world.b, instance.uuid, 2)


@pytest.mark.parametrize("transfer", [NBD, SSH], ids=["nbd", "ssh"])
def test_cancelled_in_the_middle_of_a_disk(world: TwoHosts, transfer: dict[str, Any]) -> None:
    """A slow disk: no process of the transfer is left on either host, and the guest is as it was."""
    world.use({**transfer, "bandwidth_mb": 1})
    world.restart(world.a)
    instance, _, parts = begin(world)
    job = RecordingJob()
    run(parts[:3], job)
    disk = world.instances / f"{instance.uuid}_resize" / "disk"
    with open(disk, "ab") as file:
        file.write(os.urandom(20 << 20))
    thread, raised = in_thread(parts[3].do, job)
    wait_for(lambda: [r for r in job.reports if r[0] == "send_disk" and r[1]], 30, "bytes on the way")
    job.cancel()
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)
    os.truncate(disk, disk.stat().st_size - (20 << 20))
    undo(parts[:4], RecordingJob())
    for host, name in itertools.product((world.a, world.b), ("qemu-nbd", "rsync", "ssh")):
        wait_for(lambda h=host, n=name: world.processes(h, n) == [], 10, f"the end of {name} on {host}")
    assert_nothing(world, world.b, instance.uuid)
    world.driver(world.a).power_on(instance, RecordingJob())
    wait_boot(world, world.a, instance.uuid, 2)


DISKS = ("disk", "disk.eph0", "disk.swap")
BUSY = "quiet lab.dirty=8"
"""A guest that rewrites 8 MiB for ever."""


def assert_no_trace(world: TwoHosts, host: str, uuid: str) -> None:
    """No backup, checkpoint, bitmap or file of a precopy."""
    guest = Guest(world._host, uuid)
    if host == world.a and guest.exists():
        assert (guest.checkpoints(), guest.backup_xml()) == ([], None)
    assert not [name for name in world.files(host, uuid) if "precopy" in name]
    assert [world.bitmaps(host, uuid, name) for name in DISKS] == [[], [], []]


@pytest.mark.parametrize("transfer", [WARM], ids=["warm"])
def test_warm_move_of_a_guest_that_writes_all_the_time(world: TwoHosts) -> None:
    instance, migration, parts = begin(world, cmdline=BUSY, migration_type="resize")
    job = RecordingJob()
    told = parts[0].do(job)
    assert told == {"disks": dict.fromkeys(DISKS, told["disks"]["disk"]), "reason": ""}
    ticks = oracle.boots(world.console(world.a, instance.uuid))[-1].ticks
    wait_for(lambda: oracle.boots(world.console(world.a, instance.uuid))[-1].ticks[-1] > ticks[-1] + 1, 30, "it to run")
    told = run(parts[1:], job)
    assert len([reason for reason in job.reasons if "only what was written since" in reason]) >= len(DISKS)
    there = msgspec.structs.replace(instance, host=world.b)
    info = objects.decode(told["disk_info"], DiskInfo, "test")
    arriving = world.driver(world.b).finish_migration(there, migration, info)
    run(arriving[:3], RecordingJob())
    for name in DISKS:
        assert world.content(world.b, instance.uuid, name) == world.content(world.a, instance.uuid, name, "_resize")
    run(arriving[3:], RecordingJob())
    assert_no_trace(world, world.b, instance.uuid)
    world.driver(world.b).unpause(there)
    wait_boot(world, world.b, instance.uuid, 2)
    run(world.driver(world.b).set_aside(there, migration), RecordingJob())
    run(world.driver(world.a).finish_revert_migration(instance, migration), RecordingJob())
    assert_no_trace(world, world.a, instance.uuid)
    world.driver(world.a).unpause(instance)
    wait_boot(world, world.a, instance.uuid, 2)


@pytest.mark.parametrize("transfer", [WARM], ids=["warm"])
@pytest.mark.parametrize("last", ["precopy", "power_off", "set_aside", "send_disk", "verify_copy"])
def test_warm_move_undone_leaves_no_trace(world: TwoHosts, last: str) -> None:
    instance, _, parts = begin(world, cmdline=BUSY)
    before = world.files(world.a, instance.uuid)
    done = [part.name for part in parts].index(last) + 1
    run(parts[:done], RecordingJob())
    for part in reversed(parts[:done]):
        part.undo(RecordingJob())
        if part.name == "power_off":
            # As the manager does: the guest runs again before the destination is asked to clean up.
            world.driver(world.a).power_on(instance, RecordingJob())
    assert world.files(world.a, instance.uuid) == before
    assert_nothing(world, world.b, instance.uuid)
    assert_no_trace(world, world.a, instance.uuid)
    wait_boot(world, world.a, instance.uuid, 1 if last == "precopy" else 2)


@pytest.mark.parametrize("transfer", [WARM], ids=["warm"])
def test_a_warm_move_that_begins_again_builds_upon_nothing_of_before(world: TwoHosts) -> None:
    """Everything was sent, the guest was taken back while the destination was silent, and has written since."""
    instance, migration, parts = begin(world, cmdline=BUSY)
    run(parts, RecordingJob())

    def silent(request: Mapping[str, Any]) -> Mapping[str, Any]:
        raise errors.PeerUnavailable(host=world.b)

    source = world.driver(world.a)
    undo(source.migrate_disk_and_power_off(instance, migration, 60, 1, silent), RecordingJob())
    source.power_on(instance, RecordingJob())
    wait_boot(world, world.a, instance.uuid, 2)
    told = run(source.migrate_disk_and_power_off(instance, migration, 60, 1, peer(world, instance, migration)),
               RecordingJob())  # fmt: skip
    assert_arrived(world, instance, migration, told)


def assert_arrived(world: TwoHosts, instance: Instance, migration: Migration, told: Mapping[str, Any]) -> None:
    """The guest would read of every disk there what it would read here."""
    there = msgspec.structs.replace(instance, host=world.b)
    info = objects.decode(told["disk_info"], DiskInfo, "test")
    run(world.driver(world.b).finish_migration(there, migration, info)[:3], RecordingJob())
    for name in DISKS:
        assert world.content(world.b, instance.uuid, name) == world.content(world.a, instance.uuid, name, "_resize")
    assert_no_trace(world, world.b, instance.uuid)


@pytest.mark.parametrize("transfer", [WARM], ids=["warm"])
def test_a_disk_that_cannot_say_what_was_written_since_is_sent_as_a_whole(world: TwoHosts) -> None:
    instance, migration, parts = begin(world, cmdline=BUSY, migration_type="resize")
    names = [part.name for part in parts]
    job = RecordingJob()
    token = parts[0].do(job)["disks"]["disk"]
    run(parts[1:3], job)
    disk = world.instances / f"{instance.uuid}_resize" / "disk"
    subprocess.run(["qemu-img", "bitmap", "--remove", "-f", "qcow2", disk, token], check=True, timeout=60)
    for name in ("send_disk", "send_disk.eph0", "send_disk.swap", "verify_copy"):
        told = run(parts[names.index(name) : names.index(name) + 1], job, 2)
    assert any(reason.startswith("disk is sent as a whole: ") for reason in job.reasons)
    assert any(f"disk.eph0: only what was written since {token}" in reason for reason in job.reasons)
    assert_arrived(world, instance, migration, told)


@pytest.mark.parametrize("transfer", [WARM], ids=["warm"])
def test_a_worker_that_died_goes_on_with_the_same_point_in_time(world: TwoHosts) -> None:
    instance, migration, parts = begin(world, cmdline=BUSY)
    first = parts[0].do(RecordingJob())
    for host in (world.a, world.b):
        world.restart(host)
    ask = peer(world, instance, migration)
    parts = world.driver(world.a).migrate_disk_and_power_off(instance, migration, 60, 1, ask)
    again = parts[0].do(RecordingJob())
    assert again["disks"].keys() == first["disks"].keys()
    arrive(world, instance, migration, run(parts[1:], RecordingJob()))


@pytest.mark.parametrize("transfer", [AUTO], ids=["auto"])
def test_with_certificates_disks_go_by_tls(world: TwoHosts) -> None:
    """Run where hosts have certificates."""
    instance, migration, parts = begin(world)
    job = RecordingJob()
    told = run(parts, job)
    assert "disks go to node2 by nbd: both hosts have certificates" in job.reasons
    there = arrive(world, instance, migration, told)
    world.driver(world.b).unpause(there)
    wait_boot(world, world.b, instance.uuid, 2)
