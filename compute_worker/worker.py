"""One host, put together: driver, manager, RPC server, telemetry. The daemon runs one, the embedded cell several."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.manager.service import ComputeManager
from compute_worker.messages import Context
from compute_worker.objects import HostState
from compute_worker.operations.executor import Observer
from compute_worker.rpc import wire
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.server import WorkerServer
from compute_worker.virt.driver import ComputeDriver

LOG = logging.getLogger(__name__)

PEER_SECONDS = 20.0
"""How long another host may take to answer a worker, before it is asked again."""
QUICK_SECONDS = 2.0


class Worker:
    """A worker of one host. Start and stop it once each.

    :param transport: to the broker; may be shared by several workers of one process.
    :param driver: default: the one that ``[compute] compute_driver`` names.
    :param observer: sees every step (the kill harness).
    :param on_end: told kind, final state and seconds of every operation.
    :param on_commit: told the seconds of every journal commit.
    """

    def __init__(
        self,
        settings: Settings,
        transport: Any,
        driver: ComputeDriver | None = None,
        *,
        observer: Observer | None = None,
        on_end: Callable[[str, str, float], None] | None = None,
        on_commit: Callable[[float], None] | None = None,
    ) -> None:
        self.settings = settings

        def api(timeout: float, retry: int) -> Any:
            # Any: what a Peers is; how options are typed there and here cannot be said to be the same.
            exchange, topic = settings.rpc.exchange, settings.rpc.topic
            return ComputeAPI(transport, exchange=exchange, topic=topic, timeout=timeout, retry=retry)

        peers = api(PEER_SECONDS, retry=2)
        self.manager = ComputeManager(
            settings,
            driver or load_driver(settings),
            peers,
            api(QUICK_SECONDS, retry=0),
            announce=peers.host_announced,
            observer=observer,
            on_end=on_end,
            on_commit=on_commit,
        )
        self.server = WorkerServer(
            transport,
            settings.host,
            self.manager.endpoints,
            self.manager.operations.inbox,
            self._on_refused,
            settings.rpc,
        )

    def start(self) -> None:
        """Go on with what the journal holds, then listen. A broker or hypervisor that is down is waited for.

        :raises Broken: this host cannot run the driver at all.
        """
        started = time.monotonic()
        self.manager.start()
        self.server.start()
        LOG.info("worker %s is ready after %.2f s", self.settings.host, time.monotonic() - started)

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more messages, let short steps end, leave the rest to the journal; nothing is lost.

        :param timeout: seconds; default: ``graceful_shutdown_timeout``. Whether everything ended within it is returned.
        """
        limit = self.settings.compute.graceful_shutdown_timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        ended = self.server.stop_consuming(limit)
        # Before the server's threads are waited for: some of them wait for the outcome of an operation.
        ended = self.manager.operations.stop(_left(deadline)) and ended
        ended = self.server.stop(_left(deadline)) and ended
        return self.manager.stop(_left(deadline)) and ended

    def host_state(self) -> HostState:
        """What a scheduler wants to know of this host."""
        return self.manager.inventory.host_state()

    def problems(self) -> dict[str, str]:
        """What keeps this worker from working now: ``broker`` and ``hypervisor`` with the reason."""
        found = {}
        if self.server.problem is not None:
            found["broker"] = self.server.problem
        if not self.manager.core.driver.available:
            found["hypervisor"] = "the hypervisor does not answer"
        elif not self.manager.watch.compared.is_set():
            found["hypervisor"] = "it is still being asked what this host has and which guests run"
        return found

    def _on_refused(self, context: Context, method: str, args: Any, error: errors.ComputeError) -> None:
        self.manager.on_refused(
            context, method, wire.uuid_in(args, "instance"), error, wire.uuid_in(args, "operation")
        )


def _left(deadline: float) -> float:
    return max(0.1, deadline - time.monotonic())


def load_driver(settings: Settings) -> ComputeDriver:
    """The virt driver that ``[compute] compute_driver`` names.

    :raises Broken: there is none of that name, or it cannot be imported; says what to install.
    """
    from stevedore import driver as stevedore_driver
    from stevedore import exception

    name = settings.compute.compute_driver
    try:
        manager = stevedore_driver.DriverManager(
            "compute_worker.virt_drivers",
            name,
            invoke_on_load=True,
            invoke_args=(settings,),
            on_load_failure_callback=_fail,
        )
    except exception.NoMatches as exc:
        raise errors.Broken(f"[compute] compute_driver = {name}: no driver of that name is installed ({exc})") from exc
    driver: ComputeDriver = manager.driver
    return driver


def _fail(manager: Any, entry_point: Any, exc: BaseException) -> None:
    raise errors.Broken(f"virt driver {entry_point.name} cannot be loaded: {exc}") from exc
