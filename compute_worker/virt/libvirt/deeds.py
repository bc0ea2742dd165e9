"""What the parts of the libvirt driver share: small deeds on one instance that look first, so that twice is once."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.images import files
from compute_worker.network import vifs
from compute_worker.objects import DiskInfo, Instance
from compute_worker.states import PowerState
from compute_worker.virt.driver import Job
from compute_worker.virt.libvirt import xml_builder
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.instance_dir import DELETED, RESIZE
from compute_worker.virt.libvirt.domain import Domain
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.host import Host, HostFacts
from compute_worker.virt.libvirt.xml_builder import CONSOLE_LOG, Hardware, Places

LOG = logging.getLogger(__name__)
OFF = frozenset({PowerState.NOSTATE, PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.SUSPENDED})
"""States in which a guest has no process."""
DEFINITION = "libvirt.xml"


class Deeds:
    """Deeds on the instances of one host. Thread-safe for different instances.

    ``direct_io``: whether the instances' file system can do direct I/O; set by ``init_host``.
    """

    def __init__(self, settings: Settings, host: Host, disks: DiskBuilder) -> None:
        self.settings = settings
        self.host = host
        self.disks = disks
        self.direct_io = True

    # --- looking ------------------------------------------------------------------------------------------------

    def guest(self, uuid: str) -> Guest:
        """The guest of that uuid, there or not."""
        return Guest(self.host, uuid)

    def power(self, uuid: str) -> PowerState:
        """Its power state now; ``NOSTATE``: libvirt has no such guest."""
        return self.guest(uuid).power_state()

    @contextmanager
    def needed(self, uuid: str) -> Iterator[Guest]:
        """The guest, for a deed that makes no sense without it.

        :raises GuestFailed: there is none.
        """
        try:
            yield self.guest(uuid)
        except errors.InstanceNotFound:
            reason = f"there is no such guest on host {self.host.name}"
            raise errors.GuestFailed(instance=uuid, reason=reason) from None

    def need_alive(self, uuid: str) -> None:
        """:raises GuestFailed: it is off, or not there."""
        with self.needed(uuid) as guest:
            state = guest.state()
        if state.power in OFF:
            raise errors.GuestFailed(instance=uuid, reason=f"it is off ({state.power}, {state.reason})")

    def need_disk_info(self, uuid: str) -> DiskInfo:
        """:raises GuestFailed: its disks are not here."""
        info = self.disks.directory.read_disk_info(uuid)
        if info is None:
            path = self.disks.directory.path(uuid)
            raise errors.GuestFailed(instance=uuid, reason=f"its disks are missing ({path} has no disk.info)")
        return info

    # --- interfaces ---------------------------------------------------------------------------------------------

    def plug_vifs(self, instance: Instance, job: Job) -> None:
        """Every bridge is there; libvirt makes the taps when the guest starts, and removes them when it ends."""
        job.check()
        vifs.check_bridges(instance)

    # --- the guest ----------------------------------------------------------------------------------------------

    def define(self, instance: Instance, job: Job) -> None:
        """The guest is defined as its record says, and ``libvirt.xml`` beside its disks says how. One that runs goes
        on as it is, under the new definition from its next start.

        :raises GuestFailed: libvirt refuses the definition.
        """
        job.check()
        text = self.description(instance).to_xml()
        self.touch_console(instance.uuid)
        files.write_atomic(self.disks.directory.path(instance.uuid) / DEFINITION, text.encode())
        self.host.define(text)

    def description(self, instance: Instance) -> Domain:
        """The definition of the guest, from its record and its ``disk.info``."""
        directory = self.disks.directory
        return xml_builder.build(
            instance,
            self.need_disk_info(instance.uuid),
            Places(directory.path(instance.uuid), directory.base),
            self._hardware(instance.uuid),
            self.settings.libvirt,
            self.host.name,
        )

    def _hardware(self, uuid: str) -> Hardware:
        facts = self.host.facts()
        machine = self.settings.libvirt.machine_type or self.machine(uuid) or self._machine_of_files(uuid, facts)
        return Hardware(facts.domain_type, facts.arch, machine or facts.default_machine, self.direct_io)

    def machine(self, uuid: str) -> str:
        """The machine type that the guest is defined with; empty where it is not defined."""
        try:
            return _machine_of(self.guest(uuid).domain(inactive=True))
        except errors.InstanceNotFound:
            return ""

    def _machine_of_files(self, uuid: str, facts: HostFacts) -> str:
        """The one it had here; else the one it had where it came from, unless this host is known not to have it."""
        directory = self.disks.directory
        try:
            return _machine_of(Domain.parse((directory.path(uuid) / DEFINITION).read_text()))
        except (OSError, ValueError):
            arrival = directory.arrival(uuid)
        found = arrival.machine if arrival is not None else ""
        return found if found in facts.machine_types or not facts.machine_types else ""

    def touch_console(self, uuid: str) -> None:
        """``console.log`` is there and ours: virtlogd keeps the owner of one that it finds, and makes its own for
        root alone."""
        path = self.disks.directory.path(uuid) / CONSOLE_LOG
        with files.disk_errors(path):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileExistsError:
                if not stat.S_ISREG(path.lstat().st_mode):
                    raise errors.Broken(f"{path} is not a plain file: remove it") from None
            else:
                os.close(fd)

    def start_paused(self, uuid: str, job: Job) -> None:
        """The guest has memory and no processor of it runs; one that is on already is left alone.

        :raises GuestFailed: it does not start, with QEMU's last words.
        """
        job.check()
        with self.needed(uuid) as guest:
            guest.launch(paused=True)

    def kill(self, uuid: str) -> None:
        """The guest is off, by its plug."""
        self.guest(uuid).destroy()

    def undefine(self, uuid: str) -> None:
        """The guest is off and forgotten, with its saved memory, snapshots, checkpoints and firmware state."""
        guest = self.guest(uuid)
        guest.destroy()
        guest.undefine()

    # --- files --------------------------------------------------------------------------------------------------

    def delete_files(self, uuid: str) -> None:
        """Nothing of the instance is in the instances directory: in use, set aside, or half removed."""
        for suffix in (DELETED, RESIZE, ""):
            self.disks.directory.remove(uuid, suffix)

    def instance_path(self, uuid: str) -> Path | None:
        """The instance's directory, else the one set aside, else ``None``."""
        paths = (self.disks.directory.path(uuid, suffix) for suffix in ("", RESIZE))
        return next((path for path in paths if path.is_dir()), None)

    def save_record(self, instance: Instance) -> None:
        """The record beside the disks and in the guest, where these exist; the guest's is written when it differs."""
        self.disks.directory.write_record(instance)
        guest, wanted = self.guest(instance.uuid), xml_builder.metadata(instance, self.host.name)
        try:
            found = guest.metadata()
            if found is None or found.node.attrib != wanted.node.attrib:
                guest.set_metadata(wanted)
        except errors.InstanceNotFound:
            LOG.debug("instance %s has no guest here: its record is in its files alone", instance.uuid)


def _machine_of(domain: Domain) -> str:
    return (domain.os.machine if domain.os is not None else None) or ""
