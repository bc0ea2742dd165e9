"""The host, against libvirt's own test driver."""

import libvirt
import pytest

from compute_worker import errors
from compute_worker.virt.libvirt import host as host_module
from compute_worker.virt.libvirt.events import ConnectionRestored, Lifecycle, LifecycleEvent
from compute_worker.virt.libvirt.host import Capabilities, Host
from tests.virt.libvirt.conftest import UUID, domain
from tests.virt.libvirt.test_faults import error
from tests.waiting import wait_for

OTHER = "11111111-2222-4333-8444-555555555555"
BOTH = frozenset({"kvm", "qemu"})

QEMU_CAPABILITIES = """
<capabilities>
  <host><uuid>7c1ab000-0000-4000-8000-000000000001</uuid>
    <cpu><arch>x86_64</arch><model>Skylake-Client</model><vendor>Intel</vendor>
      <topology sockets='1' dies='1' cores='2' threads='1'/><feature name='vmx'/><feature name='ds'/></cpu>
  </host>
  <guest><os_type>hvm</os_type><arch name='i686'><machine>isapc</machine><domain type='qemu'/></arch></guest>
  <guest><os_type>hvm</os_type><arch name='x86_64'>
    <machine canonical='pc-i440fx-7.2'>pc</machine><machine>pc-q35-7.2</machine>
    <domain type='qemu'/><domain type='kvm'/></arch></guest>
</capabilities>
"""


def test_capabilities_are_read_for_the_hosts_own_architecture():
    caps = Capabilities.parse(QEMU_CAPABILITIES)
    assert (caps.uuid, caps.arch) == ("7c1ab000-0000-4000-8000-000000000001", "x86_64")
    assert (caps.cpu_model, caps.cpu_vendor, caps.cpu_features) == ("Skylake-Client", "Intel", ("ds", "vmx"))
    assert caps.cpu_topology == {"sockets": 1, "dies": 1, "cores": 2, "threads": 1}
    assert caps.offer.domain_types == BOTH
    assert caps.offer.machine_types == ("pc", "pc-i440fx-7.2", "pc-q35-7.2")


def test_facts(host):
    facts = host.facts()
    assert (facts.vcpus, facts.memory_mb, facts.hypervisor_type, facts.arch) == (4, 4096, "TEST", "i686")
    assert (facts.domain_type, facts.domain_type_reason) == ("test", "libvirt's test driver")
    assert facts.libvirt_version == libvirt.getVersion()
    assert facts.hostname
    assert host.facts() is facts


def test_the_domain_type_is_chosen_once(host, monkeypatch):
    chosen = iter([("test", "first"), ("qemu", "second")])
    monkeypatch.setattr(host_module, "choose_domain_type", lambda *about: next(chosen))
    assert host.facts().domain_type_reason == "first"
    host._facts = None
    assert host.facts().domain_type_reason == "first"


def test_facts_refuse_a_domain_type_that_is_not_there(uri):
    host = Host(uri, domain_type="kvm")
    try:
        with pytest.raises(errors.Broken, match="virt_type is kvm"):
            host.facts()
    finally:
        host.close()


def test_capabilities_xml_is_libvirts(host):
    assert host.capabilities_xml().startswith("<capabilities>")


def test_guests_are_defined_found_and_listed(host):
    assert host.list_guests() == []
    guest = host.define(domain().to_xml())
    assert guest.uuid == UUID
    assert host.get_guest(UUID).name() == "instance-1"
    host.define(domain(OTHER, "instance-2").to_xml())
    assert {one.uuid for one in host.list_guests()} == {UUID, OTHER}


def test_defining_twice_is_one_guest_with_the_newer_definition(host):
    host.define(domain().to_xml())
    host.define(domain(vcpus=3).to_xml())
    assert [one.domain().vcpus for one in host.list_guests()] == [3]


def test_an_unknown_guest_is_named_with_its_host(host):
    with pytest.raises(errors.InstanceNotFound, match=f"instance {UUID} is not known on host node1"):
        host.get_guest(UUID)


@pytest.mark.parametrize("broken", ["<domain", domain().to_xml().replace("</name>", "</name><bogus/>")])
def test_bad_xml_is_refused_and_nothing_is_defined(host, broken):
    with pytest.raises(errors.ComputeError, match="defining the guest"):
        host.define(broken)
    assert host.list_guests() == []


