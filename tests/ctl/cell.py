"""``compute-workerctl`` against two embedded hosts, run within the test's process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compute_worker.cmd.ctl import run
from compute_worker.ctl.connect import Client
from compute_worker.embedded import EmbeddedCell
from compute_worker.objects import HostState
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated.host import SimulatedHost
from tests.waiting import wait_for

DISCOVER_SECONDS = "0.15"
PATIENCE_SECONDS = 10.0
IMAGE = "img-1"
KERNEL = "kernel-1"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document that was printed."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self
        return json.loads(lines[0])


@dataclass(frozen=True)
class PatientClient(Client):
    """Waits for all hosts that there are, however busy the machine is, and no longer."""

    everyone: int = 0

    def hosts(self, enough: Callable[[list[HostState]], bool] = lambda found: False) -> list[HostState]:
        return super().hosts(lambda found: enough(found) or len(found) >= self.everyone)


class CtlCell(EmbeddedCell):
    def client(self, discover: float = float(DISCOVER_SECONDS)) -> Client:
        living = len(self.workers)
        if not living:
            return Client(self.api, self.transport, self.exchange, discover)
        return PatientClient(self.api, self.transport, self.exchange, max(discover, PATIENCE_SECONDS), living)

    def ready(self) -> None:
        """Until every host answers."""
        wait_for(lambda: len(self.client().hosts()) == len(self.settings), what="every host to answer")

    def ctl(self, *argv: str, terminal: bool = False) -> Result:
        out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
        words = ["--discover", DISCOVER_SECONDS, *argv]
        code = run(words, lambda args: self.client(args.discover), out, err)
        return Result(int(code), out.getvalue(), err.getvalue())

    def boot(self, name: str, *options: str) -> str:
        """Boot an instance; its uuid."""
        argv = ("boot", name, "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw", "--json", *options)
        result = self.ctl(*argv)
        assert result.code == 0, result
        return str(result.document["instance"])

    def simulated(self, host: str) -> SimulatedHost:
        driver = self.workers[host].manager.core.driver
        assert isinstance(driver, FakeDriver)
        return driver.simulated
