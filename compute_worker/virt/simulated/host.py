"""The simulated machine: a hypervisor with guests and files that outlives the worker, and what can befall it."""

from __future__ import annotations

import threading
import time
import uuid as uuids
from collections import Counter
from pathlib import Path

from compute_worker.config import Fake
from compute_worker.states import PowerState
from compute_worker.virt.driver import DriverEvent, EventKind, Leftover
from compute_worker.virt.simulated.cell import SimulatedCell
from compute_worker.virt.simulated.connection import Connection
from compute_worker.virt.simulated.disk import Persistence
from compute_worker.virt.simulated.faults import Faults
from compute_worker.virt.simulated.files import CONSOLE, DELETED, PART, RESIZE, HostFiles
from compute_worker.virt.simulated.images import ImageShelf
from compute_worker.virt.simulated.model import Domain, File, Memory, Slot

_KINDS = {"": "directory", RESIZE: "resize", DELETED: "del"}


class SimulatedHost(HostFiles):
    """One hypervisor host of a cell.

    Knobs are plain attributes, to be set at any time. Methods whose docstring begins with "Guest" or "Outside" are
    for tests: what a guest, an operator or fate does. :attr:`effects` counts, by (uuid, effect), what could be seen
    from outside: ``boot`` (from cold), ``restore`` (from saved memory), ``unpause``, ``pause``, ``suspend``,
    ``shutdown`` (clean), ``kill``, ``define``, ``undefine``, ``plug``, ``unplug``, ``delete`` (of files),
    ``migrated_in``, ``migrated_out``, and ``download`` by image id.

    :param directory: where the host is kept over a restart of the process; ``None``: in memory only.
    """

    def __init__(
        self,
        name: str,
        cell: SimulatedCell | None = None,
        *,
        images: ImageShelf | None = None,
        directory: Path | None = None,
    ) -> None:
        super().__init__(name, Persistence(directory) if directory else None)
        self.cell = cell if cell is not None else SimulatedCell()
        self.images = images if images is not None else self.cell.images
        self.root = directory
        self.faults = Faults()
        self.connections: list[Connection] = []
        self.effects: Counter[tuple[str, str]] = Counter()
        self.hypervisor_up = True
        self.powered = True
        self.reachable = True
        """Whether peers reach it; a host that is off is never reached."""
        self.boot_id = self._persistence.boot_id if self._persistence else str(uuids.uuid4())
        self._set_knobs()
        if self._persistence is not None:
            kept = self._persistence
            self.slots, self.base, self.effects = kept.slots, kept.base, kept.effects
            self._ground()
        self.cell.add(self)

    def _set_knobs(self) -> None:
        self.vcpus, self.memory_mb, self.disk_gb, self.latency = 16, 65_536, 1_000, 0.0
        self.cpu_model = "simulated-v1"
        self.machine_arch = "x86_64"
        self.version = 1_000_000
        self.rate: float | None = None
        """Bytes a second of downloads, copies and migrations from here; ``None``: they take no time."""
        self.link_rate: float | None = None
        """Bytes a second of live migrations from here; ``None``: as ``rate``."""
        self.dirty_rate = 0.0
        """Bytes a second that guests dirty while they migrate; at the rate of the migration or above it never ends by
        itself."""
        self.finish_timeout = 0.2
        """Seconds after which the source of a migration whose finish reply was lost lets its guest run again."""
        self.deaf: set[str] = set()
        """Guests that ignore ACPI."""
        self.shutdown_seconds = 0.0
        """Seconds a guest takes to shut itself down."""

    def _ground(self) -> None:
        """Migrations that were in flight ended with the process that simulated them: guests are where they were."""
        for slot in list(self.slots.values()):
            domain = slot.domain
            if domain is None or not domain.migrating:
                continue
            domain.migrating = False
            if domain.persistent:
                self.power(domain, PowerState.RUNNING, "migration failed")
            else:
                self.changed(self.drop(domain))

    def configure(self, options: Fake) -> None:
        """Take the knobs of ``[fake]``."""
        self.vcpus, self.memory_mb = options.vcpus, options.memory_mb
        self.disk_gb, self.latency = options.disk_gb, options.latency

    def close(self) -> None:
        """The simulation of this host ends: its workers die, what is kept stays kept."""
        for connection in list(self.connections):
            connection.die()
        if self._persistence is not None:
            self._persistence.close()

    # --- the hypervisor: called by the driver under the cell's lock ---------------------------------------------

    def domain(self, uuid: str) -> Domain | None:
        """A guest, or ``None``."""
        slot = self.slots.get(uuid)
        return slot.domain if slot is not None else None

    def power_of(self, uuid: str) -> PowerState:
        """Power state of a guest; NOSTATE where there is none."""
        domain = self.domain(uuid)
        return domain.power if domain is not None else PowerState.NOSTATE

    def define(self, domain: Domain) -> None:
        """Make or replace a guest's definition."""
        slot = self.slot(domain.uuid)
        if slot.domain is None:
            self.effect(domain.uuid, "define")
        slot.domain = domain
        self.changed(slot)

    def undefine(self, uuid: str) -> None:
        """Forget a guest that is off, with its saved memory."""
        slot = self.slot(uuid)
        if slot.domain is None:
            return
        slot.domain = None
        self.effect(uuid, "undefine")
        self.changed(slot)

    def boot(self, domain: Domain, paused: bool) -> None:
        """Start a guest from cold."""
        domain.memory, domain.saved = Memory(token=uuids.uuid4().hex), None
        self.effect(domain.uuid, "boot")
        self.console(domain.uuid, f"boot {domain.memory.token}\n")
        self.tell(EventKind.STARTED, domain.uuid)
        self._started(domain, paused)

    def restore(self, domain: Domain, paused: bool = False) -> None:
        """Start a guest from its saved memory."""
        domain.memory, domain.saved = domain.saved, None
        self.effect(domain.uuid, "restore")
        self.tell(EventKind.STARTED, domain.uuid)
        self._started(domain, paused)

    def _started(self, domain: Domain, paused: bool) -> None:
        if paused:
            self.power(domain, PowerState.PAUSED, "starting up", EventKind.PAUSED)
        else:
            self.power(domain, PowerState.RUNNING, "booted", EventKind.RESUMED)

    def power(self, domain: Domain, power: PowerState, reason: str, event: EventKind | None = None) -> None:
        """A guest changes its power state; here the oracle looks."""
        domain.power, domain.reason = power, reason
        if domain.memory is not None:
            if power is PowerState.RUNNING:
                domain.memory.run()
            else:
                domain.memory.halt()
        if not domain.alive:
            domain.memory, domain.migrating = None, False
        self.changed(self.slot(domain.uuid) if domain.persistent or domain.alive else self.drop(domain))
        if power is PowerState.RUNNING:
            self.cell.check_running(domain.uuid)
        if event is not None:
            self.tell(event, domain.uuid, reason)

    def kill(self, domain: Domain) -> None:
        """Pull a guest's plug."""
        if domain.alive:
            self.effect(domain.uuid, "kill")
            self.power(domain, PowerState.SHUTDOWN, "destroyed", EventKind.STOPPED)

    def shut_down(self, domain: Domain) -> None:
        """Press a guest's power button. It goes down after ``shutdown_seconds``, if it listens."""
        if domain.power is not PowerState.RUNNING or domain.uuid in self.deaf:
            return
        if not self.shutdown_seconds:
            self.guest_shutdown(domain.uuid)
            return
        timer = threading.Timer(self.shutdown_seconds, self.guest_shutdown, (domain.uuid, domain.memory))
        timer.daemon = True
        timer.start()

    def effect(self, uuid: str, what: str) -> None:
        """Count something that can be seen from outside."""
        self.effects[uuid, what] += 1
        if self._persistence is not None:
            self._persistence.add_effect(uuid, what)

    def tell(self, kind: EventKind, uuid: str = "", detail: str = "") -> None:
        """Send an event to the worker that is connected."""
        event = DriverEvent(kind, uuid, time.time(), detail)
        for connection in tuple(self.connections):
            connection.emit(event)

    def console(self, uuid: str, text: str) -> None:
        """A guest writes to its serial console."""
        directory = self.directory(uuid)
        if directory is not None:
            directory[CONSOLE] = File(getattr(directory.get(CONSOLE), "data", b"") + text.encode())

    def drop(self, domain: Domain) -> Slot:
        """Forget a guest that had no persistent definition; to be kept with :meth:`changed`."""
        slot = self.slot(domain.uuid)
        slot.domain = None
        return slot

    # --- what befalls it ----------------------------------------------------------------------------------------

    def guest_shutdown(self, uuid: str, memory: Memory | None = None) -> None:
        """Guest: it shuts itself down (only while it has ``memory``, where that is given)."""
        with self.cell.lock, self.together():
            domain = self.domain(uuid)
            if domain is None or domain.power is not PowerState.RUNNING:
                return
            if memory is not None and (domain.memory is None or domain.memory.token != memory.token):
                return
            self.effect(uuid, "shutdown")
            self.console(uuid, "Power down\n")
            self.power(domain, PowerState.SHUTDOWN, "shutdown", EventKind.STOPPED)

    def guest_write(self, uuid: str, data: bytes, disk: str = "disk") -> None:
        """Guest: it writes to its disk."""
        with self.cell.lock:
            directory = self.directory(uuid)
            if self.power_of(uuid) is not PowerState.RUNNING or directory is None:
                raise AssertionError(f"guest {uuid} does not run on {self.name}: it cannot write")
            self.cell.check_writer(uuid)
            directory[disk].data += data
            self.changed(self.slot(uuid))

    def guest_memory(self, uuid: str) -> tuple[str, int]:
        """Guest: token and counter of its memory (see :class:`~compute_worker.virt.simulated.model.Memory`)."""
        with self.cell.lock:
            domain = self.domain(uuid)
            memory = domain.memory or domain.saved if domain is not None else None
            if memory is None:
                raise AssertionError(f"guest {uuid} has no memory on {self.name}")
            return memory.token, memory.now()

    def guest_crash(self, uuid: str) -> None:
        """Outside: the guest's process dies."""
        with self.cell.lock:
            domain = self.domain(uuid)
            if domain is not None and domain.alive:
                self.power(domain, PowerState.CRASHED, "crashed", EventKind.CRASHED)

    def hypervisor_down(self) -> None:
        """Outside: the hypervisor's daemon is killed. Guests go on."""
        with self.cell.lock:
            self.hypervisor_up = False
            self.tell(EventKind.DISCONNECTED)

    def hypervisor_restart(self) -> None:
        """Outside: it answers again."""
        with self.cell.lock:
            self.hypervisor_up = True
            self.tell(EventKind.CONNECTED)

    def power_failure(self) -> None:
        """Outside: the machine loses power: its workers and guests die, files stay, nobody reaches it."""
        with self.cell.lock:
            for connection in list(self.connections):
                connection.die()
            self.powered = self.hypervisor_up = False
            for slot in list(self.slots.values()):
                if slot.domain is not None and slot.domain.alive:
                    self.power(slot.domain, PowerState.SHUTDOWN, "host lost power")

    def power_restore(self) -> None:
        """Outside: the machine boots: a new boot id, a hypervisor that answers, no guest runs."""
        with self.cell.lock:
            self.boot_id = self._persistence.new_boot() if self._persistence else str(uuids.uuid4())
            self.powered = self.hypervisor_up = True

    # --- the oracle ---------------------------------------------------------------------------------------------

    def running(self, uuid: str) -> bool:
        """Whether the guest's processors run here."""
        with self.cell.lock:
            return self.power_of(uuid) is PowerState.RUNNING

    def files(self, uuid: str) -> dict[str, bytes]:
        """All files of an instance by ``<uuid><suffix>/<name>``, as they were written."""
        with self.cell.lock:
            directories = self.slot(uuid).directories
            return {f"{uuid}{s}/{name}": file.data for s, d in directories.items() for name, file in d.items()}

    def read_disk(self, uuid: str, disk: str = "disk", suffix: str = "") -> bytes:
        """What the guest would read from a disk.

        :raises KeyError: there is no such disk, or its base image is missing.
        """
        with self.cell.lock:
            return self.content(self.slot(uuid).directories[suffix][disk])

    def leftovers(self) -> list[Leftover]:
        """Everything here that belongs to some instance."""
        with self.cell.lock:
            return [item for slot in self.slots.values() for item in self._leftovers(slot.uuid)]

    def _leftovers(self, uuid: str) -> list[Leftover]:
        slot = self.slots[uuid]
        found = [Leftover(uuid, "domain", f"{self.name}:{uuid}")] if slot.domain is not None else []
        for suffix, directory in slot.directories.items():
            found.append(Leftover(uuid, _KINDS[suffix], self.path(uuid, suffix)))
            parts = (name for name in directory if name.endswith(PART))
            found.extend(Leftover(uuid, "part", f"{self.path(uuid, suffix)}/{name}") for name in parts)
        return found
