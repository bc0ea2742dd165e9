"""Live migration between two real hosts: the contract, and what only guests show. Run inside the first host by
``test_libvirt_live``; the second has an agent.

Guests here are emulated, and QEMU 7.2 loses pages of an emulated guest that writes all the time, the more iterations
the surer (see ``livemigration_plan.policy``). Busy guests are therefore only where a move is aborted or forced.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from compute_worker import errors, objects
from compute_worker.objects import ImageMeta, Instance, MigrateData, Migration
from compute_worker.states import PowerState
from compute_worker.virt.driver import DriverEvent, EventKind
from tests.lab import oracle
from tests.lab.libvirt_world import DATA, lab_image
from tests.lab.settings import IMAGES_PATH
from tests.lab.two_hosts import TwoHosts
from tests.virt import contract_moves
from tests.virt.contract import assert_nothing, booted
from tests.virt.contract_moves import active, migration_of
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.world import moving, run
from tests.waiting import wait_for

DISKS = ("disk", "disk.eph0", "disk.swap")
BUSY = "quiet lab.dirty=8"
"""A guest that rewrites 8 MiB for ever."""
SLOW = {"bandwidth_mb": 4}
"""Some fifteen seconds for the first pass over the guest's memory."""


@pytest.fixture
def world() -> Iterator[TwoHosts]:
    world = TwoHosts(resize_precopy="never")
    yield world
    world.use_live({})
    world.close()


class TestLiveMove(contract_moves.LiveMoveContract):
    pass


@dataclass
class Trip:
    """One guest on its way from ``source`` to ``dest``."""

    world: TwoHosts
    source: str
    dest: str
    instance: Instance
    migration: Migration
    data: MigrateData

    @classmethod
    def prepared(
        cls, world: TwoHosts, instance: Instance, source: str = "node1", dest: str = "node2", attempt: int = 1
    ) -> Trip:
        """Checked and made ready, as the manager does."""
        migration = migration_of(
            world, instance, "live-migration", source_host=source, dest_host=dest, attempt=attempt
        )
        instance = moving(active(instance), migration, host=source)
        here, there = world.driver(source), world.driver(dest)
        data = there.check_can_live_migrate_destination(instance, migration, here.get_available_resource(), False)
        data = here.check_can_live_migrate_source(instance, migration, data)
        parts = there.pre_live_migration(instance, migration, data, here.get_instance_disk_info(instance))
        told = run(parts, RecordingJob())
        return cls(world, source, dest, instance, migration, objects.decode(told["migrate_data"], MigrateData, "test"))

    def fly(self, job: RecordingJob) -> None:
        self.world.driver(self.source).live_migration(self.instance, self.migration, self.data, job)

    def take_off(self, job: RecordingJob) -> tuple[threading.Thread, list[BaseException]]:
        """In the air, and sending the guest's memory."""
        flown = in_thread(self.fly, job)
        wait_for(lambda: flown[1] or self._sending(), 60, "memory on its way")
        assert not flown[1], flown[1]
        return flown

    def _sending(self) -> bool:
        found = self.world.driver(self.source).get_job_statistics(self.instance.uuid)
        return bool(found.memory_processed and found.memory_processed > 1 << 20)

    def settle(self) -> Instance:
        """Both ends tidy up; the record of the guest as its new host has it."""
        there = msgspec.structs.replace(self.instance, host=self.dest)
        self.world.driver(self.dest).post_live_migration_at_destination(there, self.migration)
        self.world.driver(self.source).post_live_migration(self.instance, self.migration, self.data)
        assert_nothing(self.world, self.source, self.instance.uuid)
        return msgspec.structs.replace(there, migration=None)

    def turn_back(self) -> None:
        """Both ends are as they were."""
        self.world.driver(self.source).rollback_live_migration_at_source(self.instance, self.migration)
        self.world.driver(self.dest).rollback_live_migration_at_destination(self.instance, self.migration, self.data)
        assert_nothing(self.world, self.dest, self.instance.uuid)
        assert self.world.power(self.source, self.instance.uuid) == "running"
        assert "live_migration" not in " ".join(self.world.files(self.source, self.instance.uuid))


