"""One guest: the only place that calls libvirt's domain methods.

A :class:`Guest` is a name for a uuid: it holds no state, looks its domain up for every call and so outlives any number
of connections. Every method may be called twice: one whose end is already reached returns ``False`` and changes
nothing. Errors are those of :mod:`compute_worker.virt.libvirt.faults`; with no such guest
:class:`~compute_worker.errors.InstanceNotFound`, unless the method says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from xml.etree import ElementTree as ET

import libvirt

from compute_worker import errors
from compute_worker.objects import Diagnostics
from compute_worker.states import PowerState
from compute_worker.virt.libvirt.domain import METADATA_PREFIX, METADATA_URI, Domain, InstanceMetadata
from compute_worker.virt.libvirt.events import word, words
from compute_worker.virt.libvirt.faults import code_of
from compute_worker.virt.libvirt.guest_block import BlockDevice
from compute_worker.virt.libvirt.guest_jobs import GuestJobs
from compute_worker.virt.libvirt.guest_state import GuestState, diagnostics_of, state_of


class Caller(Protocol):
    """The part of :class:`~compute_worker.virt.libvirt.host.Host` that a guest needs."""

    def calling(self, doing: str, instance: str = "", *, through_peer: bool = False) -> AbstractContextManager[Any]:
        """The live connection, with libvirt's errors translated."""

    def statistics(self, uuids: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """libvirt's statistics by uuid."""


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """Sizes in MiB; ``cpu_time_ns`` of all its virtual processors."""

    state: GuestState
    memory_mb: int
    max_memory_mb: int
    vcpus: int
    cpu_time_ns: int


_ON = frozenset({libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED})
_OFF = frozenset({libvirt.VIR_DOMAIN_SHUTOFF})
_PAUSED = frozenset({libvirt.VIR_DOMAIN_PAUSED})
_STATES = frozenset(range(libvirt.VIR_DOMAIN_PMSUSPENDED + 1))
_DISK_ERRORS = words("VIR_DOMAIN_DISK_ERROR_")
_SHUTDOWN_FLAGS = {
    "default": libvirt.VIR_DOMAIN_SHUTDOWN_DEFAULT,
    "acpi": libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN,
    "agent": libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT,
}
_REBOOT_FLAGS = {
    "default": libvirt.VIR_DOMAIN_REBOOT_DEFAULT,
    "acpi": libvirt.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN,
    "agent": libvirt.VIR_DOMAIN_REBOOT_GUEST_AGENT,
}
How = Literal["default", "acpi", "agent"]


class Guest(GuestJobs):
    """The guest with this uuid on this host."""

    def __init__(self, host: Caller, uuid: str) -> None:
        self._host = host
        self.uuid = uuid

    def __repr__(self) -> str:
        return f"Guest({self.uuid})"

    @contextmanager
    def domain_for(self, doing: str, *, through_peer: bool = False) -> Iterator[Any]:
        """The ``virDomain`` for one call, looked up now."""
        with self._host.calling(doing, self.uuid, through_peer=through_peer) as conn:
            yield conn.lookupByUUIDString(self.uuid)

    def _reach(self, doing: str, states: frozenset[int], act: Callable[[Any], object]) -> bool:
        """Act unless the guest is in one of the states; an error is none if it is in one of them afterwards."""
        with self.domain_for(doing) as dom:
            if dom.state()[0] in states:
                return False
            try:
                act(dom)
            except libvirt.libvirtError:
                if dom.state()[0] not in states:
                    raise
                return False
            return True

    # What it is.

    def exists(self) -> bool:
        """Whether libvirt has it."""
        try:
            with self.domain_for("looking up the guest"):
                return True
        except errors.InstanceNotFound:
            return False

    def name(self) -> str:
        """libvirt's name of it."""
        with self.domain_for("reading its name") as dom:
            return str(dom.name())

    def id(self) -> int | None:
        """The number of this run of it; ``None`` when it is off. Another number later: it was started anew."""
        with self.domain_for("reading its id") as dom:
            number = int(dom.ID())
            return None if number < 0 else number

    def state(self) -> GuestState:
        """Its power state, now."""
        with self.domain_for("reading its state") as dom:
            return self._state(dom)

    @staticmethod
    def _state(dom: Any) -> GuestState:
        state, reason = dom.state()
        return state_of(state, reason, saved=state in _OFF and bool(dom.hasManagedSaveImage()))

    def power_state(self) -> PowerState:
        """Its power state; ``NOSTATE`` when libvirt has no such guest."""
        try:
            return self.state().power
        except errors.InstanceNotFound:
            return PowerState.NOSTATE

    def info(self) -> GuestFacts:
        """State and sizes."""
        with self.domain_for("reading its sizes") as dom:
            state = self._state(dom)
            _, most, memory, vcpus, cpu_time = dom.info()
            return GuestFacts(state, memory // 1024, most // 1024, vcpus, cpu_time)

    def is_persistent(self) -> bool:
        """Whether it has a definition that outlives its run."""
        with self.domain_for("reading whether it is persistent") as dom:
            return bool(dom.isPersistent())

    def diagnostics(self) -> Diagnostics:
        """CPU, memory, disk and network figures, without waiting for a job that runs on it."""
        power = self.state().power
        return diagnostics_of(self._host.statistics([self.uuid]).get(self.uuid, {}), power)

    def disk_errors(self) -> dict[str, str]:
        """Disks that failed, by target, with libvirt's word (``no_space``, ``unspec``); empty when it is off."""
        with self.domain_for("reading its disk errors") as dom:
            if not dom.isActive():
                return {}
            return {disk: word(_DISK_ERRORS, code) for disk, code in dom.diskErrors().items()}

    # Its description.

    def xml(self, *, inactive: bool = False, migratable: bool = False, secure: bool = False) -> str:
        """Its XML: of the running guest, or ``inactive`` (as defined), or ``migratable`` (for another host)."""
        flags = (
            (libvirt.VIR_DOMAIN_XML_INACTIVE if inactive else 0)
            | (libvirt.VIR_DOMAIN_XML_MIGRATABLE if migratable else 0)
            | (libvirt.VIR_DOMAIN_XML_SECURE if secure else 0)
        )
        with self.domain_for("reading its XML") as dom:
            return str(dom.XMLDesc(flags))

    def domain(self, *, inactive: bool = False, migratable: bool = False) -> Domain:
        """Its XML as declared elements."""
        return Domain.parse(self.xml(inactive=inactive, migratable=migratable))

    def metadata(self) -> InstanceMetadata | None:
        """Whose it is, as we wrote it; ``None``: not ours."""
        with self.domain_for("reading its metadata") as dom:
            try:
                xml = dom.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_URI, 0)
            except libvirt.libvirtError as exc:
                if code_of(exc) == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                    return None
                raise
        node = ET.fromstring(xml)
        node.tag = InstanceMetadata.TAG  # libvirt takes the namespace off
        return InstanceMetadata.wrap(node)

    def set_metadata(self, metadata: InstanceMetadata) -> None:
        """Write whose it is, to the running guest and its definition. Written when this returns."""
        node = ET.Element("instance", dict(metadata.node.attrib))
        with self.domain_for("writing its metadata") as dom:
            dom.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                ET.tostring(node, encoding="unicode"),
                METADATA_PREFIX,
                METADATA_URI,
                _live_and_config(dom),
            )

    def set_memory_stats_period(self, seconds: int) -> None:
        """Have the balloon report the guest's memory every so many seconds; 0: never. For a guest that runs."""
        with self.domain_for("setting the period of its memory statistics") as dom:
            dom.setMemoryStatsPeriod(seconds, _live_and_config(dom))

    # Power.

    def launch(self, *, paused: bool = False, discard_saved: bool = False) -> bool:
        """Start it, from its managed save where there is one. ``False``: it is on (or paused) already.

        :param paused: it does not run a single instruction until :meth:`resume`.
        :param discard_saved: boot afresh, and drop the managed save.
        :raises GuestFailed: it does not start, with QEMU's last words.
        """
        flags = (libvirt.VIR_DOMAIN_START_PAUSED if paused else 0) | (
            libvirt.VIR_DOMAIN_START_FORCE_BOOT if discard_saved else 0
        )
        return self._reach("starting the guest", _STATES - _OFF, lambda dom: dom.createWithFlags(flags))

    def resume(self) -> bool:
        """Let it run on, also one that put itself to sleep (S3). ``False``: it runs."""

        def act(dom: Any) -> None:
            if dom.state()[0] == libvirt.VIR_DOMAIN_PMSUSPENDED:
                dom.pMWakeup(0)
            else:
                dom.resume()

        return self._reach("resuming the guest", _ON, act)

    def pause(self) -> bool:
        """Stop its processors; its memory stays. ``False``: it stands still already."""
        return self._reach("pausing the guest", _PAUSED, lambda dom: dom.suspend())

    def shutdown(self, how: How = "acpi") -> bool:
        """Ask it to shut itself down; returns at once, it may never do it. ``False``: it is off."""
        return self._reach("asking the guest to shut down", _OFF, lambda dom: dom.shutdownFlags(_SHUTDOWN_FLAGS[how]))

    def reboot(self, how: How = "acpi") -> None:
        """Ask it to reboot; returns at once, it may never do it."""
        with self.domain_for("asking the guest to reboot") as dom:
            dom.reboot(_REBOOT_FLAGS[how])

    def reset(self) -> None:
        """Press its reset button: it boots at once, in the same QEMU process."""
        with self.domain_for("resetting the guest") as dom:
            dom.reset(0)

    def destroy(self) -> bool:
        """Pull its plug. ``False``: it is off, or there is none (a transient one goes with its run).

        Blocks up to 15 s when QEMU hangs: libvirt sends SIGTERM, then SIGKILL.

        :raises HypervisorBusy: QEMU does not die (it waits for a disk in the kernel).
        """
        try:
            return self._reach("powering the guest off", _OFF, lambda dom: dom.destroyFlags(0))
        except errors.InstanceNotFound:
            return False

    def undefine(self, *, keep_nvram: bool = False, keep_tpm: bool = False) -> bool:
        """Remove its definition with all that hangs on it: managed save, snapshot and checkpoint metadata, and, unless
        kept, NVRAM and TPM state. ``False``: there is none. A running guest goes on, and goes with its run.
        """
        dropped = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        full = (
            dropped
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | (libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM if keep_nvram else libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
        )
        tpm = libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM if keep_tpm else libvirt.VIR_DOMAIN_UNDEFINE_TPM
        try:
            with self.domain_for("undefining the guest") as dom:
                if not dom.isPersistent():
                    return False
                _first_known(dom.undefineFlags, (full | tpm, full, dropped))
                return True
        except errors.InstanceNotFound:
            return False

    # Suspend to disk.

    def managed_save(self) -> bool:
        """Write its memory to disk and end it; :meth:`launch` goes on from there. ``False``: done already.

        Blocks while the memory is written. The process may die in it: libvirt goes on and ends it either way.
        """
        with self.domain_for("suspending the guest to disk") as dom:
            if dom.state()[0] in _OFF and dom.hasManagedSaveImage():
                return False
            dom.managedSave(0)
            return True

    def has_managed_save(self) -> bool:
        """Whether it would start from a managed save."""
        with self.domain_for("looking for its managed save") as dom:
            return bool(dom.hasManagedSaveImage())

    def remove_managed_save(self) -> bool:
        """Drop the managed save: it would boot afresh. ``False``: there is none."""
        with self.domain_for("dropping its managed save") as dom:
            if not dom.hasManagedSaveImage():
                return False
            dom.managedSaveRemove(0)
            return True

    # Disks.

    def block(self, target: str) -> BlockDevice:
        """One of its disks, by target (``vda``)."""
        return BlockDevice(self, target)


def _live_and_config(dom: Any) -> int:
    live: int = libvirt.VIR_DOMAIN_AFFECT_LIVE if dom.isActive() else 0
    config: int = libvirt.VIR_DOMAIN_AFFECT_CONFIG if dom.isPersistent() else 0
    return live | config


def _first_known(call: Callable[[int], object], flags: tuple[int, ...]) -> None:
    """Call with the first flags that the daemon knows: one older than the binding refuses newer ones."""
    for number, one in enumerate(flags, 1):
        try:
            call(one)
        except libvirt.libvirtError as exc:
            if code_of(exc) != libvirt.VIR_ERR_INVALID_ARG or number == len(flags):
                raise
        else:
            return
