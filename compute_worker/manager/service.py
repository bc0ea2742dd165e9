"""The manager as one object: journal, store, claims, operations and endpoints of one host, started and stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compute_worker import claims as claims_module
from compute_worker import moves as moves_module
from compute_worker import objects
from compute_worker import store as store_module
from compute_worker.claims import Claims
from compute_worker.config import Settings
from compute_worker.errors import ComputeError
from compute_worker.manager import (
    build,
    delete,
    doctor,
    immediate,
    live_destination,
    live_source,
    power,
    recovery,
    resize_destination,
    resize_source,
    resize_verdict,
    snapshot,
    withdrawals,
)
from compute_worker.manager.core import Core
from compute_worker.manager.doctor import DoctorEndpoint
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.manager.imaging import SnapshotEndpoint
from compute_worker.manager.inventory import InventoryEndpoint
from compute_worker.manager.lifecycle import LifecycleEndpoint
from compute_worker.manager.live import LiveMigrationEndpoint
from compute_worker.manager.peers import Peers
from compute_worker.manager.resize import ResizeEndpoint
from compute_worker.manager.settler import Settler
from compute_worker.manager.watch import Watch
from compute_worker.messages import Context
from compute_worker.objects import HostState
from compute_worker.operations.database import Database
from compute_worker.operations.executor import Observer
from compute_worker.operations.kinds import Kind
from compute_worker.operations.schema import SCHEMA
from compute_worker.operations.service import Operations
from compute_worker.store import Store
from compute_worker.virt.driver import ComputeDriver

LOG = logging.getLogger(__name__)

ENDPOINTS = (
    LifecycleEndpoint,
    InventoryEndpoint,
    ResizeEndpoint,
    LiveMigrationEndpoint,
    SnapshotEndpoint,
    DoctorEndpoint,
)
"""Every class that answers messages: what the server is handed and the AsyncAPI description is made from."""


def kinds_of(core: Core) -> Mapping[str, Kind]:
    """Every kind of operation by name."""
    kinds = [
        build.kind(core),
        delete.kind(core),
        *(power.kind(core, command) for command in power.POWER),
        resize_destination.kind(core),
        resize_destination.elsewhere_kind(core),
        resize_source.kind(core),
        resize_verdict.confirm_kind(core),
        resize_verdict.drop_kind(core),
        resize_verdict.revert_kind(core),
        resize_verdict.back_kind(core),
        snapshot.snapshot_kind(core),
        snapshot.backup_kind(core),
        live_source.kind(core),
        live_destination.kind(core),
        doctor.kind(core),
        *(immediate.kind(name) for name in immediate.EVENTS),
    ]
    return {kind.name: kind for kind in kinds}


class ComputeManager:
    """One host.

    :param peers: how other hosts are reached; ``quick_peers``: the same, with an answer within 2 s or none.
    :param announce: casts this host's state to a topic; the answer to a fanout ``announce``.
    :param observer: sees every step (the kill harness).
    :param on_end: told kind, final state and seconds of every operation.
    :param on_commit: told the seconds of every journal commit.
    :raises InvalidCommand: the host's name cannot be a worker's.
    """

    def __init__(
        self,
        settings: Settings,
        driver: ComputeDriver,
        peers: Peers,
        quick_peers: Peers | None = None,
        *,
        announce: Callable[[str, HostState], None] | None = None,
        observer: Observer | None = None,
        on_end: Callable[[str, str, float], None] | None = None,
        on_commit: Callable[[float], None] | None = None,
    ) -> None:
        objects.decode(settings.host, objects.HostName, "[compute] host")
        path = Path(settings.compute.state_path)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        schemas = (
            SCHEMA, store_module.SCHEMA, claims_module.SCHEMA, moves_module.SCHEMA, withdrawals.SCHEMA
        )  # fmt: skip
        self.database = Database(path / "journal.sqlite", schemas, on_commit)
        store = Store(self.database, settings.host)
        self.core = Core(
            settings,
            self.database,
            store,
            Claims(self.database, settings.host, settings.claims),
            driver,
            moves_module.Moves(self.database),
            peers,
            quick_peers or peers,
        )
        self._on_end = on_end
        self.operations = Operations(
            self.database,
            settings.host,
            kinds_of(self.core),
            limits_of(settings),
            max_queued=settings.compute.max_queued_operations,
            step_attempts=settings.compute.step_attempts,
            progress_interval=settings.compute.progress_interval,
            key_retention=settings.compute.key_retention,
            observer=observer,
            on_end=self._ended,
        )
        switch = HostSwitch(self.database, settings.host)
        self.recovery = recovery.Recovery(self.core, self.operations)
        self.watch = Watch(self.core, self.operations, self.recovery)
        self.lifecycle = LifecycleEndpoint(self.core, self.operations, switch)
        self.inventory = InventoryEndpoint(self.core, self.operations, switch, announce or _nobody)
        self.settler = Settler(self.core, self.operations)
        self.withdrawer = withdrawals.Withdrawer(self.core)
        self.resize = ResizeEndpoint(self.core, self.operations, switch, self.settler)
        self.live = LiveMigrationEndpoint(self.core, self.operations, switch)
        self.snapshot = SnapshotEndpoint(self.core, self.operations)
        self.doctor = DoctorEndpoint(self.core, self.operations)
        self._started = False

    @property
    def endpoints(self) -> list[object]:
        """What the RPC server is handed."""
        return [self.lifecycle, self.inventory, self.resize, self.live, self.snapshot, self.doctor]

    def on_refused(
        self,
        context: Context,
        method: str,
        instance: str | None,
        error: ComputeError,
        operation: str | None = None,
    ) -> None:
        """What the RPC server tells of a cast that was refused: recorded and notified."""
        self.operations.refuse(context, method, instance, error, operation)

    def live_figures(self) -> dict[str, Any]:
        """For metrics: live migrations that go on from here, and how long guests stood still in those that ended."""
        running = self.operations.progress_of(live_source.METHOD)
        return {
            "migrations": [(instance or "", progress.detail) for instance, progress in running],
            "downtimes": self.core.downtimes.cumulative(),
        }

    def start(self) -> None:
        """Open the hypervisor, compare, and go on with every open operation. Commands may come when this returns.

        :raises Broken: the driver cannot work on this host at all.
        """
        self.core.driver.init_host(self.core.host)
        self.watch.start()
        self.watch.compared.wait(timeout=1.0)
        count = self.operations.start()
        self.settler.start()
        self.withdrawer.start()
        self._started = True
        LOG.info("host %s: %d operations go on; journal %s", self.core.host, count, self.database.journal_id)

    def stop(self, timeout: float) -> bool:
        """Let short steps end, leave the rest to the journal. Returns whether all ended within ``timeout`` seconds.

        Nothing is lost either way. Call it after the RPC server has stopped.
        """
        deadline = time.monotonic() + timeout
        ended = self.operations.stop(timeout)
        self.settler.stop(max(0.1, deadline - time.monotonic()))
        self.withdrawer.stop(max(0.1, deadline - time.monotonic()))
        self.watch.stop(max(0.1, deadline - time.monotonic()))
        closer = threading.Thread(target=self.core.driver.cleanup_host, daemon=True)
        closer.start()
        closer.join(max(0.1, deadline - time.monotonic()))
        self.database.close()
        return ended

    def _ended(self, kind: str, instance: str | None, state: str, seconds: float) -> None:
        if instance is not None:
            self.operations.wake(instance)
            self.watch.look_at(instance)
        if self._on_end is not None:
            self._on_end(kind, state, seconds)


def limits_of(settings: Settings) -> dict[str, int]:
    """How many operations of each class run at once."""
    options = settings.compute
    return {
        "build": options.max_concurrent_builds,
        "delete": options.max_concurrent_deletes,
        "power": options.max_concurrent_power,
        "outbound": options.max_concurrent_outbound,
        "inbound": options.max_concurrent_inbound,
        "snapshot": options.max_concurrent_snapshots,
    }


def _nobody(topic: str, state: HostState) -> None:
    """Nobody is told."""
