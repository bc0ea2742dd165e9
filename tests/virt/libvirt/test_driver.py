"""The whole driver over libvirt's own test driver and real files: what does not need a real guest."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from compute_worker import errors
from compute_worker.config import Compute, Images, Libvirt, Settings
from compute_worker.objects import Flavor, ImageMeta, Instance, Vif
from compute_worker.states import PowerState
from compute_worker.virt.driver import DriverEvent, EventKind, SnapshotRequest, SpawnRequest
from compute_worker.virt.libvirt import console as console_module
from compute_worker.virt.libvirt import driver as driver_module
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.driver import LibvirtDriver
from compute_worker.virt.libvirt.events import Lifecycle, LifecycleEvent
from compute_worker.virt.libvirt.guest_state import GuestState
from tests.virt.jobs import RecordingJob
from tests.virt.world import run, undo
from tests.waiting import wait_for

OTHER = "0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab"
NAMES = ["fetch_images", "create_disks", "plug_vifs", "define", "start_paused"]


def settings(tmp_path: Path, uri: str, **options: Any) -> Settings:
    return Settings(
        compute=Compute(host="node1", state_path=str(tmp_path / "state")),
        images=Images(file_path=str(tmp_path / "images"), remove_unused_base_images_after=0),
        libvirt=Libvirt(connection_uri=uri, **options),
    )


@pytest.fixture
def driver(tmp_path: Path, uri: str, able: None) -> Iterator[LibvirtDriver]:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "tiny").write_bytes(b"a disk ".ljust(4096, b"."))
    made = LibvirtDriver(settings(tmp_path, uri))
    made.init_host("node1")
    wait_for(lambda: made.available, what="the connection")
    yield made
    made.cleanup_host()


@pytest.fixture
def instance() -> Instance:
    return Instance(
        uuid=str(uuid.uuid4()),
        name="test",
        host="node1",
        flavor=Flavor(vcpus=1, memory_mb=64),
        image=ImageMeta(id="tiny"),
        vifs=[Vif(id=str(uuid.uuid4()), mac="52:54:00:00:00:01")],
    )


def spawned(driver: LibvirtDriver, instance: Instance) -> None:
    run(driver.spawn(instance, SpawnRequest()), RecordingJob())


def booted(driver: LibvirtDriver, instance: Instance) -> None:
    spawned(driver, instance)
    driver.unpause(instance)


def power(driver: LibvirtDriver, instance: Instance) -> PowerState:
    return driver.get_info(instance.uuid).power_state


def assert_nothing(driver: LibvirtDriver, instance: Instance, tmp_path: Path) -> None:
    assert [left for left in driver.list_leftovers() if left.uuid == instance.uuid] == []
    assert instance.uuid not in [info.uuid for info in driver.list_instances()]
    assert [p for p in (tmp_path / "state" / "instances").iterdir() if p.name.startswith(instance.uuid)] == []


@pytest.mark.parametrize("times", [1, 2])
def test_spawn_and_destroy(driver: LibvirtDriver, instance: Instance, tmp_path: Path, times: int) -> None:
    parts = driver.spawn(instance, SpawnRequest())
    assert [part.name for part in parts] == NAMES
    run(parts, RecordingJob(), times)
    info = driver.get_info(instance.uuid)
    assert (info.power_state, info.owner, info.generation) == (PowerState.PAUSED, "node1", 0)
    assert (info.name, info.migrating) == (f"instance-{instance.uuid}", False)
    directory = tmp_path / "state" / "instances" / instance.uuid
    assert {"disk", "disk.info", "instance.json", "libvirt.xml", "console.log"} <= set(os.listdir(directory))
    assert (directory / "console.log").stat().st_mode & 0o777 == 0o600
    assert [record.uuid for record in driver.list_records()] == [instance.uuid]
    run(driver.destroy(instance), RecordingJob(), times)
    assert_nothing(driver, instance, tmp_path)


@pytest.mark.parametrize("done", range(len(NAMES) + 1))
def test_undone_from_any_part(driver: LibvirtDriver, instance: Instance, tmp_path: Path, done: int) -> None:
    parts = driver.spawn(instance, SpawnRequest())
    run(parts[:done], RecordingJob())
    undo(parts[: done + 1], RecordingJob(), 2)
    assert_nothing(driver, instance, tmp_path)


@pytest.mark.parametrize("part", range(len(NAMES)))
def test_every_part_can_be_cancelled(driver: LibvirtDriver, instance: Instance, part: int) -> None:
    parts, job = driver.spawn(instance, SpawnRequest()), RecordingJob()
    run(parts[:part], job)
    job.cancel()
    with pytest.raises(errors.Cancelled):
        parts[part].do(job)


def test_a_missing_bridge_is_named(driver: LibvirtDriver, instance: Instance) -> None:
    vif = Vif(id=instance.vifs[0].id, mac="52:54:00:00:00:01", bridge="nosuch0")
    parts = driver.spawn(msgspec.structs.replace(instance, vifs=[vif]), SpawnRequest())
    run(parts[:2], RecordingJob())
    with pytest.raises(errors.GuestFailed, match="nosuch0"):
        parts[2].do(RecordingJob())


def test_refused_before_anything_is_touched(driver: LibvirtDriver, instance: Instance) -> None:
    wrong = msgspec.structs.replace(instance, image=ImageMeta(id="tiny", store="nosuch"))
    with pytest.raises(errors.ComputeError):
        driver.check_spawn(wrong, SpawnRequest())
    driver.check_spawn(instance, SpawnRequest())


def test_the_machine_type_stays_over_a_new_definition(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    guest = driver._deeds.guest(instance.uuid)
    defined = guest.domain(inactive=True)
    assert defined.os is not None
    defined.os.machine = "xenpv"
    driver._host.define(defined.to_xml())
    driver.power_off(instance, RecordingJob())
    driver.power_on(instance, RecordingJob())
    kept = driver._deeds.guest(instance.uuid).domain(inactive=True).os
    assert kept is not None and kept.machine == "xenpv"


# --- power --------------------------------------------------------------------------------------------------------


def test_pause_and_unpause(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    for act, state in ((driver.pause, PowerState.PAUSED), (driver.unpause, PowerState.RUNNING)):
        for _ in range(2):
            act(instance)
            assert power(driver, instance) is state


@pytest.mark.parametrize("act", ["pause", "unpause"])
def test_pause_of_nothing_and_of_a_guest_that_is_off(driver: LibvirtDriver, instance: Instance, act: str) -> None:
    with pytest.raises(errors.GuestFailed, match="no such guest"):
        getattr(driver, act)(instance)
    booted(driver, instance)
    driver.power_off(instance, RecordingJob())
    with pytest.raises(errors.GuestFailed, match="it is off"):
        getattr(driver, act)(instance)


def test_clean_power_off(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    assert driver.power_off(instance, RecordingJob(), timeout=10, retry_interval=1) is True
    assert power(driver, instance) is PowerState.SHUTDOWN
    assert driver.power_off(instance, RecordingJob(), timeout=10) is True


def test_power_off_says_why_the_plug_was_pulled(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    driver.pause(instance)
    job = RecordingJob()
    assert driver.power_off(instance, job, timeout=10) is False
    driver.power_on(instance, job)
    assert driver.power_off(instance, job) is False
    assert job.reasons[-2:] == [
        "its plug was pulled as it is paused and cannot hear", "its plug was pulled at once, as asked"
    ]  # fmt: skip


def test_a_deaf_guest_is_asked_again_and_then_powered_off(
    driver: LibvirtDriver, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    booted(driver, instance)
    asked: list[str] = []
    monkeypatch.setattr(driver_module.Guest, "shutdown", lambda guest: asked.append(guest.uuid))
    job = RecordingJob()
    assert driver.power_off(instance, job, timeout=0.5, retry_interval=0.1) is False
    assert len(asked) >= 3
    assert power(driver, instance) is PowerState.SHUTDOWN
    assert "did not shut itself down in 0.5 s" in job.reasons[-1]


def test_power_off_of_nothing(driver: LibvirtDriver, instance: Instance) -> None:
    assert driver.power_off(instance, RecordingJob(), timeout=10) is True


@pytest.mark.parametrize("times", [1, 2])
def test_suspend_and_resume(driver: LibvirtDriver, instance: Instance, times: int) -> None:
    booted(driver, instance)
    for _ in range(times):
        driver.suspend(instance, RecordingJob())
        assert power(driver, instance) is PowerState.SUSPENDED
    for _ in range(times):
        driver.resume(instance, RecordingJob())
        assert power(driver, instance) is PowerState.RUNNING
    assert not driver._deeds.guest(instance.uuid).has_managed_save()


def test_power_on_boots_from_the_disks(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    driver.suspend(instance, RecordingJob())
    driver.power_on(instance, RecordingJob())
    assert power(driver, instance) is PowerState.RUNNING
    assert not driver._deeds.guest(instance.uuid).has_managed_save()


def test_power_on_lets_a_paused_guest_run(driver: LibvirtDriver, instance: Instance) -> None:
    spawned(driver, instance)
    driver.power_on(instance, RecordingJob())
    assert power(driver, instance) is PowerState.RUNNING


def test_power_on_makes_the_definition_and_the_base_again(
    driver: LibvirtDriver, instance: Instance, tmp_path: Path
) -> None:
    booted(driver, instance)
    driver._deeds.undefine(instance.uuid)
    base = next((tmp_path / "state" / "instances" / "_base").iterdir())
    base.unlink()
    driver.power_on(instance, RecordingJob())
    assert power(driver, instance) is PowerState.RUNNING
    assert base.exists()


def test_power_on_without_disks(driver: LibvirtDriver, instance: Instance) -> None:
    with pytest.raises(errors.GuestFailed, match="disks are missing"):
        driver.power_on(instance, RecordingJob())


def test_a_save_that_another_worker_began_is_no_failure(
    driver: LibvirtDriver, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    booted(driver, instance)
    save = driver_module.Guest.managed_save

    def too_late(guest: Any) -> bool:
        save(guest)
        raise errors.GuestFailed(instance=guest.uuid, reason="domain is not running")

    monkeypatch.setattr(driver_module.Guest, "managed_save", too_late)
    driver.suspend(instance, RecordingJob())
    assert power(driver, instance) is PowerState.SUSPENDED


def test_a_cancelled_save_aborts_libvirt_s_job(
    driver: LibvirtDriver, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    booted(driver, instance)
    job, aborted = RecordingJob(), []

    def cancelled(guest: Any) -> bool:
        job.cancel()
        raise errors.Cancelled("operation aborted")

    monkeypatch.setattr(driver_module.Guest, "managed_save", cancelled)
    monkeypatch.setattr(driver_module.Guest, "abort_job", lambda guest: aborted.append(guest.uuid) or True)
    with pytest.raises(errors.Cancelled):
        driver.suspend(instance, job)
    assert aborted == [instance.uuid]
    assert power(driver, instance) is PowerState.RUNNING


# --- facts --------------------------------------------------------------------------------------------------------


def test_the_record_is_written_to_files_and_guest(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    changed = msgspec.structs.replace(instance, generation=4, migration=instance.vifs[0].id)
    for _ in range(2):
        driver.save_record(changed)
    info = driver.get_info(instance.uuid)
    assert (info.generation, info.migration) == (4, changed.migration)
    assert driver.list_records() == [changed]


def test_a_record_of_nothing_is_written_nowhere(driver: LibvirtDriver, instance: Instance, tmp_path: Path) -> None:
    driver.save_record(instance)
    assert_nothing(driver, instance, tmp_path)


def test_foreign_guests_are_listed_and_are_no_leftovers(driver: LibvirtDriver, host: Any) -> None:
    from tests.virt.libvirt.conftest import UUID, domain

    driver._host.define(domain().to_xml())
    info = driver.get_info(UUID)
    assert (info.owner, info.generation) == (None, 0)
    assert UUID in [one.uuid for one in driver.list_instances()]
    assert UUID not in [left.uuid for left in driver.list_leftovers()]


def test_get_info_of_nothing(driver: LibvirtDriver, instance: Instance) -> None:
    with pytest.raises(errors.InstanceNotFound):
        driver.get_info(instance.uuid)
    with pytest.raises(errors.InstanceNotFound):
        driver.get_instance_disk_info(instance)
    with pytest.raises(errors.InstanceNotFound):
        driver.get_console_output(instance, 10)


def test_disk_info_also_of_a_copy_set_aside(driver: LibvirtDriver, instance: Instance) -> None:
    spawned(driver, instance)
    before = driver.get_instance_disk_info(instance)
    assert [disk.name for disk in before.disks] == ["disk"]
    driver._deeds.undefine(instance.uuid)
    driver._deeds.disks.directory.move(instance.uuid, "", "_resize")
    assert driver.get_instance_disk_info(instance) == before
    assert driver.get_console_output(instance, 10) == b""


@pytest.mark.parametrize("suffix", ["_resize", "_del"])
def test_destroy_removes_every_directory(
    driver: LibvirtDriver, instance: Instance, tmp_path: Path, suffix: str
) -> None:
    spawned(driver, instance)
    other = tmp_path / "state" / "instances" / f"{instance.uuid}{suffix}"
    other.mkdir()
    (other / "disk.part").write_bytes(b"x")
    run(driver.destroy(instance), RecordingJob())
    assert_nothing(driver, instance, tmp_path)


def test_console_over_rolled_files(driver: LibvirtDriver, instance: Instance, tmp_path: Path) -> None:
    spawned(driver, instance)
    directory = tmp_path / "state" / "instances" / instance.uuid
    for name, text in (("console.log", b"5678"), ("console.log.0", b"34"), ("console.log.1", b"12")):
        (directory / name).write_bytes(text)
    assert driver.get_console_output(instance, 100) == b"12345678"
    assert driver.get_console_output(instance, 5) == b"45678"
    assert driver.get_console_output(instance, 0) == b""


def test_console_that_is_a_link_is_not_followed(driver: LibvirtDriver, instance: Instance, tmp_path: Path) -> None:
    spawned(driver, instance)
    log = tmp_path / "state" / "instances" / instance.uuid / "console.log"
    log.unlink()
    log.symlink_to("/etc/passwd")
    with pytest.raises(errors.Broken):
        driver.get_console_output(instance, 100)
    with pytest.raises(errors.Broken, match="not a plain file"):
        driver._deeds.touch_console(instance.uuid)


def test_console_that_only_root_may_read_comes_through_libvirt(
    driver: LibvirtDriver, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test driver has storage pools and no files behind them: that the pool goes, whatever happens, is seen."""
    spawned(driver, instance)

    def closed(path: Path, size: int) -> bytes:
        raise PermissionError

    monkeypatch.setattr(console_module, "read_tail", closed)
    assert driver.get_console_output(instance, 100) == b""
    with driver._host.calling("listing pools") as conn:
        assert [p.name() for p in conn.listAllStoragePools(0) if "console" in p.name()] == []


