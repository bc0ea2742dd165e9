"""One hypervisor host as libvirt shows it: its facts, its guests, what happens on it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from compute_worker.virt.libvirt.accounts import guest_user
from compute_worker.virt.libvirt.connection import Connection, OpenFunction, Subscriber
from compute_worker.virt.libvirt.faults import Call, code_of, translated
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.kvm import KVM_DEVICE, choose_domain_type, probe_kvm

_CANNOT_COMPARE = frozenset(
    {libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_UNSUPPORTED, libvirt.VIR_ERR_CONFIG_UNSUPPORTED}
)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What does not change while libvirtd runs. Memory in MiB; versions as libvirt counts (major * 10^6 + minor *
    1000 + release). ``domain_type_reason`` says why guests are of ``domain_type``."""

    hostname: str
    uuid: str
    libvirt_version: int
    hypervisor_type: str
    hypervisor_version: int
    arch: str
    cpu_model: str
    cpu_vendor: str
    cpu_topology: dict[str, int]
    cpu_features: tuple[str, ...]
    vcpus: int
    memory_mb: int
    domain_type: str
    domain_type_reason: str
    machine_types: tuple[str, ...] = ()
    default_machine: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """What libvirt's capabilities offer for guests of the host's own architecture."""

    domain_types: frozenset[str] = frozenset()
    machine_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What we read of ``virConnectGetCapabilities``."""

    uuid: str = ""
    arch: str = ""
    cpu_model: str = ""
    cpu_vendor: str = ""
    cpu_topology: dict[str, int] = field(default_factory=dict)
    cpu_features: tuple[str, ...] = ()
    offer: Offer = Offer()

    @classmethod
    def parse(cls, xml: str) -> Capabilities:
        """Read the document that libvirt gives."""
        root = ET.fromstring(xml)
        cpu = root.find("./host/cpu")
        topology = None if cpu is None else cpu.find("topology")
        arch = root.findtext("./host/cpu/arch", "")
        return cls(
            uuid=root.findtext("./host/uuid", ""),
            arch=arch,
            cpu_model=root.findtext("./host/cpu/model", ""),
            cpu_vendor=root.findtext("./host/cpu/vendor", ""),
            cpu_topology={k: int(v) for k, v in topology.attrib.items()} if topology is not None else {},
            cpu_features=tuple(sorted(f.get("name", "") for f in root.iterfind("./host/cpu/feature"))),
            offer=_offer(root, arch),
        )


def _offer(root: ET.Element, arch: str) -> Offer:
    for guest in root.iterfind("./guest/arch"):
        if guest.get("name") == arch:
            machines = [(m.get("canonical") or "", m.text or "") for m in guest.iterfind("machine")]
            return Offer(
                domain_types=frozenset(d.get("type", "") for d in guest.iterfind("domain")),
                machine_types=tuple(sorted({name for pair in machines for name in pair if name})),
            )
    return Offer()


class Host:
    """The host behind ``uri``. Thread-safe. Connects on first use, and again whenever libvirtd comes back.

    :param host: this worker's name, for messages; default: the machine's.
    :param domain_type: ``auto``, ``kvm`` or ``qemu``.
    :param keepalive, connect_timeout, backoff, open_function: see :class:`Connection`.
    """

    def __init__(
        self,
        uri: str = "qemu:///system",
        *,
        host: str = "",
        domain_type: str = "auto",
        keepalive: tuple[int, int] = (2, 3),
        connect_timeout: float = 5.0,
        backoff: tuple[float, float] = (0.1, 5.0),
        kvm_device: str = KVM_DEVICE,
        open_function: OpenFunction = libvirt.open,
    ) -> None:
        self.name = host or socket.gethostname()
        self._connection = Connection(
            uri, keepalive=keepalive, connect_timeout=connect_timeout, backoff=backoff, open_function=open_function
        )
        self._domain_type = domain_type
        self._kvm_device = kvm_device
        self._facts_lock = threading.Lock()
        self._facts: tuple[int, HostFacts] | None = None
        self._chosen: tuple[str, str] | None = None

    # The connection.

    @property
    def uri(self) -> str:
        """Where libvirt answers."""
        return self._connection.uri

    @property
    def is_connected(self) -> bool:
        """Whether libvirt answered when we last heard of it; does not ask it."""
        return self._connection.is_connected

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._connection.start()

    def close(self, timeout: float = 5.0) -> None:
        """Disconnect for good; guests are left as they are."""
        self._connection.close(timeout)

    def wait_connected(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a connection."""
        return self._connection.wait_connected(timeout)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """``callback`` gets every :class:`~compute_worker.virt.libvirt.events.Event` from now on, one at a time, from
        a thread of ours that holds no lock; it may call libvirt. Returns what ends that.

        After :class:`~compute_worker.virt.libvirt.events.ConnectionRestored` states must be compared: what happened
        while there was no connection is not told.
        """
        return self._connection.subscribe(callback)

    @contextmanager
    def calling(self, doing: str, instance: str = "", *, through_peer: bool = False) -> Iterator[Any]:
        """The live ``virConnect``, for one call; libvirt's errors come out as ours.

        :param doing: what is being done, for the message.
        :param through_peer: another host's libvirtd takes part, so that a lost connection may be that one's.
        :raises HypervisorUnavailable: libvirtd is gone, hangs or refuses us.
        :raises HypervisorBusy, InstanceNotFound, NotSupported, DiskFull, Cancelled, GuestFailed, Broken: see
            :mod:`compute_worker.virt.libvirt.faults`.
        """
        conn = self._connection.get()
        call = Call(doing=doing, host=self.name, instance=instance)

        def ours_lives() -> bool:
            return self._connection.report_broken(conn) and through_peer

        with translated(call, connected=ours_lives):
            yield conn

    # Facts.

    def facts(self) -> HostFacts:
        """What this host is; asked once for each connection, but the domain type is chosen once and for all.

        :raises Broken: the wished domain type does not work here.
        """
        with self._facts_lock:
            generation = self._connection.generation
            if self._facts is None or self._facts[0] != generation or not generation:
                facts = self._ask_facts()
                self._facts = (self._connection.generation, facts)
            return self._facts[1]

    def _ask_facts(self) -> HostFacts:
        with self.calling("reading the host's capabilities") as conn:
            described = conn.getCapabilities()
            caps = Capabilities.parse(described)
            info = conn.getInfo()
            kvm = self._domain_capabilities(conn, caps.arch, "kvm")
            if self._chosen is None:
                device = probe_kvm(guest_user(described), self._kvm_device)
                self._chosen = choose_domain_type(self._domain_type, caps.offer.domain_types, device, kvm[:2])
            domain_type, reason = self._chosen
            chosen = kvm if domain_type == "kvm" else self._domain_capabilities(conn, caps.arch, domain_type)
            return HostFacts(
                hostname=conn.getHostname(),
                uuid=caps.uuid,
                libvirt_version=conn.getLibVersion(),
                hypervisor_type=conn.getType(),
                hypervisor_version=conn.getVersion(),
                arch=caps.arch,
                cpu_model=caps.cpu_model,
                cpu_vendor=caps.cpu_vendor,
                cpu_topology=caps.cpu_topology,
                cpu_features=caps.cpu_features,
                vcpus=info[2],
                memory_mb=info[1],
                domain_type=domain_type,
                domain_type_reason=reason,
                machine_types=caps.offer.machine_types,
                default_machine=chosen[2],
            )

    @staticmethod
    def _domain_capabilities(conn: Any, arch: str, domain_type: str) -> tuple[bool, str, str]:
        """Whether libvirt knows how to run such guests, its words, and the machine type they get by default."""
        try:
            xml = conn.getDomainCapabilities(None, arch, None, domain_type)
        except libvirt.libvirtError as exc:
            if code_of(exc) in (
                libvirt.VIR_ERR_NO_SUPPORT,
                libvirt.VIR_ERR_INVALID_ARG,
                libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
            ):
                return False, f"libvirt has no capabilities for {domain_type} guests: {exc}", ""
            raise
        return True, f"libvirt runs {domain_type} guests", ET.fromstring(xml).findtext("./machine", "")

    def capabilities_xml(self) -> str:
        """libvirt's own description of the host, as it is."""
        with self.calling("reading the host's capabilities") as conn:
            return str(conn.getCapabilities())

    def compare_cpu(self, cpu_xml: str) -> bool:
        """Whether a guest with this ``<cpu>`` (another host's model) can run here."""
        with self.calling("comparing CPUs") as conn:
            return bool(conn.compareCPU(cpu_xml, 0) != libvirt.VIR_CPU_COMPARE_INCOMPATIBLE)

    def compare_guest_cpu(self, cpu_xml: str, machine: str) -> tuple[bool, str]:
        """Whether a guest that runs elsewhere with this ``<cpu>`` could run here, and why (not).

        By what libvirt knows this host's hypervisor gives to guests of the host's domain type; where it cannot say
        that (an emulated processor on some versions), a guest is not refused: libvirt compares again when it arrives.
        """
        facts = self.facts()
        with self.calling("comparing the guest's processor") as conn:
            try:
                result = conn.compareHypervisorCPU(None, facts.arch, machine or None, facts.domain_type, cpu_xml, 0)
            except libvirt.libvirtError as exc:
                if code_of(exc) in _CANNOT_COMPARE:
                    return True, f"libvirt cannot compare processors here ({exc})"
                if code_of(exc) == libvirt.VIR_ERR_CPU_INCOMPATIBLE:
                    return False, str(exc)
                raise
        if result == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
            return False, "the hypervisor here cannot give it the processor that it has"
        return True, "the hypervisor here gives the same processor"

    # Guests.

    def list_guests(self) -> list[Guest]:
        """All guests, running or not, ours or not."""
        with self.calling("listing the guests") as conn:
            return [Guest(self, dom.UUIDString()) for dom in conn.listAllDomains(0)]

    def get_guest(self, uuid: str) -> Guest:
        """The guest.

        :raises InstanceNotFound: libvirt answers, and has none.
        """
        with self.calling("looking up the guest", uuid) as conn:
            return Guest(self, conn.lookupByUUIDString(uuid).UUIDString())

    def define(self, xml: str) -> Guest:
        """Define the guest, or replace its definition; it is not started. libvirt checks the XML by its schema.

        Kept when the process dies: libvirt writes it before it answers. Again with the same XML: the same.
        """
        with self.calling("defining the guest", _uuid_in(xml)) as conn:
            return Guest(self, conn.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE).UUIDString())

    def create(self, xml: str, *, paused: bool) -> Guest:
        """Start a transient guest: it leaves no definition when it ends.

        :param paused: it does not run a single instruction until :meth:`Guest.resume`.
        """
        flags = libvirt.VIR_DOMAIN_START_VALIDATE | (libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)
        with self.calling("starting the guest", _uuid_in(xml)) as conn:
            return Guest(self, conn.createXML(xml, flags).UUIDString())

    def statistics(self, uuids: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """libvirt's statistics by uuid, of all guests or of some; what is busy with a job is told without waiting."""
        flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
        with self.calling("reading statistics", uuids[0] if uuids and len(uuids) == 1 else "") as conn:
            if uuids is None:
                ask = partial(conn.getAllDomainStats, 0)
            else:
                ask = partial(conn.domainListGetStats, [conn.lookupByUUIDString(uuid) for uuid in uuids], 0)
            try:
                answer = ask(flags)
            except libvirt.libvirtError as exc:
                if code_of(exc) != libvirt.VIR_ERR_INVALID_ARG:  # a driver that does not know the flag
                    raise
                answer = ask(0)
            return {dom.UUIDString(): values for dom, values in answer}


def _uuid_in(xml: str) -> str:
    try:
        return ET.fromstring(xml).findtext("./uuid", "")
    except ET.ParseError:
        return ""
