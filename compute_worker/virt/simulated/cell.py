"""Several simulated hosts that reach each other, and the oracle over all of them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compute_worker.config import Settings
from compute_worker.states import PowerState
from compute_worker.virt.simulated.images import ImageShelf

if TYPE_CHECKING:
    from compute_worker.virt.simulated.flight import Flight
    from compute_worker.virt.simulated.host import SimulatedHost

TWO_RUNNING = "two running copies"
TWO_WRITERS = "disk written by two guests"


@dataclass(frozen=True)
class Violation:
    """Something that must never be, noted the moment it was."""

    what: str
    uuid: str
    hosts: tuple[str, ...]
    time: float


class SimulatedCell:
    """Hosts by name. One lock guards the state of all of them; it is never held while anything waits.

    :param images: the image store that all hosts fetch from; a host may be given one of its own.
    """

    def __init__(self, images: ImageShelf | None = None) -> None:
        self.lock = threading.RLock()
        self.images = images if images is not None else ImageShelf()
        self.hosts: dict[str, SimulatedHost] = {}
        self.flights: dict[str, Flight] = {}
        """The last live migration of each guest."""
        self.violations: list[Violation] = []

    def add(self, host: SimulatedHost) -> None:
        """``host`` is reachable by its name; it takes the place of an earlier one of that name."""
        with self.lock:
            self.hosts[host.name] = host

    def running_copies(self, uuid: str) -> list[str]:
        """Names of the hosts on which the guest's processors run now."""
        with self.lock:
            return [h.name for h in self.hosts.values() if h.power_of(uuid) is PowerState.RUNNING]

    def check_running(self, uuid: str) -> None:
        """Called at every start of processors: notes a second running copy."""
        copies = self.running_copies(uuid)
        if len(copies) > 1:
            self.note(TWO_RUNNING, uuid, copies)

    def check_writer(self, uuid: str) -> None:
        """Called at every write of a guest to its disk."""
        copies = self.running_copies(uuid)
        if len(copies) > 1:
            self.note(TWO_WRITERS, uuid, copies)

    def note(self, what: str, uuid: str, hosts: list[str]) -> None:
        """Record a violation."""
        self.violations.append(Violation(what, uuid, tuple(sorted(hosts)), time.time()))


_default = SimulatedCell()
_default_lock = threading.Lock()


def default_cell() -> SimulatedCell:
    """The cell of this process: where drivers live that were made from settings alone."""
    return _default


def host_for(settings: Settings) -> SimulatedHost:
    """The simulated host of ``settings.host``: the one this process has already, else the one that an earlier
    process kept under ``state_path``, else a new one. Knobs of ``[fake]`` are those of ``settings``."""
    from compute_worker.virt.simulated.host import SimulatedHost

    directory = Path(settings.compute.state_path) / "simulated" / settings.host
    with _default_lock:
        host = _default.hosts.get(settings.host)
        if host is None or host.root != directory:
            if host is not None:
                host.close()
            images = ImageShelf(directory=Path(settings.images.file_path), below=_default.images)
            host = SimulatedHost(settings.host, _default, images=images, directory=directory)
        host.configure(settings.fake)
        return host
