"""What is here, how far it is, and the commands that only write a row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from compute_worker import errors, objects
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.manager.lifecycle import Expiry
from compute_worker.messages import Context, command, query
from compute_worker.objects import (
    Accepted,
    Diagnostics,
    ExternalEvent,
    HostName,
    HostState,
    Instance,
    Name,
    Operation,
    Seconds,
    Uuid,
)
from compute_worker.operations.database import Tx
from compute_worker.operations.service import Operations
from compute_worker.version import worker_version

Seq = Annotated[int, Meta(ge=0)]
TailBytes = Annotated[int, Meta(ge=1, le=1_048_576)]
LONGEST_WAIT = 60.0


class InventoryEndpoint:
    """Queries, and commands that are done by accepting them.

    :param announce: casts ``host_announced`` with this host's state to a topic.
    """

    def __init__(
        self, core: Core, operations: Operations, switch: HostSwitch, announce: Callable[[str, HostState], None]
    ) -> None:
        self._core = core
        self._operations = operations
        self._switch = switch
        self._announce = announce
        self._started_at = time.time()
        self._waits = threading.BoundedSemaphore(core.settings.rpc.max_waiting_queries)

    # --- queries ------------------------------------------------------------------------------------------------

    @query
    def list_instances(self, context: Context, since: Seq | None = None) -> list[Instance]:
        """Instances this host owns. With ``since``: what changed after that ``seq``, deleted ones included."""
        return self._core.store.list(since)

    @query
    def get_instance(self, context: Context, instance: Uuid) -> Instance:
        """One instance; ``InstanceMoved`` says where it went."""
        return self._core.store.get(instance)

    @query
    def get_operation(self, context: Context, operation: Uuid, wait: Seconds = 0) -> Operation:
        """One operation with its steps; ``wait`` up to 60 seconds for its outcome (few may wait at once)."""
        if not wait:
            return self._operations.get(operation)
        if not self._waits.acquire(blocking=False):
            most = self._core.settings.rpc.max_waiting_queries
            raise errors.HostFull(host=self._core.host, running=most, limit=most, queued=0)
        try:
            return self._operations.get(operation, min(wait, LONGEST_WAIT))
        finally:
            self._waits.release()

    @query
    def list_operations(
        self, context: Context, since: Seq | None = None, instance: Uuid | None = None, open_only: bool = False
    ) -> list[Operation]:
        """Operations in order of change after ``since``, without their steps; at most 1,000 in one answer."""
        return self._operations.list(since, instance, open_only)

    @query
    def get_host_state(self, context: Context) -> HostState:
        """What a scheduler wants to know of this host."""
        return self.host_state()

    @query
    def get_console_output(self, context: Context, instance: Uuid, tail_bytes: TailBytes = 65_536) -> str:
        """The end of what the guest wrote to its serial console. Hostile text: bytes that are no UTF-8 and control
        characters other than tab and newline come escaped."""
        record = self._core.store.get(instance)
        size = min(tail_bytes, self._core.settings.compute.max_console_bytes)
        return printable(self._core.driver.get_console_output(record, size))

    @query
    def get_diagnostics(self, context: Context, instance: Uuid) -> Diagnostics:
        """What the hypervisor measures of the guest."""
        return self._core.driver.get_diagnostics(self._core.store.get(instance))

    @query
    def announce(self, context: Context, reply_topic: HostName) -> None:
        """Cast ``host_announced`` to ``reply_topic``: how a caller finds hosts. Sent as fanout."""
        self._announce(reply_topic, self.host_state())

    def host_state(self) -> HostState:
        """Resources, switch, hypervisor and clock of this host."""
        usage = self._core.claims.usage()
        found = self._core.claims.found
        waiting, running = self._operations.counts()
        reason = self._switch.reason()
        return HostState(
            host=self._core.host,
            enabled=reason is None,
            disabled_reason=reason,
            vcpus=usage["vcpus"],
            memory_mb=usage["memory_mb"],
            disk_gb=usage["disk_gb"],
            instances=len(self._core.store.list()),
            operations=waiting + sum(running.values()),
            hypervisor_type=found.hypervisor_type if found else "",
            hypervisor_version=found.hypervisor_version if found else 0,
            hypervisor_up=self._core.driver.available,
            cpu_model=found.cpu_model if found else "",
            machine_arch=found.machine_arch if found else "",
            instances_id=found.instances_id if found else "",
            worker_version=worker_version(),
            journal_id=self._core.database.journal_id,
            started_at=self._started_at,
            time=time.time(),
        )

    # --- commands -----------------------------------------------------------------------------------------------

    @command
    def external_instance_event(
        self,
        context: Context,
        instance: Uuid,
        events: list[ExternalEvent],
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Tell what happened to an instance elsewhere (``network-vif-plugged``, tag = vif id). Kept until somebody
        waits for it or the instance goes."""

        def admit(tx: Tx) -> bool:
            self._core.store.require(tx, instance)
            for event in events:
                self._core.store.add_event(tx, instance, event)
            return True

        wish = Wish(operation, expires_at, check_only)
        answer = self._accept(context, "external_instance_event", wish, admit, instance, events=objects.encode(events))
        self._operations.wake(instance)
        return answer

    @command
    def cancel_operation(
        self,
        context: Context,
        cancel: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """End an operation before its COMMIT and undo it. One that this host never saw is refused when it comes."""
        rows: list[int] = []

        def admit(tx: Tx) -> bool:
            rows.extend(self._operations.cancel(tx, cancel))
            return True

        wish = Wish(operation, expires_at, check_only)
        answer = self._accept(context, "cancel_operation", wish, admit, cancel=cancel)
        if not check_only:
            self._operations.interrupt(rows)
        return answer

    @command
    def disable_host(
        self,
        context: Context,
        reason: Name = "",
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Take no new instances, also after a restart, until ``enable_host``."""

        def admit(tx: Tx) -> bool:
            self._switch.disable(tx, reason)
            return True

        return self._accept(context, "disable_host", Wish(operation, expires_at, check_only), admit, reason=reason)

    @command
    def enable_host(
        self,
        context: Context,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Take new instances again."""

        def admit(tx: Tx) -> bool:
            self._switch.enable(tx)
            return True

        return self._accept(context, "enable_host", Wish(operation, expires_at, check_only), admit)

    def _accept(
        self,
        context: Context,
        kind: str,
        wish: Wish,
        admit: Callable[[Tx], bool],
        instance: str | None = None,
        **args: object,
    ) -> Accepted:
        return accept(self._operations, context, kind, wish, admit, instance=instance, args=args)


def printable(raw: bytes) -> str:
    """Console bytes as text that no terminal obeys: escapes and other control characters are spelled out."""
    text = raw.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    return "".join(c if c in "\t\n" or c.isprintable() else repr(c)[1:-1] for c in text)
