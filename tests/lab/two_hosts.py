"""The world of two real hosts, seen from inside the first; the second is asked by its agent."""

from __future__ import annotations

from typing import Any

from compute_worker.objects import Instance
from compute_worker.virt.driver import ComputeDriver
from tests.lab import oracle
from tests.lab.agent import Remote, RemoteDriver
from tests.lab.libvirt_world import LibvirtWorld
from tests.virt.jobs import RecordingJob
from tests.virt.world import LIVE, RESIZE, run
from tests.waiting import wait_for


class TwoHosts(LibvirtWorld):
    """See :class:`tests.virt.world.World`. Both drivers have the same options of [transfer]."""

    supports = frozenset({RESIZE, LIVE})

    def __init__(self, **transfer: Any) -> None:
        super().__init__()
        self.remote = Remote(self.b)
        self._tokens: dict[str, str] = {}
        self.use(transfer)
        self.remote.call("use", transfer)
        self.remote.call("restart")

    def use_live(self, options: dict[str, Any]) -> None:
        """On both hosts, from now on."""
        super().use_live(options)
        self.remote.call("use_live", options)
        for host in (self.a, self.b):
            self.restart(host)

    def driver(self, host: str) -> ComputeDriver:
        return RemoteDriver(self.remote) if host == self.b else super().driver(host)  # type: ignore[return-value]

    def restart(self, host: str) -> ComputeDriver:
        if host == self.b:
            self.remote.call("restart")
            return self.driver(host)
        return super().restart(host)

    def new_instance(self, host: str, **changes: Any) -> Instance:
        instance = super().new_instance(host, **changes)
        self.remote.call("remember", instance)
        return instance

    def power(self, host: str, uuid: str) -> str:
        return str(self._ask("power", host, uuid))

    def files(self, host: str, uuid: str) -> set[str]:
        return set(self._ask("files", host, uuid))

    def plugged(self, host: str, uuid: str) -> set[str]:
        return set(self._ask("plugged", host, uuid))

    def console(self, host: str, uuid: str) -> str:
        return str(self._ask("console", host, uuid))

    def memory(self, host: str, uuid: str) -> tuple[str, int]:
        """A guest that came running tells of no boot: it has the token that it had before."""

        def ticked() -> tuple[str, int] | None:
            boots = oracle.boots(self.console(host, uuid))
            if not boots or not boots[-1].ticks:
                return None
            if boots[-1].number:
                self._tokens[uuid] = str(boots[-1].number)
            return self._tokens.get(uuid, "0"), boots[-1].ticks[-1]

        return wait_for(ticked, 60, f"{uuid} to tick on {host}") or ("", 0)

    def content(self, host: str, uuid: str, name: str, suffix: str = "") -> str:
        return str(self._ask("content", host, uuid, name, suffix))

    def bitmaps(self, host: str, uuid: str, name: str, suffix: str = "") -> list[str]:
        return list(self._ask("bitmaps", host, uuid, name, suffix))

    def processes(self, host: str, name: str) -> list[str]:
        return list(self._ask("processes", host, name))

    def _ask(self, what: str, host: str, *arguments: Any) -> Any:
        if host == self.b:
            return self.remote.call(what, host, *arguments)
        return getattr(super(), what)(host, *arguments)

    def close(self) -> None:
        """Remove every instance that a test made, from both hosts."""
        for instance in self._made.values():
            run(self.driver(self.b).destroy(instance), RecordingJob())
        self.remote.call("restart")
        super().close()
