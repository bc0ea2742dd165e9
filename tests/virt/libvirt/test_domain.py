"""Every declared property of the domain XML, against libvirt's own schema."""

import inspect

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker.virt.libvirt import domain as d
from compute_worker.virt.libvirt import domain_devices, domain_disk
from compute_worker.virt.libvirt.domain import METADATA_URI, Domain, InstanceMetadata
from compute_worker.virt.libvirt.xmlmap import Element, properties_of
from tests.virt.libvirt import domain_samples as samples
from tests.virt.libvirt.domain_strategies import domains
from tests.virt.libvirt.schema import errors_of, virt_xml_validate

PROPERTIES = [pytest.param(c, p, id=f"{c.__name__}.{p.name}") for c, p in properties_of(*samples.CLASSES)]


def declared_classes():
    found = {
        cls
        for module in (d, domain_devices, domain_disk)
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, Element) and hasattr(cls, "TAG")
    }
    return sorted(found, key=lambda cls: cls.__name__)


def test_every_element_class_is_sampled():
    assert set(declared_classes()) == set(samples.CLASSES)


def test_the_minimal_domain_is_valid():
    assert errors_of(samples.minimal().to_xml()) == []


@pytest.mark.parametrize("cls", samples.CLASSES)
def test_the_base_of_each_element_is_valid(cls):
    assert errors_of(samples.place(samples.build(cls)).to_xml()) == []


@pytest.mark.parametrize(("cls", "prop"), PROPERTIES)
def test_property_is_set_built_validated_parsed_and_removed(cls, prop):
    case = samples.case_of(cls, prop)
    for value in case.values:
        element = samples.build(cls)
        for name, other in case.beside.items():
            setattr(element, name, other)
        setattr(element, prop.name, None)
        without = element.copy()
        setattr(element, prop.name, value)
        assert getattr(element, prop.name) == value
        assert element != without
        assert errors_of(samples.place(element).to_xml()) == []
        again = cls.parse(element.to_xml())
        assert getattr(again, prop.name) == value
        assert again == element
        setattr(again, prop.name, None)
        assert getattr(again, prop.name) in (None, [])
        # Removing may take an element that held nothing else with it, and what that meant: compare the rest.
        rest = [name for name in cls.PROPERTIES if not name.startswith(prop.name)]
        assert [getattr(again, name) for name in rest] == [getattr(without, name) for name in rest]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(domains())
def test_generated_domains_are_valid_and_come_back(domain):
    xml = domain.to_xml()
    assert errors_of(xml) == []
    again = Domain.parse(xml)
    assert again == domain
    assert again.to_xml() == xml


@pytest.mark.parametrize("build", [samples.minimal, lambda: samples.place(samples.build(domain_disk.Disk))])
def test_virt_xml_validate_agrees(build, tmp_path):
    result = virt_xml_validate(build().to_xml(), tmp_path / "domain.xml")
    assert result.returncode == 0, result.stderr


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(domain=domains())
def test_virt_xml_validate_takes_generated_domains(domain, tmp_path):
    result = virt_xml_validate(domain.to_xml(), tmp_path / "domain.xml")
    assert result.returncode == 0, result.stderr


def test_virt_xml_validate_and_the_schema_refuse_the_same(tmp_path):
    domain = samples.minimal()
    domain.node.find("uuid").text = "not-a-uuid"
    assert errors_of(domain.to_xml()) != []
    assert virt_xml_validate(domain.to_xml(), tmp_path / "domain.xml").returncode != 0


def test_metadata_is_in_our_namespace_and_leaves_others_alone():
    other = '<metadata><n:x xmlns:n="urn:other" a="1"/></metadata>'
    domain = Domain.parse(f"<domain type='qemu'><name>n</name>{other}</domain>")
    domain.instance = InstanceMetadata(uuid=samples.UUID, owner="node1", generation=3)
    xml = domain.to_xml()
    assert f'<cw:instance xmlns:cw="{METADATA_URI}"' in xml or f'xmlns:cw="{METADATA_URI}"' in xml
    again = Domain.parse(xml)
    assert (again.instance.owner, again.instance.generation, again.instance.migration) == ("node1", 3, None)
    domain.instance = None
    assert domain == Domain.parse(f"<domain type='qemu'><name>n</name>{other}</domain>")


def test_an_empty_backing_store_ends_the_chain():
    chain = domain_disk.BackingStore(
        type="file", format="raw", source_file="/b", backing_store=domain_disk.BackingStore()
    )
    disk = domain_disk.Disk(type="file", source_file="/i/disk", backing_store=chain)
    assert "<backingStore />" in disk.to_xml()
    assert disk.backing_store.backing_store.backing_store is None


MIGRATABLE = """
<domain type='qemu' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>vm</name><uuid>0f7a4ac5-4b7d-4e6b-9f0a-0123456789ab</uuid>
  <memory unit='KiB'>98304</memory><vcpu>1</vcpu>
  <numatune><memory mode='strict' nodeset='0'/></numatune>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='/src/disk' index='1'/><target dev='vda' bus='virtio'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x05' function='0x0'/>
    </disk>
    <sound model='ich9'><alias name='sound0'/></sound>
    <graphics type='vnc' port='5900' listen='10.0.0.1'><listen type='address' address='10.0.0.1'/></graphics>
  </devices>
  <qemu:commandline><qemu:arg value='-snapshot'/></qemu:commandline>
</domain>
"""


def test_rewriting_for_a_destination_keeps_what_is_not_declared():
    domain = Domain.parse(MIGRATABLE)
    domain.devices.disks[0].source_file = "/dst/disk"
    domain.devices.graphics[0].listen = "10.0.0.2"
    domain.devices.graphics[0].listens[0].address = "10.0.0.2"
    expected = MIGRATABLE.replace("/src/disk", "/dst/disk").replace("10.0.0.1", "10.0.0.2")
    assert Domain.parse(domain.to_xml()) == Domain.parse(expected)
    assert errors_of(domain.to_xml()) == []


@given(st.text(min_size=1))
def test_no_title_can_add_elements(text):
    domain = samples.minimal()
    try:
        domain.title = text
    except ValueError:
        return
    again = Domain.parse(domain.to_xml())
    assert [node.tag for node in again.node] == [node.tag for node in domain.node]
