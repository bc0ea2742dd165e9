"""One guest, against libvirt's own test driver. What that driver cannot do is shown in the lab."""

import json
import sys

import libvirt
import pytest

from compute_worker import errors
from compute_worker.states import PowerState
from compute_worker.virt.libvirt.domain import InstanceMetadata
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.host import Host
from tests.virt.libvirt.conftest import UUID, domain


@pytest.fixture
def guest(host):
    return host.define(domain().to_xml())


def test_a_guest_is_a_name_for_a_uuid(host, guest):
    assert (guest.uuid, guest.name(), guest.exists(), guest.is_persistent()) == (UUID, "instance-1", True, True)
    assert repr(guest) == f"Guest({UUID})"
    nobody = Guest(host, UUID.replace("0f", "1f"))
    assert not nobody.exists()
    assert nobody.power_state() is PowerState.NOSTATE


def test_launch_and_destroy_twice(guest):
    assert guest.id() is None
    assert guest.power_state() is PowerState.SHUTDOWN
    assert (guest.launch(), guest.launch()) == (True, False)
    assert guest.power_state() is PowerState.RUNNING
    assert guest.id() > 0
    assert (guest.destroy(), guest.destroy()) == (True, False)
    assert (guest.state().power, guest.state().reason) == (PowerState.SHUTDOWN, "destroyed")


def test_every_run_has_another_id(guest):
    guest.launch()
    first = guest.id()
    guest.destroy()
    guest.launch()
    assert guest.id() not in (None, first)


def test_pause_and_resume_twice(guest):
    guest.launch()
    assert (guest.pause(), guest.pause()) == (True, False)
    assert (guest.state().power, guest.state().reason) == (PowerState.PAUSED, "user")
    assert (guest.resume(), guest.resume()) == (True, False)
    assert guest.power_state() is PowerState.RUNNING


@pytest.mark.parametrize("act", ["pause", "resume"])
def test_a_guest_that_is_off_can_neither_be_paused_nor_resumed(guest, act):
    with pytest.raises(errors.GuestFailed, match=f"instance {UUID}: .* the guest: libvirt says"):
        getattr(guest, act)()


def test_reset_keeps_it_running_in_the_same_run(guest):
    guest.launch()
    before = guest.id()
    guest.reset()
    assert (guest.power_state(), guest.id()) == (PowerState.RUNNING, before)
    guest.destroy()
    with pytest.raises(errors.GuestFailed, match="resetting the guest"):
        guest.reset()


def test_shutdown_of_a_guest_that_is_off_is_done(guest):
    guest.launch()
    assert guest.shutdown("default")
    assert guest.power_state() is PowerState.SHUTDOWN
    assert not guest.shutdown()


def test_undefine_twice_with_a_managed_save(guest):
    guest.launch()
    guest.managed_save()
    assert (guest.undefine(), guest.undefine()) == (True, False)
    assert not guest.exists()


def test_undefining_a_running_guest_makes_it_go_with_its_run(guest):
    guest.launch()
    assert (guest.undefine(), guest.undefine()) == (True, False)
    assert guest.power_state() is PowerState.RUNNING
    assert guest.destroy()
    assert not guest.exists()
    assert not guest.destroy()


def test_managed_save_and_start_from_it(guest):
    guest.launch()
    assert (guest.managed_save(), guest.managed_save()) == (True, False)
    assert guest.has_managed_save()
    assert (guest.state().power, guest.state().reason) == (PowerState.SUSPENDED, "saved")
    guest.launch()
    assert not guest.has_managed_save()
    assert guest.power_state() is PowerState.RUNNING


def test_remove_managed_save_twice(guest):
    guest.launch()
    guest.managed_save()
    assert (guest.remove_managed_save(), guest.remove_managed_save()) == (True, False)
    assert guest.power_state() is PowerState.SHUTDOWN


def test_a_guest_that_is_off_cannot_be_saved(guest):
    with pytest.raises(errors.GuestFailed, match="suspending the guest to disk"):
        guest.managed_save()


def test_info(guest):
    guest.launch()
    info = guest.info()
    assert (info.state.power, info.memory_mb, info.max_memory_mb, info.vcpus) == (PowerState.RUNNING, 64, 64, 2)
    assert info.cpu_time_ns >= 0


def test_xml_running_and_as_defined(guest):
    guest.launch()
    assert guest.domain().id == guest.id()
    assert guest.domain(inactive=True).id is None
    assert guest.domain(migratable=True).uuid == UUID


def test_metadata_twice_running_and_as_defined(guest):
    assert guest.metadata() is None
    guest.set_metadata(InstanceMetadata(uuid=UUID, owner="node1", generation=0))
    guest.launch()
    newer = InstanceMetadata(uuid=UUID, owner="node2", generation=4, migration=UUID)
    guest.set_metadata(newer)
    guest.set_metadata(newer)
    assert guest.metadata() == newer
    assert guest.domain().instance == newer
    assert guest.domain(inactive=True).instance == newer
    guest.destroy()
    assert guest.metadata() == newer


def test_metadata_given_at_definition_is_read(host):
    given = InstanceMetadata(uuid=UUID, owner="node1", generation=2)
    assert host.define(domain(instance=given).to_xml()).metadata() == given


