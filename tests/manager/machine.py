"""A host that outlives its workers: one simulated machine, one state directory, a worker that dies where it is told."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from compute_worker import errors
from compute_worker.config import Compute, Settings
from compute_worker.manager.service import ComputeManager
from compute_worker.messages import Context
from compute_worker.objects import Flavor, ImageMeta, Instance, Vif
from compute_worker.operations.executor import Point
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated.cell import SimulatedCell
from compute_worker.virt.simulated.host import SimulatedHost
from tests.manager.net import Death, Net
from tests.waiting import wait_for

IMAGE = "cirros"
VIF = "99999999-9999-4999-8999-999999999999"

DeathPoint = tuple[str, str, str, Point]
"""Kind, step, direction, point."""


def quiet_deaths(monkeypatch) -> None:
    """Threads of a dead worker end in Death; that is no news."""
    from compute_worker.virt.simulated.connection import Died

    before = threading.excepthook

    def hook(args):
        if not issubclass(args.exc_type, Death | Died):
            before(args)

    monkeypatch.setattr(threading, "excepthook", hook)


def make_instance(number: int = 1, **changes) -> Instance:
    """An instance with a network interface and one GiB of disk."""
    fields = {
        "uuid": f"00000000-0000-4000-8000-{number:012d}",
        "name": f"vm{number}",
        "flavor": Flavor(vcpus=1, memory_mb=128, root_gb=1, ephemeral_gb=1, swap_mb=64),
        "image": ImageMeta(id=IMAGE, disk_format="raw"),
        "vifs": [Vif(id=VIF, mac="52:54:00:00:00:01", bridge="br0")],
    }
    return Instance(**(fields | changes))


class Machine:
    """One host under test. ``worker`` is the manager that runs now; :attr:`reached` what its observer saw."""

    def __init__(
        self,
        directory: Path,
        name: str = "node1",
        cell: SimulatedCell | None = None,
        net: Net | None = None,
        **compute,
    ) -> None:
        self.name = name
        self.net = net if net is not None else Net()
        self.net.machines[name] = self
        options = {"host": name, "state_path": str(directory / name), "shutdown_timeout": 1.0}
        options |= {"shutdown_retry_interval": 0.1, "soft_reboot_timeout": 5.0, "graceful_shutdown_timeout": 2.0}
        options |= {"peer_ask_interval": 0.1, "image_withdraw_interval": 0.05}
        self.settings = dataclasses.replace(Settings(), compute=Compute(**(options | compute)))
        self.host = SimulatedHost(name, cell)
        self.host.images.put(IMAGE, b"root file system")
        self.reached: list[DeathPoint] = []
        self.die_at: DeathPoint | None = None
        self.at: dict[DeathPoint, Callable[[], None]] = {}
        self.dead = threading.Event()
        self.start()

    def start(self) -> None:
        """Start a worker on what the last one left."""
        self.dead = dead = threading.Event()
        self.driver = FakeDriver(self.settings, self.host)

        def observe(point, run, step, direction):
            if dead.is_set():
                raise Death
            here = (run.kind, step, direction, point)
            self.reached.append(here)
            if here in self.at:
                self.at.pop(here)()
            if here == self.die_at:
                self.die_at = None
                self.kill()
                raise Death

        self.worker = ComputeManager(self.settings, self.driver, self.net.peers_of(self.name), observer=observe)
        self.worker.start()

    def kill(self) -> None:
        """SIGKILL: memory is lost, nothing more is written or called."""
        self.dead.set()
        self.driver.die()
        self.worker.database.close()

    def bury(self) -> None:
        """The kernel takes the threads of a killed worker; ours leave by themselves."""
        self.worker.operations.stop(5)
        self.worker.settler.stop()
        self.worker.withdrawer.stop()
        self.worker.watch.stop()

    def restart(self) -> None:
        """Start again after :meth:`kill`."""
        self.bury()
        self.start()

    def close(self) -> None:
        """End the worker as SIGTERM does."""
        if self.dead.is_set():
            self.bury()
        else:
            self.worker.stop(5)

    def context(self) -> Context:
        return Context(request_id="req-test", message_id=str(uuid.uuid4()))

    def send(self, method: str, *args, **kwargs) -> str:
        """Send one command; the operation's uuid."""
        endpoint = next(e for e in self.worker.endpoints if hasattr(e, method))
        return getattr(endpoint, method)(self.context(), *args, **kwargs).operation

    def ask(self, method: str, *args, **kwargs):
        """Ask one question; its answer."""
        endpoint = next(e for e in self.worker.endpoints if hasattr(e, method))
        return getattr(endpoint, method)(self.context(), *args, **kwargs)

    def outcome(self, operation: str, wait: float = 15):
        """The operation once it is final."""
        found = self.worker.operations.get(operation, wait)
        assert found.state.final, f"{found.kind} is still {found.state} in {found.phase}: waits for {found.waiting_for}"
        return found

    def do(self, method: str, *args, **kwargs):
        """Send one command and wait for its outcome."""
        return self.outcome(self.send(method, *args, **kwargs))

    def instance(self, uuid_: str) -> Instance | None:
        """The record, or ``None``."""
        try:
            return self.worker.core.store.get(uuid_)
        except errors.NotFound:
            return None
        except errors.InstanceDeleted:
            return None

    def settle(self, uuid_: str) -> None:
        """Wait until the record of an instance agrees with the machine and nothing runs on it."""
        from compute_worker.states import EXPECTED_POWER

        def agrees() -> bool:
            record = self.instance(uuid_)
            if record is None:
                return True
            expected = EXPECTED_POWER.get(record.vm_state)
            return record.task_state is None and expected in (None, self.host.power_of(uuid_))

        wait_for(agrees, what=f"record and machine to agree on {uuid_}")

    def notifications(self) -> list:
        return self.worker.operations.outbox.peek(1000)
