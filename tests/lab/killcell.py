"""Hosts of the cell under real workers that die: commands over RabbitMQ, and what became of them, from outside."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kombu
from amqp.exceptions import NotFound
from oslo_config import cfg

from compute_worker.threads import use_threads

use_threads()

from compute_worker import errors  # noqa: E402
from compute_worker.objects import Flavor, ImageMeta, Instance, Operation, Vif  # noqa: E402
from compute_worker.rpc.client import ComputeAPI  # noqa: E402
from compute_worker.rpc.transport import get_transport  # noqa: E402
from compute_worker.states import OperationState  # noqa: E402
from tests.lab import oracle  # noqa: E402
from tests.lab.cell import Cell  # noqa: E402
from tests.lab.guest_images import MEMORY_MIB, GuestImages  # noqa: E402
from tests.lab.rabbit import ADMINISTRATOR, broker_url  # noqa: E402
from tests.lab.settings import CONFIG_FILE, IMAGES_PATH  # noqa: E402
from tests.lab.worker import REPOSITORY, Config, Worker, merge_config  # noqa: E402
from tests.waiting import wait_for  # noqa: E402

HOST = "node1"
CONFIG: Mapping[str, Mapping[str, Any]] = {
    "images": {"file_path": IMAGES_PATH},
    "compute": {"shutdown_retry_interval": 1.0},
    "claims": {"reserved_host_memory_mb": 0},
}
ENDS = ("end", "error")
PATIENCE = 90.0


class Notifications:
    """What the workers of a cell notified so far, each message once."""

    def __init__(self, amqp: str) -> None:
        self._amqp = amqp
        self._said: dict[str, dict[str, Any]] = {}

    def of(self, instance: Instance) -> list[dict[str, Any]]:
        with kombu.Connection(self._amqp) as connection:
            for priority in ("info", "error"):
                queue = kombu.Queue(f"compute_notifications.{priority}", no_declare=True)
                try:
                    bound = queue(connection.channel())
                    while (message := bound.get(no_ack=True)) is not None:
                        said = json.loads(json.loads(message.body)["oslo.message"])
                        self._said[said["message_id"]] = said
                except NotFound:
                    continue
        return [said for said in self._said.values() if said["payload"].get("instance") == instance.uuid]


class KillHost:
    """A host with its worker, which is started again whenever it died, as systemd would; so are those of ``others``."""

    def __init__(
        self, cell: Cell, images: GuestImages, api: ComputeAPI, notifications: Notifications, name: str = HOST
    ) -> None:
        self.cell = cell
        self.name = name
        self.node = cell[name]
        self.api = api
        self.deaths = 0
        self.others: list[KillHost] = []
        self.mark = ""
        self._notifications = notifications
        self._worker: Worker | None = None
        self.image = ImageMeta(
            id=images.data_qcow2.name, disk_format="qcow2", os_type="linux",
            kernel_id=images.kernel.name, ramdisk_id=images.initrd.name,
        )  # fmt: skip

    # --- the worker ---------------------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "no worker was started"
        return self._worker

    def start(self, *, kill_at: str = "", hold_at: str = "", config: Config | None = None) -> None:
        """Start the worker; it dies, or waits, at these points (see ``killing_worker``)."""
        self.mark = f"/run/compute-worker/{uuid.uuid4().hex[:8]}"
        env = {"LAB_KILL_AT": kill_at, "LAB_HOLD_AT": hold_at, "LAB_MARKS": self.mark, "PYTHONPATH": str(REPOSITORY)}
        argv = [sys.executable, "-m", "tests.lab.killing_worker", "--config-file", CONFIG_FILE]
        self._worker = self.cell.start_worker(self.name, merge_config(CONFIG, config or {}), env, argv=argv)
        self.worker.wait_ready()

    def stop(self) -> None:
        """A clean stop."""
        assert self.worker.terminate() == 0
        self.cell.workers.remove(self.worker)

    def revive(self) -> None:
        """Start it again where it died; also the others'. A host that is off stays so."""
        for host in (self, *self.others):
            if not host.worker.running and host.node.ns.alive:
                host.deaths += 1
                host.worker.start()

    def wait_held(self, point: str) -> None:
        def held() -> bool:
            self.revive()
            return self.node.ns.alive and self.node.path(f"{self.mark}/{point}.held").exists()

        wait_for(held, PATIENCE, f"the worker to come to {point}")

    def release(self, point: str) -> None:
        self.node.path(f"{self.mark}/{point}.go").touch()

    def unanswered_bytes(self) -> int:
        """The most that lies unread before libvirtd on one connection."""
        lines = self.node.run("ss", "-xH", "src", "/run/libvirt/libvirt-sock").stdout.splitlines()
        return max((int(line.split()[2]) for line in lines), default=0)

    # --- commands -----------------------------------------------------------------------------------------------

    def instance(self, **changes: Any) -> Instance:
        fields: dict[str, Any] = {
            "uuid": str(uuid.uuid4()),
            "name": "lab",
            "flavor": Flavor(vcpus=1, memory_mb=MEMORY_MIB, root_gb=1, swap_mb=8),
            "image": self.image,
            "vifs": [Vif(id=str(uuid.uuid4()), mac="52:54:00:1a:b0:07", bridge="br0")],
            "config_drive": True,
            "kernel_cmdline": "quiet lab.noga",
        }
        return Instance(**(fields | changes))

    def send(self, method: str, *arguments: Any, **named: Any) -> str:
        """Send a command until it is answered, each time the same; the operation."""
        operation = str(uuid.uuid4())

        def answered() -> bool:
            self.revive()
            try:
                getattr(self.api, method)(*arguments, host=self.name, operation=operation, **named)
            except (errors.PeerUnavailable, errors.MessageUndeliverable):
                return False
            return True

        wait_for(answered, PATIENCE, f"an answer to {method}")
        return operation

    def outcome(self, operation: str, patience: float = PATIENCE) -> Operation:
        """The operation at its end; a worker that dies meanwhile is started again."""

        def ended() -> Operation | None:
            self.revive()
            try:
                found = self.api.get_operation(operation, host=self.name)
            except (errors.PeerUnavailable, errors.MessageUndeliverable):
                return None
            return found if found.state.final else None

        found = wait_for(ended, patience, f"the end of operation {operation} on {self.name}")
        assert found is not None
        return found

    def do(self, method: str, *arguments: Any, **named: Any) -> str:
        """Send a command and see it done."""
        operation = self.send(method, *arguments, **named)
        ended = self.outcome(operation)
        assert ended.state is OperationState.DONE, f"{method}: {ended}"
        return operation

    def boot(self, **changes: Any) -> tuple[Instance, str]:
        instance = self.instance(**changes)
        return instance, self.do("build_and_run_instance", instance)

    # --- the oracle ---------------------------------------------------------------------------------------------

    def console(self, instance: Instance) -> str:
        return oracle.read_console(self.node, instance.uuid)

    def wait_ticks(self, instance: Instance, count: int = 2, boot: int = 1) -> list[oracle.Boot]:
        """Until the guest has ticked ``count`` times in this boot of it."""

        def ticked() -> list[oracle.Boot] | None:
            found = oracle.boots(self.console(instance))
            return found if len(found) >= boot and len(found[boot - 1].ticks) >= count else None

        return wait_for(ticked, PATIENCE, f"{count} ticks of boot {boot} of {instance.uuid}") or []

    def assert_runs(self, instance: Instance, boot: int = 1) -> None:
        """One copy of it runs, this is its ``boot``-th boot, and its counter never jumped."""
        boots = self.wait_ticks(instance, boot=boot)
        assert [b.number for b in boots] == list(range(1, boot + 1))
        assert oracle.continuity_problems(self.console(instance)) == []
        assert oracle.where_running(self.cell.nodes.values())[instance.uuid] == [self.name]
        found = oracle.domains(self.node)[instance.uuid]
        assert (found.state, found.persistent) == ("running", True)
        record = self.api.get_instance(instance.uuid, host=self.name)
        assert (record.vm_state, record.task_state, record.power_state) == ("active", None, "running")

    def assert_gone(self) -> None:
        """Nothing of any instance is on the host, and nothing is claimed."""
        assert oracle.leftovers(self.node) == []
        assert self.api.list_instances(host=self.name) == []
        assert self.api.get_host_state(host=self.name).memory_mb.used == 0

    def notified(self, instance: Instance) -> list[dict[str, Any]]:
        """What was notified of the instance so far, each message once."""
        return self._notifications.of(instance)

    def assert_ended_once(self, instance: Instance, operation: str, end: str) -> None:
        """The operation told its end exactly once, as ``instance.<event>.end`` or ``.error``."""
        events = [f"{end.rpartition('.')[0]}.{word}" for word in ENDS]

        def ends() -> list[str]:
            return [said["event_type"] for said in self.notified(instance)
                    if said["payload"].get("operation") == operation and said["payload"]["host"] == self.name
                    and said["event_type"] in events]

        assert wait_for(ends, 20.0, f"the notification of the end of {operation}") == [end]


