"""How a scheduler, a conductor or a peer speaks to a worker: one typed method per message.

::

    api = ComputeAPI(get_transport("rabbit://user:password@broker:5672/vhost"))
    accepted = api.build_and_run_instance(instance, host="node1")
    outcome = api.get_operation(accepted.operation, wait=30, host="node1")

Every command takes four options (:class:`CommandOptions`). Errors are those of :mod:`compute_worker.errors`, as the
worker raised them; :class:`~compute_worker.errors.PeerUnavailable` and
:class:`~compute_worker.errors.MessageUndeliverable` come from here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Unpack

import oslo_messaging
from kombu.exceptions import OperationalError
from oslo_messaging.exceptions import MessageDeliveryFailure, MessagingException, MessagingTimeout
from oslo_messaging.exceptions import MessageUndeliverable as Undeliverable
from oslo_messaging.rpc.client import RemoteError

from compute_worker import errors, logcontext, objects
from compute_worker.objects import (
    Accepted,
    Diagnostics,
    DiskInfo,
    ExternalEvent,
    Finding,
    HostState,
    InjectedFile,
    Instance,
    MigrateData,
    Migration,
    MigrationState,
    Operation,
    OperationAnswer,
)
from compute_worker.rpc import transport as transports
from compute_worker.rpc import wire
from compute_worker.rpc.client_images import ImagesAPI
from compute_worker.rpc.options import CommandOptions
from compute_worker.rpc.since import SINCE

T = TypeVar("T")

BUILD_EXPIRY_SECONDS = 3600.0


class ComputeAPI(ImagesAPI):
    """The messages of a worker. Thread-safe; one per process is enough.

    :param transport: from :func:`compute_worker.rpc.transport.get_transport`.
    :param version_cap: highest version of the messages that every host addressed understands (``1.x``).
    :param timeout: seconds to wait for an answer.
    :param call_monitor_timeout: seconds a long call may be silent; the worker says that it lives twice as often.
    :param retry: how often a broker that cannot be reached is tried again (about 2 s each) before PeerUnavailable.
    :param identity: ``user_id`` and ``project_id`` to send along, for logs and notifications.

    :raises compute_worker.errors.MessageUndeliverable: no worker ever listened as that host (any method).
    :raises compute_worker.errors.PeerUnavailable: no answer; whether the command was accepted is not known: send it
        again with the same ``operation`` (any method).
    """

    def __init__(
        self,
        transport: Any,
        *,
        exchange: str = "compute_worker",
        topic: str = "compute",
        version_cap: str | None = None,
        timeout: float = 60.0,
        call_monitor_timeout: int = 10,
        retry: int = 2,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self._transport = transport
        self._exchange = exchange
        self._topic = topic
        self._version_cap = version_cap
        self._timeout = timeout
        self._call_monitor_timeout = call_monitor_timeout
        self._retry = retry
        self._identity = dict(identity or {})
        target = oslo_messaging.Target(exchange=exchange, topic=topic)
        mandatory = oslo_messaging.TransportOptions(at_least_once=True)
        self._client = oslo_messaging.get_rpc_client(transport, target, retry=retry, transport_options=mandatory)
        self._broadcaster = oslo_messaging.get_rpc_client(transport, target, retry=retry)

    def build_and_run_instance(
        self,
        instance: Instance,
        injected_files: Sequence[InjectedFile] = (),
        admin_password: str | None = None,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Make a new instance on ``host`` and run it."""
        if "expires_at" not in options:
            options["expires_at"] = time.time() + BUILD_EXPIRY_SECONDS
        args = {"instance": instance, "injected_files": list(injected_files), "admin_password": admin_password}
        return self._command(host, "build_and_run_instance", options, args)

    def terminate_instance(self, instance: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """End an instance and remove everything of it. Accepted for any uuid, by any host."""
        return self._command(host, "terminate_instance", options, {"instance": instance})

    def start_instance(self, instance: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Start a stopped instance."""
        return self._command(host, "start_instance", options, {"instance": instance})

    def stop_instance(
        self,
        instance: str,
        clean_shutdown: bool = True,
        shutdown_timeout: float | None = None,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Stop an instance: it is asked for ``shutdown_timeout`` seconds, then powered off."""
        args = {"instance": instance, "clean_shutdown": clean_shutdown, "shutdown_timeout": shutdown_timeout}
        return self._command(host, "stop_instance", options, args)

    def reboot_instance(
        self,
        instance: str,
        reboot_type: Literal["SOFT", "HARD"] = "SOFT",
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Restart the guest: SOFT asks it first, HARD pulls the plug."""
        return self._command(host, "reboot_instance", options, {"instance": instance, "reboot_type": reboot_type})

    def pause_instance(self, instance: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Stop the guest's processors; its memory stays."""
        return self._command(host, "pause_instance", options, {"instance": instance})

    def unpause_instance(self, instance: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Let a paused guest go on."""
        return self._command(host, "unpause_instance", options, {"instance": instance})

    def suspend_instance(self, instance: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Save the guest's memory to disk and stop it."""
        return self._command(host, "suspend_instance", options, {"instance": instance})

    def resume_instance(self, instance: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Start a suspended guest from its saved memory."""
        return self._command(host, "resume_instance", options, {"instance": instance})

    def external_instance_event(
        self, instance: str, events: Sequence[ExternalEvent], *, host: str, **options: Unpack[CommandOptions]
    ) -> Accepted:
        """Tell what happened to an instance elsewhere, such as ``network-vif-plugged``."""
        args = {"instance": instance, "events": list(events)}
        return self._command(host, "external_instance_event", options, args)

    def disable_host(self, reason: str = "", *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Let ``host`` take no new instances, also after its restart."""
        return self._command(host, "disable_host", options, {"reason": reason})

    def enable_host(self, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Let ``host`` take new instances again."""
        return self._command(host, "enable_host", options, {})

    def cancel_operation(self, cancel: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """End operation ``cancel`` before its COMMIT and undo it; if ``host`` never saw it, it never will."""
        return self._command(host, "cancel_operation", options, {"cancel": cancel})

    def prep_resize(
        self,
        instance: Instance,
        migration: Migration,
        clean_shutdown: bool = True,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Move an instance to ``host`` (``migration.dest_host``), with ``migration.new_flavor`` where given."""
        if options.get("expires_at") is None:
            options["expires_at"] = time.time() + BUILD_EXPIRY_SECONDS
        args = {"instance": instance, "migration": migration, "clean_shutdown": clean_shutdown}
        return self._command(host, "prep_resize", options, args)

    def confirm_resize(
        self, instance: str, migration: str, *, host: str, **options: Unpack[CommandOptions]
    ) -> Accepted:
        """Keep a resized instance where it is; ``host``: the source or the destination."""
        return self._command(host, "confirm_resize", options, {"instance": instance, "migration": migration})

    def revert_resize(
        self, instance: str, migration: str, *, host: str, **options: Unpack[CommandOptions]
    ) -> Accepted:
        """Give a resized instance back to its source as it was; ``host``: the destination."""
        return self._command(host, "revert_resize", options, {"instance": instance, "migration": migration})

    def take_back_instance(
        self,
        instance: str,
        migration: str,
        destination_is_off: bool = False,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Run an instance at its source again though the destination has not said no; only when it is off."""
        args = {"instance": instance, "migration": migration, "destination_is_off": destination_is_off}
        return self._command(host, "take_back_instance", options, args)

    def forget_host(self, forget: str, *, host: str, **options: Unpack[CommandOptions]) -> Accepted:
        """Let ``host`` wait no longer for host ``forget``, which never returns."""
        return self._command(host, "forget_host", options, {"forget": forget})

    def check_can_live_migrate_destination(
        self, instance: Instance, migration: Migration, disk_over_commit: bool = False, *, host: str
    ) -> MigrateData:
        """Whether a guest could move to ``host`` (``migration.dest_host``) while it runs. Changes nothing."""
        args = {"instance": instance, "migration": migration, "disk_over_commit": disk_over_commit}
        return self._query(host, "check_can_live_migrate_destination", MigrateData, args, monitored=True)

    def live_migration(
        self,
        instance: str,
        migration: Migration,
        disk_over_commit: bool = False,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Move a running guest from ``host`` to ``migration.dest_host``."""
        if options.get("expires_at") is None:
            options["expires_at"] = time.time() + BUILD_EXPIRY_SECONDS
        args = {"instance": instance, "migration": migration, "disk_over_commit": disk_over_commit}
        return self._command(host, "live_migration", options, args)

    def live_migration_abort(
        self, instance: str, migration: str, *, host: str, **options: Unpack[CommandOptions]
    ) -> Accepted:
        """Stop a live migration; ``host``: the source."""
        return self._command(host, "live_migration_abort", options, {"instance": instance, "migration": migration})

    def live_migration_force_complete(
        self,
        instance: str,
        migration: str,
        how: Literal["postcopy", "pause"] = "pause",
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Finish a live migration at the guest's expense; ``host``: the source."""
        args = {"instance": instance, "migration": migration, "how": how}
        return self._command(host, "live_migration_force_complete", options, args)

    def get_hypervisor(self, *, host: str) -> dict[str, Any]:
        """What the hypervisor of ``host`` is."""
        return self._query(host, "get_hypervisor", dict[str, Any], {})

    def check_can_live_migrate_source(
        self, instance: Instance, migration: Migration, data: MigrateData, *, host: str
    ) -> MigrateData:
        """A worker's, at the destination, to the source."""
        args = {"instance": instance, "migration": migration, "data": data}
        return self._query(host, "check_can_live_migrate_source", MigrateData, args, monitored=True)

    def pre_live_migration(
        self,
        instance: Instance,
        migration: Migration,
        data: MigrateData,
        disk_info: DiskInfo,
        journal_id: str = "",
        operation: str | None = None,
        *,
        host: str,
    ) -> MigrateData:
        """A worker's, at the source, to the destination: prepare. Long; asked again it goes on."""
        args = {
            "instance": instance,
            "migration": migration,
            "data": data,
            "disk_info": disk_info,
            "journal_id": journal_id,
            "operation": operation,
        }
        return self._query(host, "pre_live_migration", MigrateData, args, monitored=True, extra=60)

    def resize_instance(
        self,
        instance: str,
        migration: Migration,
        clean_shutdown: bool = True,
        machine_arch: str = "",
        journal_id: str = "",
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """A worker's, at the destination, to the source: begin."""
        args = {
            "instance": instance,
            "migration": migration,
            "clean_shutdown": clean_shutdown,
            "machine_arch": machine_arch,
            "journal_id": journal_id,
        }
        return self._command(host, "resize_instance", options, args)

    def finish_resize(
        self,
        instance: Instance,
        migration: Migration,
        disk_info: DiskInfo,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """A worker's, at the source, to the destination: everything is there."""
        args = {"instance": instance, "migration": migration, "disk_info": disk_info}
        return self._command(host, "finish_resize", options, args)

    def finish_revert_resize(
        self, instance: str, migration: str, attempt: int = 1, *, host: str, **options: Unpack[CommandOptions]
    ) -> Accepted:
        """A worker's, at the destination, to the source: bring back what was set aside."""
        args = {"instance": instance, "migration": migration, "attempt": attempt}
        return self._command(host, "finish_revert_resize", options, args)

    def settle_operation(
        self, message: str, instance: str, settle: str, attempt: int = 1, revoke: bool = False, *, host: str
    ) -> OperationAnswer:
        """What became of a command at ``host``; one that never came is refused from now on."""
        args = {"message": message, "instance": instance, "settle": settle, "attempt": attempt, "revoke": revoke}
        return self._query(host, "settle_operation", OperationAnswer, args)

    def get_migration(self, migration: str, side: str = "destination", *, host: str) -> MigrationState:
        """One side of a move, as ``host`` knows it."""
        return self._query(host, "get_migration", MigrationState, {"migration": migration, "side": side})

    def list_migrations(self, open_only: bool = True, *, host: str) -> list[MigrationState]:
        """The sides of moves that ``host`` has."""
        return self._query(host, "list_migrations", list[MigrationState], {"open_only": open_only})

    def answer_peer(self, migration: str, request: dict[str, Any], *, host: str) -> dict[str, Any]:
        """A question of one host's driver to another's."""
        args = {"migration": migration, "request": request}
        return self._query(host, "answer_peer", dict[str, Any], args, monitored=True)

    def peer_changed(self, instance: str, *, host: str) -> None:
        """Something about an instance has changed here. Nobody waits for an answer."""
        self._send(self._prepare(host, "peer_changed"), host, "peer_changed", {"instance": instance}, cast=True)

    def list_leftovers(self, *, host: str) -> list[Finding]:
        """What ``host`` has that belongs to nobody, and what waits there."""
        return self._query(host, "list_leftovers", list[Finding], {}, monitored=True)

    def repair_leftovers(
        self, instance: str | None = None, *, host: str, **options: Unpack[CommandOptions]
    ) -> Accepted:
        """Remove what is left over of an instance where that is safe; without one, stale image locks."""
        return self._command(host, "repair_leftovers", options, {"instance": instance})

    def get_console_output(self, instance: str, tail_bytes: int = 65_536, *, host: str) -> str:
        """The end of the guest's serial console."""
        args = {"instance": instance, "tail_bytes": tail_bytes}
        return self._query(host, "get_console_output", str, args, monitored=True)

    def get_diagnostics(self, instance: str, *, host: str) -> Diagnostics:
        """What the hypervisor measures of the guest."""
        return self._query(host, "get_diagnostics", Diagnostics, {"instance": instance}, monitored=True)

    def list_instances(self, since: int | None = None, *, host: str) -> list[Instance]:
        """Instances of ``host``; with ``since``: what changed after that ``seq``, deleted ones included."""
        return self._query(host, "list_instances", list[Instance], {"since": since})

    def get_instance(self, instance: str, *, host: str) -> Instance:
        """One instance; InstanceMoved says where it went."""
        return self._query(host, "get_instance", Instance, {"instance": instance})

    def get_operation(self, operation: str, wait: float = 0, *, host: str) -> Operation:
        """One operation with its steps; waits up to ``wait`` seconds for its outcome."""
        args = {"operation": operation, "wait": wait}
        return self._query(host, "get_operation", Operation, args, monitored=wait > 0, extra=wait)

    def list_operations(
        self, since: int | None = None, instance: str | None = None, open_only: bool = False, *, host: str
    ) -> list[Operation]:
        """Operations in order of change after ``since``, without their steps."""
        args = {"since": since, "instance": instance, "open_only": open_only}
        return self._query(host, "list_operations", list[Operation], args)

    def get_host_state(self, *, host: str) -> HostState:
        """Resources, switch, hypervisor and clock of ``host``."""
        return self._query(host, "get_host_state", HostState, {})

    def announce(self, reply_topic: str) -> None:
        """Ask every host to cast ``host_announced(state)`` to ``reply_topic``; see
        :func:`compute_worker.rpc.discovery.find_hosts`."""
        everybody = self._broadcaster.prepare(topic=self._exchange, fanout=True, version=self._version("announce"))
        self._send(everybody, "*", "announce", {"reply_topic": reply_topic}, cast=True)

    def host_announced(self, reply_topic: str, state: HostState) -> None:
        """Answer :meth:`announce`. Nobody listening is not an error: whoever asked has heard enough."""
        prepared = self._broadcaster.prepare(topic=reply_topic, version=objects.RPC_VERSION)
        self._send(prepared, reply_topic, "host_announced", {"state": state}, cast=True)

    def _command(self, host: str, method: str, options: CommandOptions, args: dict[str, Any]) -> Accepted:
        operation = options.get("operation") or str(uuid.uuid4())
        check_only, cast = options.get("check_only", False), options.get("cast", False)
        if check_only and cast:
            raise errors.InvalidCommand(method=method, problem="check_only asks for an answer: it cannot be cast")
        args |= {"operation": operation, "expires_at": options.get("expires_at"), "check_only": check_only}
        prepared = self._prepare(host, method)
        if not cast:
            return objects.decode(self._send(prepared, host, method, args), Accepted, method)
        self._send(prepared, host, method, args, cast=True)
        return Accepted(operation=operation, host=host)

    def _query(
        self, host: str, method: str, type_: type[T], args: dict[str, Any], *, monitored: bool = False, extra: float = 0
    ) -> T:
        prepared = self._prepare(host, method, monitored, extra)
        return objects.decode(self._send(prepared, host, method, args), type_, method)

    def _prepare(self, host: str, method: str, monitored: bool = False, extra: float = 0) -> Any:
        objects.decode(host, objects.HostName, f"{method}: host")
        return self._client.prepare(
            server=host,
            version=self._version(method),
            timeout=self._timeout + extra,
            call_monitor_timeout=self._call_monitor_timeout if monitored else None,
        )

    def _version(self, method: str) -> str:
        version = SINCE.get(method, "1.0")
        if self._version_cap is not None and not wire.compatible(version, self._version_cap):
            raise errors.NotSupported(
                what=f"{method} (version {version}, this client is pinned to {self._version_cap})"
            )
        return version

    def _send(self, prepared: Any, host: str, method: str, args: dict[str, Any], cast: bool = False) -> Any:
        context = self._identity | {"request_id": logcontext.current().request_id or logcontext.new_request_id()}
        send = prepared.cast if cast else prepared.call
        encoded = {name: objects.encode(value) for name, value in args.items()}
        key = f"{self._topic}.{host}"
        if prepared.target.server and not transports.has_queue(self._transport, self._exchange, key):
            raise errors.MessageUndeliverable(host=host)
        try:
            if not cast:
                transports.open_replies(self._transport, self._retry)
            return send(context, method, **encoded)
        except errors.ComputeError as exc:
            raise local(exc) from None
        except Undeliverable:
            raise errors.MessageUndeliverable(host=host) from None
        except MessagingTimeout:
            raise errors.PeerUnavailable(host=host) from None
        except (MessageDeliveryFailure, OperationalError, OSError) as exc:
            raise errors.PeerUnavailable(f"host {host} cannot be asked: no broker ({exc})", host=host) from None
        except RemoteError as exc:
            raise errors.ComputeError(f"host {host}: {exc.exc_type} {exc.value}") from None
        except MessagingException as exc:
            raise errors.ComputeError(f"host {host}: {exc}") from None


def local(error: errors.ComputeError) -> errors.ComputeError:
    """A rebuilt remote error as its own class: without oslo.messaging's ``_Remote`` suffix and traceback text."""
    remote = type(error).__name__.endswith("_Remote")
    return type(error).__mro__[1](error.message, **error.kwargs) if remote else error
