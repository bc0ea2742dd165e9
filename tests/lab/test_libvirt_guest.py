"""host.py and guest.py on real hosts: guests from declared XML, libvirtd killed and stopped, block jobs, migration."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt
import pytest

from compute_worker import errors
from compute_worker.states import PowerState
from compute_worker.virt.libvirt import domain as d
from compute_worker.virt.libvirt import domain_devices as dev
from compute_worker.virt.libvirt import events
from compute_worker.virt.libvirt.domain_disk import BackingStore, Disk
from compute_worker.virt.libvirt.events import ConnectionLost, ConnectionRestored, Event, LifecycleEvent
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.host import Host
from tests.lab import faults, oracle
from tests.lab.bare_guest import DIRECTORY, UUID, wait_for_ticks
from tests.lab.cell import Cell
from tests.lab.guest_images import MEMORY_MIB, GuestImages
from tests.lab.node import Node
from tests.lab.settings import WORKER_UID, WORKER_USER
from tests.waiting import wait_for

pytestmark = pytest.mark.lab

KEEPALIVE = (1, 2)


@contextmanager
def connected(node: Node) -> Iterator[tuple[Host, list[Event]]]:
    host = Host(node.uri, host=node.name, keepalive=KEEPALIVE, connect_timeout=0.5, backoff=(0.05, 0.5))
    received: list[Event] = []
    host.subscribe(received.append)
    try:
        assert host.wait_connected(10)
        yield host, received
    finally:
        host.close()


def description(cell: Cell, images: GuestImages, disk: Disk) -> d.Domain:
    """The lab's guest with about everything that a real one has."""
    console = dev.Serial(type="pty", log_file=f"{DIRECTORY}/console.log", log_append=True, target_port=0)
    return d.Domain(
        type="qemu",
        name="instance-1",
        uuid=UUID,
        title="a guest of the lab",
        instance=d.InstanceMetadata(uuid=UUID, owner="node1", generation=1),
        memory_kib=MEMORY_MIB * 1024,
        current_memory_kib=MEMORY_MIB * 1024,
        vcpus=1,
        sysinfo=d.Sysinfo(type="smbios", manufacturer="compute_worker", serial=UUID, uuid=UUID),
        os=d.Os(
            type="hvm",
            arch="x86_64",
            kernel=cell.add_image(images.kernel),
            initrd=cell.add_image(images.initrd),
            cmdline="console=ttyS0 quiet",
            smbios_mode="sysinfo",
        ),
        features=d.Features(acpi=True, apic=True),
        clock=d.Clock(offset="utc", timers=[d.Timer(name="rtc", tickpolicy="catchup")]),
        on_poweroff="destroy",
        on_reboot="restart",
        on_crash="destroy",
        devices=d.Devices(
            disks=[disk],
            controllers=[dev.Controller(type="usb", model="none"), dev.Controller(type="virtio-serial", index=0)],
            interfaces=[dev.Interface(type="bridge", mac="52:54:00:1a:b0:01", source_bridge="br0", model="virtio")],
            serials=[console],
            channels=[dev.Channel(type="unix", target_type="virtio", target_name=dev.GUEST_AGENT)],
            memballoon=dev.MemBalloon(model="virtio", stats_period=1),
            rngs=[dev.Rng(model="virtio", backend=dev.RngBackend(model="random", device="/dev/urandom"))],
            panics=[dev.Panic(model="isa")],
            watchdog=dev.Watchdog(model="i6300esb", action="reset"),
        ),
        seclabels=[d.SecLabel(type="none", model="none")],
    )


def raw_disk() -> Disk:
    return Disk(
        type="file", device="disk", driver_name="qemu", driver_type="raw", driver_cache="none", driver_io="threads",
        driver_discard="unmap", driver_error_policy="stop", source_file=f"{DIRECTORY}/disk", target_dev="vda",
        target_bus="virtio", backing_store=BackingStore(),
    )  # fmt: skip