@contextmanager
def kill_host(cell: Cell, images: GuestImages) -> Iterator[KillHost]:
    """``node1``, its images in their store, a client on the cell's broker; no worker yet."""
    with kill_hosts(cell, images, HOST) as (host,):
        yield host


@contextmanager
def kill_hosts(cell: Cell, images: GuestImages, *names: str) -> Iterator[list[KillHost]]:
    """Hosts that are started again with each other."""
    for path in (images.kernel, images.initrd, images.data_qcow2, images.boot_qcow2):
        if not Path(cell.state, "images", path.name).exists():
            cell.add_image(path)
    relay = cell.relay()
    cfg.CONF([], project="compute-worker", default_config_files=[])
    transport = get_transport(broker_url("rabbit", ADMINISTRATOR, "127.0.0.1", relay.port, cell.rabbit.vhost))
    try:
        amqp = broker_url("amqp", ADMINISTRATOR, "127.0.0.1", relay.port, cell.rabbit.vhost)
        said, api = Notifications(amqp), ComputeAPI(transport, timeout=5.0, retry=1)
        hosts = [KillHost(cell, images, api, said, name) for name in names]
        for host in hosts:
            host.others = [other for other in hosts if other is not host]
        yield hosts
    finally:
        transport.cleanup()
        relay.close()