def test_statistics_of_a_guest_without_a_job(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    driver.power_off(instance, RecordingJob())
    assert driver._deeds.guest(instance.uuid).job_stats().type == "none"


def test_diagnostics(driver: LibvirtDriver, instance: Instance) -> None:
    booted(driver, instance)
    found = driver.get_diagnostics(instance)
    assert (found.state, found.driver) == (PowerState.RUNNING, "libvirt")


def test_image_cache(driver: LibvirtDriver, instance: Instance) -> None:
    spawned(driver, instance)
    assert driver.manage_image_cache(set()) == []
    run(driver.destroy(instance), RecordingJob())
    assert len(driver.manage_image_cache(set())) == 1


# --- the host -----------------------------------------------------------------------------------------------------


def test_events_come_from_a_thread_of_the_driver(driver: LibvirtDriver, instance: Instance) -> None:
    seen: list[DriverEvent] = []
    driver.register_event_listener(seen.append)
    booted(driver, instance)
    wait_for(lambda: EventKind.RESUMED in [e.kind for e in seen if e.uuid == instance.uuid], what="the guest to run")
    driver.power_off(instance, RecordingJob())
    wait_for(lambda: EventKind.STOPPED in [e.kind for e in seen if e.uuid == instance.uuid], what="the guest's end")


def test_a_missing_program_is_named(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "find_program", lambda name: None if name == "qemu-img" else f"/usr/bin/{name}")
    with pytest.raises(errors.Broken, match="qemu-img is missing: install it"):
        LibvirtDriver(settings(tmp_path, uri)).init_host("node1")


def test_libvirt_that_is_down_is_no_error_at_start(tmp_path: Path, instance: Instance) -> None:
    driver = LibvirtDriver(settings(tmp_path, f"qemu+unix:///system?socket={tmp_path}/nobody"))
    driver._host._connection._connect_timeout = 0.1
    driver.init_host("node1")
    try:
        assert not driver.available
        for ask in (driver.list_instances, driver.get_available_resource, lambda: driver.get_info(instance.uuid)):
            with pytest.raises(errors.HypervisorUnavailable):
                ask()
    finally:
        driver.cleanup_host()


def test_snapshot_of_a_guest_that_has_no_disks(driver: LibvirtDriver, instance: Instance) -> None:
    request = SnapshotRequest(ImageMeta(id="i"))
    parts = driver.snapshot(instance, request)
    assert [part.name for part in parts] == ["create_image", "freeze", "upload", "publish"]
    with pytest.raises(errors.GuestFailed, match="its disks are missing"):
        parts[0].do(RecordingJob())
    undo(parts, RecordingJob(), 2)


def test_directories_that_guests_cannot_pass_are_named(
    driver: LibvirtDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver_module, "guest_user", lambda xml: (64055, 64055))
    for directory in (tmp_path, *tmp_path.parents):
        if directory.is_relative_to(tempfile.gettempdir()) and directory != Path(tempfile.gettempdir()):
            directory.chmod(0o755)
    (tmp_path / "state").chmod(0o711)
    driver._introduce()
    assert "cannot pass" not in caplog.text
    (tmp_path / "state").chmod(0o700)
    driver._introduce()
    assert f"guests run as user 64055 and cannot pass {tmp_path}/state on the way" in caplog.text


def test_a_wish_that_cannot_be_met_is_said_and_does_not_end_the_worker(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    driver = LibvirtDriver(settings(tmp_path, uri, virt_type="kvm"))
    driver.init_host("node1")
    try:
        wait_for(lambda: "libvirt answers, but cannot be used: virt_type is kvm" in caplog.text, what="the reason")
        with pytest.raises(errors.Broken, match="virt_type is kvm"):
            driver.get_available_resource()
    finally:
        driver.cleanup_host()


@pytest.mark.parametrize(
    ("reason", "kind"), [("migration_canceled", EventKind.RESUMED), ("migrated", EventKind.MIGRATED_IN)]
)
def test_a_guest_that_did_not_leave_has_not_come(
    driver: LibvirtDriver, monkeypatch: pytest.MonkeyPatch, reason: str, kind: EventKind
) -> None:
    """libvirt tells both by one event; what the guest's state says tells them apart."""
    heard: list[DriverEvent] = []
    driver.register_event_listener(heard.append)
    state = GuestState(PowerState.RUNNING, "running", reason)
    monkeypatch.setattr(driver_module.Guest, "state", lambda guest: state)
    driver._on_event(LifecycleEvent(uuid=OTHER, kind=Lifecycle.RESUMED, reason="migrated"))
    assert [(event.kind, event.uuid) for event in heard] == [(kind, OTHER)]