def test_create_is_transient(host):
    guest = host.create(domain().to_xml(), paused=False)
    assert (guest.is_persistent(), guest.state().state) == (False, "running")
    assert guest.destroy()
    assert not guest.exists()


def test_lifecycle_events_come_in_order(host, received):
    guest = host.define(domain().to_xml())
    guest.launch()
    guest.pause()
    guest.resume()
    guest.destroy()
    guest.undefine()
    wait_for(lambda: received and getattr(received[-1], "kind", None) is Lifecycle.UNDEFINED, what="all events")
    assert received[0] == ConnectionRestored(generation=1)
    assert [(event.kind, event.reason) for event in received[1:] if isinstance(event, LifecycleEvent)] == [
        ("defined", "added"), ("started", "booted"), ("suspended", "paused"), ("resumed", "unpaused"),
        ("stopped", "destroyed"), ("undefined", "removed"),
    ]  # fmt: skip
    assert {event.uuid for event in received[1:]} == {UUID}


def test_statistics(host):
    host.define(domain().to_xml()).launch()
    assert host.statistics()[UUID]["state.state"] == libvirt.VIR_DOMAIN_RUNNING
    assert set(host.statistics([UUID])) == {UUID}
    with pytest.raises(errors.InstanceNotFound):
        host.statistics([OTHER])


def test_no_libvirtd_is_said_plainly(tmp_path):
    host = Host(f"qemu+unix:///system?socket={tmp_path}/none", connect_timeout=0.1)
    try:
        with pytest.raises(errors.HypervisorUnavailable, match="cannot connect: Failed to connect socket"):
            host.list_guests()
        assert not host.is_connected
    finally:
        host.close()


LOST = error(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, "client socket is closed")


def test_a_peers_lost_connection_is_not_taken_for_ours(host):
    with pytest.raises(errors.GuestFailed), host.calling("migrating", UUID, through_peer=True):
        raise LOST
    with pytest.raises(errors.HypervisorUnavailable), host.calling("reading", UUID):
        raise LOST
    assert host.is_connected


def test_facts_are_asked_again_after_a_reconnection(host):
    first = host.facts()
    host._connection._lost(host._connection.get(), "error")
    assert wait_for(lambda: host._connection.generation == 2 and host.is_connected)
    assert host.facts() == first
    assert host.facts() is not first


def test_closing_leaves_the_guests():
    other = libvirt.open("test:///default")  # the one that all connections of the process share
    host = Host("test:///default")
    host.define(domain().to_xml()).launch()
    host.close()
    with pytest.raises(errors.HypervisorUnavailable):
        host.list_guests()
    left = other.lookupByUUIDString(UUID)
    assert left.isActive()
    left.destroy()
    left.undefine()


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        (libvirt.VIR_CPU_COMPARE_INCOMPATIBLE, False),
        (libvirt.VIR_CPU_COMPARE_IDENTICAL, True),
        (libvirt.VIR_CPU_COMPARE_SUPERSET, True),
        (libvirt.VIR_ERR_CPU_INCOMPATIBLE, False),
        (libvirt.VIR_ERR_CONFIG_UNSUPPORTED, True),
    ],
)
def test_a_guest_s_processor_is_compared_by_libvirt(host, monkeypatch, answer, fits):
    """What libvirt cannot say is no reason to refuse: it compares again when the guest comes."""
    asked = []

    def compare(conn, emulator, arch, machine, virttype, xml, flags):
        asked.append((machine, virttype, xml))
        if answer > libvirt.VIR_CPU_COMPARE_SUPERSET:
            raise error(answer, libvirt.VIR_FROM_CPU, "said by libvirt")
        return answer

    monkeypatch.setattr(libvirt.virConnect, "compareHypervisorCPU", compare)
    found, why = host.compare_guest_cpu("<cpu/>", "pc-q35-7.2")
    assert (found, bool(why)) == (fits, True)
    assert asked[0][0] == "pc-q35-7.2" and asked[0][2] == "<cpu/>"


def test_a_driver_that_compares_nothing_refuses_nobody(host):
    assert host.compare_guest_cpu("<cpu><model>x</model></cpu>", "")[0] is True