def test_metadata_that_libvirt_cannot_write_is_an_error(guest):
    with pytest.raises(ValueError):
        guest.set_metadata(InstanceMetadata(owner="a\0b"))


def test_diagnostics(guest):
    guest.launch()
    found = guest.diagnostics()
    assert (found.state, found.driver) == (PowerState.RUNNING, "libvirt")


def test_disk_errors_of_a_guest_that_is_off_are_none(guest):
    assert guest.disk_errors() == {}


def test_block_info_is_of_the_disk_that_is_named(guest):
    with pytest.raises(errors.ComputeError, match="reading the sizes of disk vda"):
        guest.block("vda").info()


@pytest.mark.parametrize(
    ("name", "args", "what"),
    [
        ("migrate", ("qemu+tcp://node2/system", {}, 1), "migrating the guest"),
        ("set_max_downtime", (0.1,), "setting its migration's downtime"),
        ("set_max_speed", (1,), "setting its migration's speed"),
        ("start_postcopy", (), "switching its migration to post-copy"),
        ("backup_begin", ("<domainbackup/>",), "beginning a backup"),
        ("backup_xml", (), "reading its backup"),
        ("abort_job", (), "aborting its job"),
        ("job_stats", (), "reading its job's statistics"),
        ("job_operation", (), "reading its job"),
    ],
)
def test_what_the_test_driver_cannot_do_is_said_with_what_was_tried(guest, name, args, what):
    guest.launch()
    with pytest.raises(errors.NotSupported, match=what):
        getattr(guest, name)(*args)


def test_job_statistics_of_a_guest_that_is_off(guest):
    assert guest.job_stats().type == "none"
    assert guest.job_operation() == ""
    assert guest.block("vda").job() is None
    assert not guest.block("vda").abort()


def test_a_guest_that_arrives_has_no_statistics_but_a_job(guest, monkeypatch):
    """libvirt has them at the source only, and says so by an error."""
    guest.launch()
    refused = libvirt.libvirtError("migration statistics are available only on the source host")
    refused.err = (libvirt.VIR_ERR_OPERATION_UNSUPPORTED, 10, "", 2, None, None, None, 0, 0)

    def stats(dom, flags):
        raise refused

    monkeypatch.setattr(libvirt.virDomain, "jobStats", stats)
    assert guest.job_operation() == "migration_in"


@pytest.mark.parametrize(("base", "top"), [("", "/i/disk"), ("/b", ""), (None, None)])
def test_a_commit_must_name_its_base_and_top(guest, base, top):
    with pytest.raises(ValueError, match="a commit names its base and its top"):
        guest.block("vda").commit(base, top, active=True)


class Race:
    """A domain that somebody else brings to the wished state between our question and our act."""

    def __init__(self, dom, act):
        self._dom = dom
        self._act = act

    def __getattr__(self, name):
        return getattr(self._dom, name)

    def suspend(self):
        self._act()
        return self._dom.suspend()


def test_somebody_faster_is_no_error(host, guest, monkeypatch):
    guest.launch()
    with host.calling("racing") as conn:
        dom = conn.lookupByUUIDString(UUID)
        monkeypatch.setattr(libvirt.virConnect, "lookupByUUIDString", lambda _, uuid: Race(dom, dom.suspend))
        assert not guest.pause()
    assert dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED


def test_a_guest_outlives_connections():
    host = Host("test:///default", backoff=(0.01, 0.05))  # the one that all connections of the process share
    try:
        guest = host.define(domain().to_xml())
        guest.launch()
        old = host._connection.get()
        host._connection._lost(old, "error")
        assert guest.power_state() is PowerState.RUNNING
        assert host._connection.get() is not old
        assert guest.destroy()
        assert guest.undefine()
    finally:
        host.close()


YANKABLE = (
    '{"return": [{"type": "chardev", "id": "charmonitor"}, {"type": "block-node", "node-name": "libvirt-1-storage"},'
    ' {"type": "block-node", "node-name": "migration-vda-storage"}, {"type": "migration"}]}'
)


def test_only_connections_of_the_migration_are_cut(guest, monkeypatch):
    """Never libvirt's own monitor, nor a disk of the guest."""
    asked = []
    answers = iter([YANKABLE, '{"return": {}}', '{"return": []}'])

    def monitor(dom, command, flags):
        asked.append(json.loads(command))
        return next(answers)

    monkeypatch.setattr("libvirt_qemu.qemuMonitorCommand", monitor)
    assert guest.sever_migration() is True
    assert asked == [
        {"execute": "query-yank"},
        {"execute": "yank", "arguments": {"instances": [
            {"type": "block-node", "node-name": "migration-vda-storage"}, {"type": "migration"}]}},
    ]  # fmt: skip
    assert guest.sever_migration() is False


def test_a_qemu_without_yank(guest, monkeypatch):
    refused = '{"error": {"class": "CommandNotFound", "desc": "The command query-yank has not been found"}}'
    monkeypatch.setattr("libvirt_qemu.qemuMonitorCommand", lambda dom, command, flags: refused)
    with pytest.raises(errors.NotSupported, match="yank"):
        guest.sever_migration()


def test_a_binding_without_qemu_s_part(guest, monkeypatch):
    monkeypatch.setitem(sys.modules, "libvirt_qemu", None)
    with pytest.raises(errors.NotSupported, match="libvirt-qemu"):
        guest.sever_migration()
