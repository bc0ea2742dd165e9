"""Two embedded hosts with a few instances, raw messages to them, and everything that a bad one must leave alone."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import msgspec
import oslo_messaging

from compute_worker import errors
from compute_worker.embedded import EmbeddedCell
from compute_worker.objects import Accepted, Flavor, ImageMeta, Instance, Operation, decode
from compute_worker.rpc.client import local
from compute_worker.rpc.transport import calmed, get_transport
from compute_worker.states import OperationState
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated.host import SimulatedHost
from compute_worker.virt.simulated.images import QCOW2_MAGIC
from compute_worker.worker import Worker
from tests.waiting import wait_for

U = "00000000-0000-4000-8000-{:012d}"
ACTIVE, STOPPED, ELSEWHERE, DELETED, NOWHERE, FRESH = (U.format(n) for n in range(1, 7))
"""On node1: running, stopped. On node2: running. On node1: deleted. Never heard of. For a new one."""
CANCELLED = U.format(99)
"""An operation that was cancelled before it came."""
IMAGES = {
    "img": b"root file system",
    "fresh": b"no instance uses it, so that no host has it",
    "liar": QCOW2_MAGIC + b"\0" * 60,
    "big": QCOW2_MAGIC + b"\0" * 20 + (4 << 30).to_bytes(8, "big") + b"\0" * 40,
}
TABLES = ("instances", "claims", "events", "tombstones", "departed", "inbox", "meta")
JOURNAL = ("operations", "steps", "sequence")


def plain(uuid_: str = FRESH, **changes: Any) -> dict[str, Any]:
    """An instance as a caller writes it."""
    base = Instance(uuid=uuid_, flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1), image=ImageMeta(id="img"))
    return {"uuid": uuid_, "flavor": msgspec.to_builtins(base.flavor), "image": {"id": "img"}} | changes


class Heard:
    """A listener of notifications."""

    def __init__(self, transport: Any, topic: str, exchange: str) -> None:
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        self._transport = transport
        target = oslo_messaging.Target(topic=topic, exchange=exchange)
        self._server = oslo_messaging.get_notification_listener(transport, [target], [self], executor="threading")

    def info(self, context: Any, publisher: str, event_type: str, payload: dict[str, Any], metadata: Any) -> None:
        self.seen.append(("INFO", event_type, payload))

    def error(self, context: Any, publisher: str, event_type: str, payload: dict[str, Any], metadata: Any) -> None:
        self.seen.append(("ERROR", event_type, payload))

    def of(self, operation: str) -> list[tuple[str, str, dict[str, Any]]]:
        return [said for said in list(self.seen) if said[2].get("operation") == operation]

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()
        self._server.wait()
        self._transport.cleanup()


class WatchedCell(EmbeddedCell):
    """``with WatchedCell(directory) as cell``: two hosts, notifications heard. Messages go to the first, ``here``.

    Two cells of one process need different names: simulated hosts are found by name.
    """

    def __init__(self, directory: Path, here: str = "node1", there: str = "node2", **groups: dict[str, Any]) -> None:
        super().__init__([here, there], directory, **groups)
        self.here, self.there = here, there
        for name, data in IMAGES.items():
            (directory / "images" / name).write_bytes(data)
        topic = self.settings[here].telemetry.notification_topic
        self.heard = Heard(get_transport(self.url, exchange=self.exchange), topic, self.exchange)

    def __enter__(self) -> WatchedCell:
        super().__enter__()
        self.heard.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.heard.stop()
        super().__exit__(*exc)

    def populate(self) -> None:
        for uuid_, host in ((ACTIVE, self.here), (STOPPED, self.here), (ELSEWHERE, self.there), (DELETED, self.here)):
            self.done("build_and_run_instance", {"instance": plain(uuid_)}, host)
        self.done("stop_instance", {"instance": STOPPED, "clean_shutdown": False})
        self.done("terminate_instance", {"instance": DELETED})
        self.done("cancel_operation", {"cancel": CANCELLED})

    def call(self, method: str, args: dict[str, Any], host: str | None = None, version: str = "1.0") -> Any:
        """A call with arguments as they are; what the worker raised is raised."""
        prepared = self.api._client.prepare(server=host or self.here, version=version, timeout=30)
        if self.transport._driver._reply_q is None:
            self.transport._driver._get_reply_q()
            calmed(self.transport._driver._reply_q_conn.connection)
        try:
            return prepared.call({"request_id": "req-bad"}, method, **args)
        except errors.ComputeError as exc:
            raise local(exc) from None

    def cast(self, method: str, args: dict[str, Any], host: str | None = None, version: str = "1.0") -> None:
        prepared = self.api._client.prepare(server=host or self.here, version=version)
        prepared.cast({"request_id": "req-bad"}, method, **args)

    def done(self, method: str, args: dict[str, Any], host: str | None = None) -> Operation:
        """A command, and its end."""
        accepted: Accepted = decode(self.call(method, args, host), Accepted, method)
        assert accepted.operation is not None
        ended = self.api.get_operation(accepted.operation, 20, host=host or self.here)
        assert ended.state is OperationState.DONE, ended
        return ended

    def recorded(self, operation: str) -> Operation:
        """The record of a cast, once there is one."""

        def look() -> Operation | None:
            try:
                return self.api.get_operation(operation, host=self.here)
            except errors.OperationNotFound:
                return None

        return wait_for(look, what="the record of the cast")

    def simulated(self) -> SimulatedHost:
        driver = self.workers[self.here].manager.core.driver
        assert isinstance(driver, FakeDriver)
        return driver.simulated

    def state(self, *, journal: bool = True) -> dict[str, Any]:
        """All that both hosts know and hold, and every file of theirs by name."""
        found: dict[str, Any] = {name: _of(worker, journal) for name, worker in self.workers.items()}
        found["files"] = sorted(str(p) for p in self.directory.rglob("*") if not p.name.endswith(("-wal", "-shm")))
        return found

    def settle(self) -> None:
        """Until no operation is open, every record agrees with its guest, and all that is to be told was heard."""

        def quiet() -> bool:
            return all(
                w.manager.operations.counts() == (0, {})
                and not w.manager.operations.inbox.open()
                and all(i.task_state is None for i in w.manager.core.store.list())
                for w in self.workers.values()
            )

        def told(tx: Any) -> int:
            sql = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'outbox'"
            return int(tx.execute(sql).fetchone()[0])

        def heard() -> bool:
            ever = sum(w.manager.database.read(told) for w in self.workers.values())
            return sum(event != "host.state" for _, event, _ in list(self.heard.seen)) == ever

        wait_for(quiet, what="both hosts to be at rest")
        wait_for(heard, what="every notification")


def _of(worker: Worker, journal: bool) -> dict[str, Any]:
    names = TABLES + (JOURNAL if journal else ())

    def rows(tx: Any) -> dict[str, Any]:
        return {name: [tuple(row) for row in tx.execute(f"SELECT * FROM {name}")] for name in names}

    driver = worker.manager.core.driver
    assert isinstance(driver, FakeDriver)
    host = driver.simulated
    with host.cell.lock:
        simulated = (msgspec.json.encode(host.slots), msgspec.json.encode(host.base), dict(host.effects))
    return {**worker.manager.database.read(rows), "simulated": simulated, "threads": _workers()}


def _workers() -> int:
    return sum(thread.name.startswith("op-") for thread in threading.enumerate())


def new_uuid() -> str:
    return str(uuid.uuid4())