def begin(world: TwoHosts, cmdline: str = "quiet", **changes: Any) -> Instance:
    """A guest that ticks on the first host."""
    _, instance = booted(world, kernel_cmdline=cmdline, **changes)
    world.memory(world.a, instance.uuid)
    return instance


def goes_on(world: TwoHosts, host: str, uuid: str, beyond: int) -> None:
    """It ticks there, in the same boot, beyond a tick that it had before."""
    wait_for(lambda: world.memory(host, uuid)[1] > beyond, 60, f"it to tick on {host} beyond {beyond}")


def assert_sound(world: TwoHosts, host: str, instance: Instance) -> None:
    """Its disks are, and it starts from them: shut down and booted again it finds its data."""
    driver, boots = world.driver(host), int(world.memory(host, instance.uuid)[0])
    before = world.memory(host, instance.uuid)[1]
    assert driver.power_off(instance, RecordingJob(), 60, 1), "it did not shut itself down"
    for name in DISKS:
        world.content(host, instance.uuid, name)
    driver.power_on(instance, RecordingJob())

    def booted_again() -> bool:
        found = oracle.boots(world.console(host, instance.uuid))[-1]
        return found.number == boots + 1 and bool(found.ticks)

    wait_for(booted_again, 60, "its next boot")
    assert oracle.boots(world.console(host, instance.uuid))[-1].ticks[0] > before


def test_there_and_back(world: TwoHosts) -> None:
    """Its counter has no hole, no tick is seen twice, and its disks are its disks."""
    heard: list[DriverEvent] = []
    world.driver(world.a).register_event_listener(heard.append)
    instance = begin(world)
    uuid_ = instance.uuid
    first = Trip.prepared(world, instance)
    assert not first.data.full_copy and [disk.name for disk in first.data.disks] == list(DISKS)
    job = RecordingJob()
    first.fly(job)
    statistics = world.driver(world.a).get_job_statistics(uuid_)
    assert statistics.type == "completed" and statistics.downtime and statistics.memory_processed
    here = world.console(world.a, uuid_)
    last = oracle.boots(here)[-1].ticks[-1]
    goes_on(world, world.b, uuid_, last + 1)
    there = first.settle()
    assert oracle.double_run(here, world.console(world.b, uuid_)) == []
    assert oracle.continuity_problems(here + world.console(world.b, uuid_)) == []
    wait_for(lambda: [e for e in heard if e.kind is EventKind.MIGRATED_OUT and e.uuid == uuid_], what="the event")
    back = Trip.prepared(world, msgspec.structs.replace(there, migration=None), world.b, world.a)
    heard.clear()
    back.fly(job)
    before = world.console(world.b, uuid_)
    goes_on(world, world.a, uuid_, oracle.boots(before)[-1].ticks[-1] + 1)
    returned = back.settle()
    kinds = [event.kind for event in heard if event.uuid == uuid_]
    assert EventKind.MIGRATED_IN in kinds and EventKind.MIGRATED_OUT not in kinds
    assert oracle.continuity_problems(before + world.console(world.a, uuid_)) == []
    assert_sound(world, world.a, returned)


def test_what_the_guest_only_reads_comes_too(world: TwoHosts) -> None:
    """The config drive, byte by byte; it is there at the next boot."""
    instance = begin(world, config_drive=True, metadata={"colour": "green"})
    uuid_ = instance.uuid
    held = (world.instances / uuid_ / "disk.config").read_bytes()
    trip = Trip.prepared(world, instance)
    assert [disk.name for disk in trip.data.disks] == list(DISKS)
    trip.fly(RecordingJob())
    there = trip.settle()
    world.driver(world.b).power_off(there, RecordingJob())
    world.driver(world.b).power_on(there, RecordingJob())

    def seen() -> str:
        return oracle.seen_config_drive(world.console(world.b, uuid_)).get("meta_data", "")

    assert json.loads(wait_for(seen, 60, "its config drive") or "{}")["uuid"] == uuid_
    back = Trip.prepared(world, there, world.b, world.a)
    back.fly(RecordingJob())
    back.settle()
    assert (world.instances / uuid_ / "disk.config").read_bytes() == held