def put(node: Node, source: Path, name: str) -> None:
    node.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
    target = node.path(f"{DIRECTORY}/{name}")
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)
    os.chown(target, WORKER_UID, WORKER_UID)


@contextmanager
def defined(cell: Cell, images: GuestImages, node: Node, host: Host, disk: Disk | None = None) -> Iterator[Guest]:
    put(node, images.data_raw, "base" if disk else "disk")
    if disk:
        overlay = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", f"{DIRECTORY}/disk")
        node.run(*overlay, user=WORKER_USER)
    guest = host.define(description(cell, images, disk or raw_disk()).to_xml())
    try:
        yield guest
    finally:
        host.wait_connected(10)
        guest.destroy()
        guest.undefine()
        node.run("rm", "-rf", DIRECTORY)


def kinds(received: list[Event]) -> list[tuple[str, str]]:
    return [(one.kind.value, one.reason) for one in received if isinstance(one, LifecycleEvent)]


def test_facts_of_a_real_host(cell: Cell) -> None:
    node = cell["node1"]
    with connected(node) as (host, _):
        facts = host.facts()
    assert (facts.hostname, facts.domain_type, facts.hypervisor_type, facts.arch) == ("node1", "qemu", "QEMU", "x86_64")
    assert "kvm does not work here" in facts.domain_type_reason
    assert facts.default_machine in facts.machine_types
    assert facts.vcpus == os.cpu_count()
    assert facts.hypervisor_version >= 7_000_000
    assert facts.cpu_model


def test_the_life_of_a_guest(cell: Cell, lab_guest: GuestImages) -> None:
    """Every power operation, each twice where it may be; three real boots take their time."""
    node = cell["node1"]
    with connected(node) as (host, received), defined(cell, lab_guest, node, host) as guest:
        assert guest.launch(paused=True)
        assert (guest.state().power, guest.state().reason) == (PowerState.PAUSED, "user")
        assert not guest.launch(paused=True)
        assert "BOOT" not in oracle.read_console(node, UUID)
        assert (guest.resume(), guest.resume()) == (True, False)
        console = wait_for_ticks(node, 2)
        assert oracle.seen_nics(console) == ["52:54:00:1a:b0:01"]

        assert (guest.pause(), guest.pause(), guest.resume()) == (True, False, True)
        newer = d.InstanceMetadata(uuid=UUID, owner="node1", generation=2, migration=UUID)
        guest.set_metadata(newer)
        assert (guest.metadata(), guest.domain(inactive=True).instance) == (newer, newer)

        guest.set_memory_stats_period(1)
        found = wait_for(lambda: (now := guest.diagnostics()).memory_used_mb and now, 20, "balloon statistics")
        assert (found.vcpus, found.memory_mb, found.state) == (1, MEMORY_MIB, PowerState.RUNNING)
        assert 1 < found.memory_used_mb < MEMORY_MIB
        assert (found.disks[0]["name"], found.nics[0]["name"]) == ("vda", oracle.interfaces(node)[0])
        assert found.disks[0]["wr_bytes"] > 0
        assert found.cpu_time_ns > 0
        assert guest.disk_errors() == {}
        assert guest.block("vda").info().capacity == 64 << 20

        assert (guest.managed_save(), guest.managed_save()) == (True, False)
        assert oracle.where_running([node]) == {}
        assert guest.power_state() is PowerState.SUSPENDED
        assert guest.launch(paused=True)
        assert guest.resume()
        assert not guest.has_managed_save()
        wait_for_ticks(node, 5)

        assert guest.shutdown()
        wait_for(lambda: guest.power_state() is PowerState.SHUTDOWN, 20, "the guest's clean end")
        assert not guest.shutdown()
        assert (guest.launch(), guest.id() is not None) == (True, True)
        first, _ = oracle.boots(wait_for_ticks(node, 1, boot=2))
        assert first.clean_shutdown
        run = guest.id()
        guest.reset()
        wait_for_ticks(node, 1, boot=3)
        assert guest.id() == run
        assert (guest.destroy(), guest.destroy()) == (True, False)
        assert (guest.undefine(), guest.undefine(), guest.exists()) == (True, False, False)
    told = kinds(received)
    for expected in (
        ("defined", "added"), ("started", "booted"), ("suspended", "paused"), ("resumed", "unpaused"),
        ("stopped", "saved"), ("started", "restored"), ("stopped", "shutdown"), ("stopped", "destroyed"),
        ("undefined", "removed"),
    ):  # fmt: skip
        assert expected in told
    assert any(isinstance(one, events.AgentEvent) and one.connected for one in received)
    assert any(isinstance(one, events.RebootEvent) for one in received)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_libvirtd_killed_again_and_again(cell: Cell, lab_guest: GuestImages) -> None:
    """Found again, told so, events come again, the guest never noticed; neither files nor threads pile up."""
    node = cell["node1"]
    with connected(node) as (host, received), defined(cell, lab_guest, node, host) as guest:
        guest.launch()
        wait_for_ticks(node, 1)
        qemu = oracle.qemu_processes(node)
        counts = []
        for generation in range(2, 8):
            node.libvirtd.kill()
            with pytest.raises(errors.HypervisorUnavailable):
                guest.state()
            node.libvirtd.start()
            restored = ConnectionRestored(generation=generation)
            wait_for(lambda restored=restored: restored in received, 10, "the connection")
            assert guest.power_state() is PowerState.RUNNING
            received.clear()
            guest.pause()
            guest.resume()
            wait_for(lambda: len(kinds(received)) == 2, 5, "events of the new connection")
            assert kinds(received) == [("suspended", "paused"), ("resumed", "unpaused")]
            counts.append((open_files(), threading.active_count()))
        assert counts[-1] <= counts[1]
        assert oracle.qemu_processes(node) == qemu
        assert oracle.continuity_problems(oracle.read_console(node, UUID)) == []


