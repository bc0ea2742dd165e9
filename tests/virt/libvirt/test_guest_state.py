"""What libvirt says of a guest, in our words."""

import libvirt
import pytest

from compute_worker.states import PowerState
from compute_worker.virt.libvirt.guest_state import diagnostics_of, grouped, job_statistics, state_of


@pytest.mark.parametrize(
    ("state", "reason", "saved", "power", "words"),
    [
        (libvirt.VIR_DOMAIN_RUNNING, 1, False, PowerState.RUNNING, ("running", "booted")),
        (libvirt.VIR_DOMAIN_RUNNING, 10, False, PowerState.RUNNING, ("running", "postcopy")),
        (libvirt.VIR_DOMAIN_BLOCKED, 0, False, PowerState.RUNNING, ("blocked", "unknown")),
        (libvirt.VIR_DOMAIN_PAUSED, 1, False, PowerState.PAUSED, ("paused", "user")),
        (libvirt.VIR_DOMAIN_PAUSED, 5, False, PowerState.PAUSED, ("paused", "ioerror")),
        (libvirt.VIR_DOMAIN_PAUSED, 11, False, PowerState.PAUSED, ("paused", "starting_up")),
        (libvirt.VIR_DOMAIN_SHUTDOWN, 0, False, PowerState.RUNNING, ("shutdown", "unknown")),
        (libvirt.VIR_DOMAIN_SHUTOFF, 2, False, PowerState.SHUTDOWN, ("shutoff", "destroyed")),
        (libvirt.VIR_DOMAIN_SHUTOFF, 3, False, PowerState.CRASHED, ("shutoff", "crashed")),
        (libvirt.VIR_DOMAIN_SHUTOFF, 8, False, PowerState.CRASHED, ("shutoff", "daemon")),
        (libvirt.VIR_DOMAIN_SHUTOFF, 5, True, PowerState.SUSPENDED, ("shutoff", "saved")),
        (libvirt.VIR_DOMAIN_SHUTOFF, 0, True, PowerState.SUSPENDED, ("shutoff", "unknown")),
        (libvirt.VIR_DOMAIN_SHUTOFF, 5, False, PowerState.SHUTDOWN, ("shutoff", "saved")),
        (libvirt.VIR_DOMAIN_CRASHED, 1, False, PowerState.CRASHED, ("crashed", "panicked")),
        (libvirt.VIR_DOMAIN_PMSUSPENDED, 0, False, PowerState.PAUSED, ("pmsuspended", "unknown")),
        (libvirt.VIR_DOMAIN_NOSTATE, 0, False, PowerState.NOSTATE, ("nostate", "unknown")),
        (77, 5, False, PowerState.NOSTATE, ("77", "5")),
    ],
)
def test_power_states(state, reason, saved, power, words):
    found = state_of(state, reason, saved=saved)
    assert (found.power, (found.state, found.reason)) == (power, words)


@pytest.mark.parametrize(
    ("state", "reason", "postcopy", "migration"),
    [
        (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_MIGRATED, False, False),
        (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_POSTCOPY, True, True),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION, False, True),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED, True, True),
        (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER, False, False),
    ],
)
def test_whether_a_migration_holds_it(state, reason, postcopy, migration):
    found = state_of(state, reason, saved=False)
    assert (found.in_postcopy, found.in_migration) == (postcopy, migration)


def test_job_statistics_are_in_bytes_and_seconds():
    found = job_statistics(
        {
            "type": libvirt.VIR_DOMAIN_JOB_UNBOUNDED, "memory_total": 1000, "memory_processed": 600,
            "memory_remaining": 400, "memory_bps": 50, "memory_dirty_rate": 10, "memory_page_size": 4096,
            "memory_iteration": 2, "disk_total": 7, "disk_processed": 3, "disk_remaining": 4, "disk_bps": 1,
            "downtime": 300, "time_elapsed": 1500,
        },
        postcopy=True,
    )  # fmt: skip
    assert (found.type, found.memory_total, found.memory_processed, found.memory_remaining) == (
        "unbounded", 1000, 600, 400
    )  # fmt: skip
    assert (found.memory_rate, found.memory_dirty_rate, found.memory_iteration) == (50, 40960, 2)
    assert (found.disk_total, found.disk_processed, found.disk_remaining, found.disk_rate) == (7, 3, 4, 1)
    assert (found.downtime, found.elapsed, found.postcopy) == (0.3, 1.5, True)


def test_no_job_says_nothing():
    found = job_statistics({"type": 0})
    assert (found.type, found.memory_total, found.downtime, found.memory_dirty_rate) == ("none", None, None, None)


def test_statistics_are_grouped_by_device():
    stats = {
        "net.count": 2, "net.0.name": "tap0", "net.0.rx.bytes": 5, "net.1.name": "tap1", "net.7.name": "ghost",
        "block.count": 1, "block.0.name": "vda", "block.0.wr.reqs": 3, "network": 1,
    }  # fmt: skip
    assert grouped(stats, "net") == [{"name": "tap0", "rx_bytes": 5}, {"name": "tap1"}]
    assert grouped(stats, "block") == [{"name": "vda", "wr_reqs": 3}]
    assert grouped({}, "net") == []


def test_diagnostics():
    found = diagnostics_of(
        {
            "cpu.time": 9, "vcpu.current": 2, "balloon.current": 65536, "balloon.available": 60000,
            "balloon.unused": 20000, "block.count": 1, "block.0.name": "vda",
        },
        PowerState.RUNNING,
    )  # fmt: skip
    assert (found.cpu_time_ns, found.vcpus, found.memory_mb) == (9, 2, 64.0)
    assert found.memory_used_mb == 40000 / 1024
    assert (found.disks, found.nics, found.driver) == ([{"name": "vda"}], [], "libvirt")


def test_diagnostics_without_a_balloon_do_not_guess():
    found = diagnostics_of({"balloon.available": 5}, PowerState.SHUTDOWN)
    assert (found.memory_mb, found.memory_used_mb, found.state) == (None, None, PowerState.SHUTDOWN)