def test_aborted_in_the_middle_and_tried_again(world: TwoHosts) -> None:
    heard: list[DriverEvent] = []
    world.use_live(SLOW)
    instance = begin(world)
    world.driver(world.a).register_event_listener(heard.append)
    trip, job = Trip.prepared(world, instance), RecordingJob()
    thread, raised = trip.take_off(job)
    job.cancel()
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)
    before = world.memory(world.a, instance.uuid)
    trip.turn_back()
    assert not [event for event in heard if event.kind in (EventKind.MIGRATED_IN, EventKind.MIGRATED_OUT)]
    goes_on(world, world.a, instance.uuid, before[1] + 1)
    world.use_live({})
    again = Trip.prepared(world, instance, attempt=2)
    again.fly(RecordingJob())
    goes_on(world, world.b, instance.uuid, before[1] + 1)
    again.settle()


def test_aborted_by_a_command(world: TwoHosts) -> None:
    world.use_live(SLOW)
    trip = Trip.prepared(world, begin(world, BUSY))
    thread, raised = trip.take_off(RecordingJob())
    world.driver(world.a).live_migration_abort(trip.instance)
    thread.join(10)
    assert not thread.is_alive() and isinstance(raised[0], errors.MigrationFailed)
    trip.turn_back()


@pytest.mark.parametrize("postcopy", [False, True], ids=["pause", "by_postcopy"])
def test_forced_by_an_operator(world: TwoHosts, postcopy: bool) -> None:
    """Paused it arrives running; switched to post-copy it cannot be stopped any more."""
    world.use_live({**SLOW, "permit_post_copy": postcopy, "downtime_delay": 3600.0})
    trip = Trip.prepared(world, begin(world, BUSY))
    job = RecordingJob()
    thread, raised = trip.take_off(job)
    before = world.memory(world.a, trip.instance.uuid)[1]
    world.driver(world.a).live_migration_force_complete(trip.instance, postcopy)
    if postcopy:
        wait_for(lambda: world.driver(world.a).get_job_statistics(trip.instance.uuid).postcopy, 10, "post-copy")
        with pytest.raises(errors.InvalidState, match="post-copy"):
            world.driver(world.a).live_migration_abort(trip.instance)
        job.cancel()
    thread.join(90)
    assert not thread.is_alive() and not raised
    goes_on(world, world.b, trip.instance.uuid, before)
    trip.settle()


def test_forced_and_then_given_up(world: TwoHosts) -> None:
    """A guest that was stopped so that it converges runs again where it does not leave."""
    world.use_live({"bandwidth_mb": 1})
    heard: list[DriverEvent] = []
    trip, job = Trip.prepared(world, begin(world, BUSY)), RecordingJob()
    thread, raised = trip.take_off(job)
    world.driver(world.a).register_event_listener(heard.append)
    world.driver(world.a).live_migration_force_complete(trip.instance, False)
    assert world.power(world.a, trip.instance.uuid) == "paused"
    job.cancel()
    thread.join(20)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)
    before = world.memory(world.a, trip.instance.uuid)[1]
    trip.turn_back()
    goes_on(world, world.a, trip.instance.uuid, before)
    kinds = [event.kind for event in heard if event.uuid == trip.instance.uuid]
    assert EventKind.RESUMED in kinds and EventKind.MIGRATED_IN not in kinds