def test_libvirtd_that_hangs(cell: Cell) -> None:
    """A call in flight fails by keepalive, later ones at once; opening hangs meanwhile and harms nobody."""
    node = cell["node1"]
    with connected(node) as (host, received):
        host.list_guests()
        node.libvirtd.freeze()
        try:
            began = time.monotonic()
            with pytest.raises(errors.HypervisorUnavailable):
                host.list_guests()
            assert time.monotonic() - began < KEEPALIVE[0] * (KEEPALIVE[1] + 1) + 2
            wait_for(lambda: not host.is_connected, 5, "the loss")
            wait_for(lambda: ConnectionLost(reason="keepalive") in received, 5, "word of the loss")
            with pytest.raises(errors.HypervisorUnavailable):
                host.list_guests()
        finally:
            node.libvirtd.thaw()
        wait_for(lambda: ConnectionRestored(generation=2) in received, 10, "the connection")
        assert host.list_guests() == []


def test_qemu_killed_is_a_crash(cell: Cell, lab_guest: GuestImages) -> None:
    node = cell["node1"]
    with connected(node) as (host, received), defined(cell, lab_guest, node, host) as guest:
        guest.launch()
        faults.signal_processes(node, faults.qemu_pattern(UUID), 9)
        wait_for(lambda: any(e.died for e in received if isinstance(e, LifecycleEvent)), 5, "the event")
        assert guest.power_state() is PowerState.CRASHED
        assert guest.launch()
        wait_for_ticks(node, 1)


