"""A small simulated machine that outlives the worker: what the fake driver drives, and what tests look at."""

from compute_worker.virt.simulated.cell import SimulatedCell, Violation
from compute_worker.virt.simulated.connection import Connection, Died
from compute_worker.virt.simulated.faults import Faults, Stall
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.images import ImageShelf

__all__ = ["Connection", "Died", "Faults", "ImageShelf", "SimulatedCell", "SimulatedHost", "Stall", "Violation"]
