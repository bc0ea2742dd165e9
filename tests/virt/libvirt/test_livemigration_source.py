"""The source lets go of a guest, or keeps it: what was begun is known after a death."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import msgspec
import pytest

from compute_worker import errors
from compute_worker.objects import Instance, MigrateData, Migration
from compute_worker.states import PowerState, VmState
from compute_worker.virt.libvirt import livemigration_flight
from compute_worker.virt.libvirt.guest_state import GuestState
from compute_worker.virt.libvirt.livemigration_record import Begun
from tests.virt.contract import booted
from tests.virt.contract_moves import active, migration_of
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.libvirt.flyingguest import BROKEN, ENDED, GONE, RUNNING, STAYED, FlyingGuest
from tests.virt.libvirt.moveworld import MoveWorld
from tests.virt.world import moving
from tests.waiting import wait_for

Make = Callable[..., MoveWorld]
HELD = GuestState(PowerState.PAUSED, "paused", "user")
SWITCHING = GuestState(PowerState.PAUSED, "paused", "migration")


class Scene:
    """A guest of the first host whose hypervisor obeys the test."""

    def __init__(self, world: MoveWorld, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver, instance = booted(world)  # type: ignore[arg-type]
        self.migration: Migration = migration_of(world, instance, "live-migration")  # type: ignore[arg-type]
        self.instance: Instance = moving(active(instance), self.migration)
        deeds = self.driver._deeds  # type: ignore[attr-defined]
        self.directory = Path(deeds.disks.directory.path(instance.uuid))
        self.guest = FlyingGuest(deeds.guest(instance.uuid).xml())
        self.guest.uuid = instance.uuid
        info = deeds.disks.disk_info(instance.uuid)
        self.data = MigrateData(migration=self.migration.uuid, block_migration=True, disks=info.disks)
        monkeypatch.setattr(deeds, "guest", lambda uuid: self.guest)

    @property
    def record(self) -> Path:
        return self.directory / "live_migration.json"

    def go(self, job: RecordingJob | None = None) -> tuple[Any, list[BaseException]]:
        return in_thread(
            self.driver.live_migration, self.instance, self.migration, self.data, job or RecordingJob()
        )

    def fly(self) -> list[BaseException]:
        """To the end; what was raised."""
        thread, raised = self.go()
        thread.join(10)
        assert not thread.is_alive()
        return raised

    def begun(self, attempt: int = 1) -> None:
        self.record.write_bytes(msgspec.json.encode(Begun(self.migration.uuid, attempt)))


@pytest.fixture
def scene(move_world: Make, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(livemigration_flight, "LOOK_SECONDS", 0.01)
    return Scene(move_world(), monkeypatch)


def test_it_is_on_record_before_libvirt_is_asked(scene: Scene) -> None:
    thread, raised = scene.go()
    wait_for(lambda: scene.guest.migrated, what="the call")
    assert scene.record.exists() and scene.guest.marks == [], "checkpoints do not travel"
    scene.guest.land(GONE)
    thread.join(10)
    assert not raised
    assert scene.guest.migrated is not None
    uri, params, flags = scene.guest.migrated
    assert uri == "qemu+tcp://node2/system"
    assert not flags & libvirt.VIR_MIGRATE_UNDEFINE_SOURCE, "its definition says to a successor that it arrived"
    assert params[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] == ["vda", "vdb", "vdc"]
    for name in (libvirt.VIR_MIGRATE_PARAM_DEST_XML, libvirt.VIR_MIGRATE_PARAM_PERSIST_XML):
        assert scene.migration.uuid in params[name]


def test_called_again_after_it_arrived(scene: Scene) -> None:
    scene.begun()
    scene.guest.land(GONE)
    assert scene.fly() == [] and scene.guest.migrated is None


def test_joined(scene: Scene) -> None:
    scene.begun()
    scene.guest.take_off()
    job = RecordingJob()
    thread, raised = scene.go(job)
    wait_for(lambda: job.reasons, what="the reason")
    scene.guest.land(GONE)
    thread.join(10)
    assert not raised and scene.guest.migrated is None and "joined" in job.reasons[0]


@pytest.mark.parametrize("how", ["seen to arrive", "joined", "found arrived"])
def test_the_measured_downtime_is_told(scene: Scene, how: str) -> None:
    job = RecordingJob()
    if how != "seen to arrive":
        scene.begun()
    if how == "joined":
        scene.guest.take_off()
    if how == "found arrived":
        scene.guest.land(GONE)
    thread, raised = scene.go(job)
    if how != "found arrived":
        wait_for(lambda: "running" in [d.get("status") for d in job.details], what="a report")
        scene.guest.land(GONE)
    thread.join(10)
    assert not raised
    assert job.details[-1] == {"status": "completed", "memory_processed": 5 << 20, "elapsed": 1.0, "downtime": 0.05}


def test_what_has_failed_is_not_begun_anew(scene: Scene) -> None:
    """The disks at the destination have been written to."""
    scene.begun()
    raised = scene.fly()
    assert isinstance(raised[0], errors.MigrationFailed) and scene.guest.migrated is None


def test_the_next_attempt_is(scene: Scene) -> None:
    scene.begun(attempt=7)
    thread, raised = scene.go()
    wait_for(lambda: scene.guest.migrated, what="the call")
    scene.guest.land(GONE)
    thread.join(10)
    assert not raised


@pytest.mark.parametrize(
    ("state", "error", "raised_as", "words"),
    [
        (STAYED, errors.GuestFailed(instance="i", reason="no route"), errors.MigrationFailed, "no route"),
        (STAYED, errors.Cancelled("aborted"), errors.MigrationFailed, "aborted"),
        (ENDED, errors.GuestFailed(instance="i", reason="not running"), errors.GuestFailed, "shutoff"),
        (None, errors.GuestFailed(instance="i", reason="x"), errors.GuestFailed, "not defined any more"),
        (BROKEN, errors.GuestFailed(instance="i", reason="x"), errors.GuestFailed, "post-copy was interrupted"),
        (RUNNING, errors.HypervisorUnavailable(reason="died"), errors.HypervisorUnavailable, "died"),
    ],
)
def test_how_it_can_end(
    scene: Scene, state: GuestState | None, error: Exception, raised_as: type[Exception], words: str
) -> None:
    thread, raised = scene.go()
    wait_for(lambda: scene.guest.migrated, what="the call")
    scene.guest.land(state, error)
    thread.join(10)
    assert type(raised[0]) is raised_as and words in str(raised[0])


def test_an_error_of_a_guest_that_arrived_all_the_same(scene: Scene) -> None:
    thread, raised = scene.go()
    wait_for(lambda: scene.guest.migrated, what="the call")
    scene.guest.land(GONE, errors.GuestFailed(instance="i", reason="the finish reply was lost"))
    thread.join(10)
    assert not raised


def test_cancelled(scene: Scene) -> None:
    job = RecordingJob()
    thread, raised = scene.go(job)
    wait_for(lambda: scene.guest.flying and scene.guest.migrated, what="the call")
    job.cancel()
    wait_for(lambda: "abort" in scene.guest.calls, what="the abort")
    scene.guest.land(STAYED, errors.Cancelled("aborted"))
    thread.join(10)
    assert isinstance(raised[0], errors.Cancelled)


def test_a_disk_that_the_guest_does_not_have(scene: Scene) -> None:
    more = msgspec.structs.replace(scene.data.disks[0], name="disk.eph7")
    scene.data = msgspec.structs.replace(scene.data, disks=[*scene.data.disks, more])
    raised = scene.fly()
    assert isinstance(raised[0], errors.MigrationFailed) and not scene.record.exists()


def test_a_post_copy_that_was_interrupted_goes_on(scene: Scene) -> None:
    scene.begun()
    scene.guest.now = BROKEN
    thread, raised = scene.go()
    wait_for(lambda: scene.guest.migrated, what="the call")
    assert scene.guest.migrated is not None and scene.guest.migrated[2] & libvirt.VIR_MIGRATE_POSTCOPY_RESUME
    scene.guest.land(GONE)
    thread.join(10)
    assert not raised


# --- steering -----------------------------------------------------------------------------------------------------


def test_abort_and_force_in_every_state(scene: Scene) -> None:
    driver, guest, instance = scene.driver, scene.guest, scene.instance
    driver.live_migration_abort(instance)
    assert guest.calls == []
    with pytest.raises(errors.InvalidState):
        driver.live_migration_force_complete(instance, postcopy=True)
    guest.take_off()
    scene.begun()
    driver.live_migration_abort(instance)
    driver.live_migration_force_complete(instance, postcopy=True)
    driver.live_migration_force_complete(instance, postcopy=False)
    assert guest.calls == ["abort", "postcopy", "pause"]
    assert msgspec.json.decode(scene.record.read_bytes(), type=Begun).paused
    for state in (BROKEN, GuestState(PowerState.PAUSED, "paused", "postcopy")):
        guest.now = state
        with pytest.raises(errors.InvalidState, match="post-copy"):
            driver.live_migration_abort(instance)


def test_post_copy_that_was_not_permitted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.guest.take_off()

    def refuse() -> bool:
        raise errors.GuestFailed(instance="i", reason="post-copy can only be started while migrating with the flag")

    monkeypatch.setattr(scene.guest, "start_postcopy", refuse)
    with pytest.raises(errors.NotSupported, match="permit_post_copy"):
        scene.driver.live_migration_force_complete(scene.instance, postcopy=True)


# --- rollback -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "paused", "vm_state", "resumed"),
    [
        (RUNNING, False, VmState.ACTIVE, False),
        (SWITCHING, False, VmState.ACTIVE, True),
        (HELD, True, VmState.ACTIVE, True),
        (HELD, False, VmState.ACTIVE, False),
        (HELD, True, VmState.PAUSED, False),
        (ENDED, True, VmState.ACTIVE, False),
    ],
)
def test_only_what_stood_still_for_it_runs_again(
    scene: Scene, state: GuestState, paused: bool, vm_state: VmState, resumed: bool
) -> None:
    scene.record.write_bytes(msgspec.json.encode(Begun(scene.migration.uuid, 1, paused)))
    scene.guest.now = state
    instance = msgspec.structs.replace(scene.instance, vm_state=vm_state)
    scene.driver.rollback_live_migration_at_source(instance, scene.migration)
    assert ("resume" in scene.guest.calls) is resumed
    assert not scene.record.exists()


def test_what_is_in_the_air_is_ended_first(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.guest.take_off()

    def abort() -> bool:
        scene.guest.calls.append("abort")
        scene.guest.land(STAYED)
        return True

    monkeypatch.setattr(scene.guest, "abort_job", abort)
    scene.driver.rollback_live_migration_at_source(scene.instance, scene.migration)
    assert scene.guest.calls == ["abort"]


def test_a_guest_that_is_not_there_needs_nothing(scene: Scene) -> None:
    scene.guest.now = None
    scene.driver.rollback_live_migration_at_source(scene.instance, scene.migration)
    assert scene.guest.calls == []