def test_qemu_that_hangs_is_busy_not_gone(cell: Cell, lab_guest: GuestImages) -> None:
    """libvirtd answers other calls; those on the guest say busy (after libvirt's 30 s); destroy ends it."""
    node = cell["node1"]
    with connected(node) as (host, _), defined(cell, lab_guest, node, host) as guest:
        guest.launch()
        wait_for_ticks(node, 1)
        raised: list[BaseException] = []

        def set_period() -> None:
            try:
                guest.set_memory_stats_period(2)
            except errors.ComputeError as exc:
                raised.append(exc)

        threads = [threading.Thread(target=set_period) for _ in range(2)]
        with faults.frozen(node, faults.qemu_pattern(UUID)):
            for thread in threads:
                thread.start()
            wait_for(lambda: raised, 45, "libvirt to give up on one of them")
            assert [type(one) for one in raised] == [errors.HypervisorBusy]
            assert "cannot acquire state change lock" in str(raised[0])
            assert host.is_connected
            assert guest.state().power is PowerState.RUNNING
            assert guest.destroy()
            for thread in threads:
                thread.join(10)
        assert [type(one) for one in raised] == [errors.HypervisorBusy, errors.GuestFailed]


def test_a_full_disk_pauses_the_guest_and_says_why(cell: Cell, lab_guest: GuestImages) -> None:
    node = cell["node1"]
    with faults.disk_of(node, 8), connected(node) as (host, received):
        overlay = raw_disk()
        overlay.driver_type = "qcow2"
        node.run("mkdir", "-p", DIRECTORY, user=WORKER_USER)
        base = cell.add_image(lab_guest.data_raw)
        node.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, f"{DIRECTORY}/disk",
                 user=WORKER_USER)  # fmt: skip
        overlay.backing_store = BackingStore(type="file", format="raw", source_file=base, backing_store=BackingStore())
        guest = host.define(description(cell, lab_guest, overlay).to_xml())
        try:
            guest.launch()
            wait_for_ticks(node, 1)
            node.run("sh", "-c", f"cat /dev/zero > {DIRECTORY}/filler", user=WORKER_USER, check=False)
            error = wait_for(lambda: [e for e in received if isinstance(e, events.IOErrorEvent)], 60, "an I/O error")[0]
            assert (error.reason, error.action, error.path) == ("enospc", "pause", f"{DIRECTORY}/disk")
            wait_for(lambda: guest.power_state() is PowerState.PAUSED, 5)
            assert guest.state().reason == "ioerror"
            assert guest.disk_errors() == {"vda": "no_space"}
            node.run("rm", f"{DIRECTORY}/filler")
            assert guest.resume()
            before = oracle.boots(oracle.read_console(node, UUID))[-1].ticks[-1]
            wait_for(lambda: oracle.boots(oracle.read_console(node, UUID))[-1].ticks[-1] > before, 20, "it to go on")
        finally:
            guest.destroy()
            guest.undefine()


def block_event(received: list[Event], job: str, status: str) -> bool:
    wanted = ("vda", job, status)
    return any(isinstance(e, events.BlockJobEvent) and (e.device, e.job, e.status) == wanted for e in received)