POLICIES: dict[str, tuple[dict[str, Any], str]] = {
    "abort": ({"completion_timeout": 10.0}, "abort"),
    "force": ({"completion_timeout": 10.0, "timeout_action": "force_complete"}, "pause"),
    "by_postcopy": ({"completion_timeout": 10.0, "timeout_action": "force_complete", "permit_post_copy": True},
                    "postcopy"),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_guest_that_does_not_converge(world: TwoHosts, name: str) -> None:
    options, acted = POLICIES[name]
    world.use_live({"bandwidth_mb": 2, "max_downtime_ms": 100, **options})
    trip, job = Trip.prepared(world, begin(world, "quiet lab.dirty=16")), RecordingJob()
    thread, raised = in_thread(trip.fly, job)
    thread.join(100)
    assert not thread.is_alive(), job.reasons
    reasons = [reason for reason in job.reasons if reason.startswith(f"{acted}: ")]
    assert reasons, job.reasons
    if acted == "abort":
        assert isinstance(raised[0], errors.MigrationFailed) and "completion_timeout" in raised[0].message
        trip.turn_back()
    else:
        assert not raised
        wait_for(lambda: world.power(world.b, trip.instance.uuid) == "running", what="it to run there")
        trip.settle()


def test_a_worker_that_died_joins_what_is_in_the_air(world: TwoHosts) -> None:
    world.use_live(SLOW)
    trip = Trip.prepared(world, begin(world))
    thread, _ = trip.take_off(RecordingJob())
    world.restart(world.a)
    job = RecordingJob()
    trip.fly(job)
    assert "it is in the air already: joined" in job.reasons
    thread.join(10)
    trip.fly(RecordingJob())
    trip.settle()


def test_a_worker_that_died_finds_that_it_has_failed(world: TwoHosts) -> None:
    """Nothing is begun anew on disks that were written to."""
    world.use_live(SLOW)
    trip = Trip.prepared(world, begin(world))
    thread, _ = trip.take_off(RecordingJob())
    world.restart(world.a)
    world.driver(world.a).live_migration_abort(trip.instance)
    thread.join(10)
    with pytest.raises(errors.MigrationFailed, match="nobody watched"):
        trip.fly(RecordingJob())
    trip.turn_back()


def test_a_base_with_other_bytes_is_never_used(world: TwoHosts) -> None:
    """What lies under the name of an ephemeral disk's base at the destination is somebody else's (CVE-2013-7130)."""
    instance = begin(world)
    bases = {disk.name: disk.backing for disk in world.driver(world.a).get_instance_disk_info(instance).disks}
    name = bases["disk.eph0"]
    assert name
    path = world.instances / "_base" / name
    kept = path.with_name("kept-base")
    # The source's: then the destination's differs from it.
    shutil.copyfile(path, kept)
    with open(path, "r+b") as file:
        file.seek(300 << 20)
        file.write(b"of another tenant")
    try:
        trip = Trip.prepared(world, instance)
        assert trip.data.full_copy and not any(disk.backing for disk in trip.data.disks)
        trip.fly(RecordingJob())
        there = trip.settle()
        info = world.driver(world.b).get_instance_disk_info(there)
        assert [disk.backing for disk in info.disks] == [None, None, None]
        assert_sound(world, world.b, there)
    finally:
        shutil.copyfile(kept, path)
        kept.unlink()


def test_an_image_that_is_gone_from_the_store(world: TwoHosts) -> None:
    """Its disks travel whole, as the destination has never seen the image."""
    copy = f"{DATA}-{uuid.uuid4()}"
    shutil.copyfile(Path(IMAGES_PATH, DATA), Path(IMAGES_PATH, copy))
    image: ImageMeta = lab_image(id=copy)
    instance = begin(world, image=image)
    Path(IMAGES_PATH, copy).unlink()
    trip = Trip.prepared(world, instance)
    assert trip.data.full_copy
    trip.fly(RecordingJob())
    assert_sound(world, world.b, trip.settle())


def test_a_destination_s_name_is_no_option(world: TwoHosts) -> None:
    instance = begin(world)
    trip = Trip.prepared(world, instance)
    for name in ("node2/system?command=x", "-node2", "a:b:c/d", "no:de"):
        trip.data = msgspec.structs.replace(trip.data, listen_address=name)
        with pytest.raises(errors.NotSupported, match="no host name"):
            trip.fly(RecordingJob())
    trip.turn_back()


def test_without_certificates_nothing_goes_where_tls_is_asked_for(world: TwoHosts) -> None:
    instance = begin(world)
    world.use_live({"tls": "required"})
    with pytest.raises(errors.NotSupported, match=r"tls = required.*missing"):
        Trip.prepared(world, instance)


def test_a_guest_that_ends_in_the_middle(world: TwoHosts) -> None:
    world.use_live(SLOW)
    trip = Trip.prepared(world, begin(world))
    thread, raised = trip.take_off(RecordingJob())
    world.guest_dies(world.a, trip.instance.uuid)
    thread.join(20)
    assert not thread.is_alive() and isinstance(raised[0], errors.GuestFailed)
    driver = world.driver(world.b)
    driver.rollback_live_migration_at_destination(trip.instance, trip.migration, trip.data)
    assert_nothing(world, world.b, trip.instance.uuid)
    world.driver(world.a).rollback_live_migration_at_source(trip.instance, trip.migration)


def flown_into(world: TwoHosts, trip: Trip, seconds: float) -> tuple[list[BaseException], float]:
    """What became of a flight while somebody outside breaks something, and for how long it went on."""
    began, job = time.monotonic(), RecordingJob()
    thread, raised = trip.take_off(job)
    (world.instances / "locks" / "in-the-air").touch()
    thread.join(seconds)
    assert not thread.is_alive(), f"the flight does not end: {job.reasons}, {job.reports[-3:]}"
    (world.instances / "locks" / "in-the-air").unlink()
    return raised, time.monotonic() - began


def longest_gap(console: str) -> float:
    """Seconds of the guest's own time between two ticks, at most: it ticks once a second."""
    ups = [float(up) for up in re.findall(r"LAB: tick \d+ up=([\d.]+)", console)]
    return max((b - a for a, b in itertools.pairwise(ups)), default=0.0)


@pytest.mark.timeout(380)
def test_fault_at_the_destination(world: TwoHosts) -> None:
    """Run while somebody outside pulls the destination's cable, or kills its libvirtd or its qemu."""
    world.use_live({"bandwidth_mb": 1, "progress_timeout": 8.0})
    trip = Trip.prepared(world, begin(world))
    before = world.memory(world.a, trip.instance.uuid)[1]
    raised, took = flown_into(world, trip, 150)
    print(f"ended after {took:.1f} s: {raised[0]}")
    assert isinstance(raised[0], errors.MigrationFailed)
    goes_on(world, world.a, trip.instance.uuid, before + 5)
    assert longest_gap(world.console(world.a, trip.instance.uuid)) < 8, "the guest stood still meanwhile"
    wait_for((world.instances / "locks" / "healed").exists, 120, "the fault's end")
    (world.instances / "locks" / "healed").unlink()
    wait_for(lambda: world.driver(world.b).available, 60, "the other host")
    trip.turn_back()
    world.use_live({})
    again = Trip.prepared(world, trip.instance, attempt=2)
    again.fly(RecordingJob())
    again.settle()


@pytest.mark.parametrize("tls", [True])
def test_by_tls(world: TwoHosts, tls: bool) -> None:
    """Run where hosts have certificates."""
    world.use_live({"tls": "required", "parallel_connections": 2})
    instance = begin(world)
    trip = Trip.prepared(world, instance)
    assert trip.data.native_tls
    job = RecordingJob()
    trip.fly(job)
    assert any("qemu+tls://node2/system" in reason for reason in job.reasons)
    trip.settle()


@pytest.mark.parametrize("shared", [True])
def test_one_directory(world: TwoHosts, shared: bool) -> None:
    """Run where both hosts see one instances directory: nothing travels, nothing is made, nothing is removed."""
    instance = begin(world)
    before = world.files(world.a, instance.uuid)
    trip = Trip.prepared(world, instance)
    assert trip.data.shared_instance_path and trip.data.disks == []
    world.driver(world.b).rollback_live_migration_at_destination(trip.instance, trip.migration, trip.data)
    assert world.files(world.a, instance.uuid) == before
    trip = Trip.prepared(world, instance)
    trip.fly(RecordingJob())
    there = msgspec.structs.replace(trip.instance, host=world.b)
    world.driver(world.b).post_live_migration_at_destination(there, trip.migration)
    world.driver(world.a).post_live_migration(trip.instance, trip.migration, trip.data)
    assert world.power(world.a, instance.uuid) == "nostate"
    assert world.driver(world.b).get_info(instance.uuid).power_state is PowerState.RUNNING
    assert world.files(world.b, instance.uuid) == before
    assert os.listdir(world.instances / "locks") is not None
    assert not list(world.instances.glob("probe-*"))