def test_block_jobs_backup_and_freeze(cell: Cell, lab_guest: GuestImages) -> None:
    node = cell["node1"]
    overlay = raw_disk()
    overlay.driver_type = "qcow2"
    overlay.backing_store = BackingStore(
        type="file", format="raw", source_file=f"{DIRECTORY}/base", backing_store=BackingStore()
    )
    with connected(node) as (host, received), defined(cell, lab_guest, node, host, overlay) as guest:
        guest.launch()
        wait_for_ticks(node, 1)
        disk = guest.block("vda")
        assert disk.job() is None
        assert not disk.abort()

        put(node, lab_guest.data_raw, "copy")
        copy = Disk(type="file", driver_type="raw", source_file=f"{DIRECTORY}/copy")
        disk.copy(copy.to_xml(), reuse_external=True, bandwidth=1 << 20)
        job = disk.job()
        assert job is not None
        assert (job.type, job.bandwidth) == ("copy", 1 << 20)
        disk.set_speed(0)
        wait_for(lambda: block_event(received, "copy", "ready"), 20, "the copy")
        assert (disk.abort(), disk.abort()) == (True, False)
        wait_for(lambda: block_event(received, "copy", "canceled"), 5)

        disk.commit(f"{DIRECTORY}/base", f"{DIRECTORY}/disk", active=True)
        wait_for(lambda: block_event(received, "active_commit", "ready"), 20, "the commit")
        assert disk.abort(pivot=True)
        assert guest.domain().devices.disks[0].source_file == f"{DIRECTORY}/base"

        assert guest.backup_xml() is None
        backup = (
            f"<domainbackup mode='push'><disks><disk name='vda' type='file' backupmode='full'>"
            f"<driver type='qcow2'/><target file='{DIRECTORY}/backup'/></disk></disks></domainbackup>"
        )
        # libvirt would make the file root's, which QEMU cannot open.
        node.run("qemu-img", "create", "-q", "-f", "qcow2", f"{DIRECTORY}/backup", "64M", user=WORKER_USER)
        guest.backup_begin(backup, reuse_external=True)
        done = wait_for(lambda: [e for e in received if isinstance(e, events.JobCompletedEvent)], 20, "the backup")[0]
        assert (done.operation, done.success) == ("backup", True)
        assert guest.checkpoints() == []
        assert not guest.delete_checkpoint("none")

        wait_for(lambda: any(isinstance(e, events.AgentEvent) and e.connected for e in received), 30, "the agent")
        assert guest.fs_freeze() >= 1
        with pytest.raises(errors.ComputeError):
            guest.fs_freeze()
        assert guest.fs_thaw() >= 1


MOVE = (
    libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE | libvirt.VIR_MIGRATE_NON_SHARED_DISK
)  # fmt: skip


def test_migration_abort_peer_lost_and_done(cell: Cell, lab_guest: GuestImages) -> None:
    one, two = cell["node1"], cell["node2"]
    put(two, lab_guest.data_raw, "disk")
    with (
        connected(one) as (here, received),
        connected(two) as (there, arrived),
        defined(cell, lab_guest, one, here) as guest,
    ):
        guest.launch()
        wait_for_ticks(one, 2)
        assert guest.job_stats().type == "none"
        assert not guest.abort_job()
        params: dict[str, Any] = {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 1}

        with pytest.raises(errors.GuestFailed, match="nowhere"):
            guest.migrate("qemu+tcp://nowhere/system", params, MOVE)

        for end, expected in ((guest.abort_job, errors.Cancelled), (two.libvirtd.kill, errors.GuestFailed)):
            outcome: list[BaseException] = []

            def move(outcome: list[BaseException] = outcome) -> None:
                try:
                    guest.migrate("qemu+tcp://node2/system", params, MOVE)
                except errors.ComputeError as exc:
                    outcome.append(exc)

            thread = threading.Thread(target=move)
            thread.start()
            wait_for(lambda: guest.job_operation() == "migration_out", 10, "the migration")
            wait_for(lambda: (guest.job_stats().disk_total or 0) > 0, 10, "its statistics")
            guest.set_max_downtime(0.2)
            guest.set_max_speed(3 << 20)
            end()
            thread.join(40)
            assert [type(one) for one in outcome] == [expected]
            assert here.is_connected
            assert guest.power_state() is PowerState.RUNNING
        two.libvirtd.start()
        wait_for(lambda: there.is_connected and there.list_guests() == [], 20, "a clean destination")

        guest.migrate("qemu+tcp://node2/system", {}, MOVE)
        assert guest.power_state() is PowerState.NOSTATE
        moved = there.get_guest(UUID)
        try:
            assert moved.state().reason == "migrated"
            assert ("resumed", "migrated") in kinds(arrived)
            stats = moved.job_stats(completed=True)
            assert stats.type == "completed"
            assert stats.downtime is not None
            assert 0 < stats.downtime < 5
            wait_for(lambda: ("stopped", "migrated") in kinds(received), 5)
        finally:
            moved.destroy()
            moved.undefine()
            two.run("rm", "-rf", DIRECTORY)
