"""The messages that make, end and power an instance. Each method checks, accepts in one commit, and answers."""

from __future__ import annotations

import time
from typing import Annotated

from msgspec import Meta

from compute_worker import errors, objects
from compute_worker.manager import build, delete, power
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.manager.hostswitch import HostSwitch
from compute_worker.messages import Context, command
from compute_worker.objects import Accepted, InjectedFile, Instance, Seconds, Text, Uuid
from compute_worker.operations.database import Tx
from compute_worker.operations.service import Operations
from compute_worker.virt.driver import SpawnRequest

Expiry = Annotated[float, Meta(ge=0, description="seconds since the epoch")]
RebootType = Annotated[str, Meta(pattern=r"^(SOFT|HARD)\Z")]
MOST_INJECTED_BYTES = 65_536


class LifecycleEndpoint:
    """Commands for one instance. Every one answers ``Accepted`` as soon as its operation is on disk."""

    def __init__(self, core: Core, operations: Operations, switch: HostSwitch) -> None:
        self._core = core
        self._operations = operations
        self._switch = switch

    @command
    def build_and_run_instance(
        self,
        context: Context,
        instance: Instance,
        injected_files: list[InjectedFile] = [],  # noqa: B006
        admin_password: Text | None = None,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Make the instance on this host and run it. Undone as a whole when any step fails before its COMMIT.

        Refused with ``reschedulable``: the host is disabled, has not enough room, or too much to do.
        """
        newborn = build.newborn(instance, self._core.host)
        if sum(len(f.content_base64) for f in injected_files) > MOST_INJECTED_BYTES:
            raise errors.InvalidCommand(
                method="build_and_run_instance", problem=f"injected_files exceed {MOST_INJECTED_BYTES} bytes"
            )
        build.check(self._core, newborn, SpawnRequest(injected_files, admin_password))
        default = time.time() + self._core.settings.compute.command_expiry_build

        def admit(tx: Tx) -> bool:
            self._switch.require_enabled(tx)
            return build.admit(self._core, tx, newborn)

        args = {
            "instance": objects.encode(newborn),
            "injected_files": objects.encode(injected_files),
            "admin_password": admin_password,
        }
        wish = Wish(operation, default if expires_at is None else expires_at, check_only)
        return accept(
            self._operations, context, "build_and_run_instance", wish, admit, instance=instance.uuid, args=args
        )

    @command
    def terminate_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """End the instance and remove everything of it. Accepted for any uuid, which is never used again; it cancels
        whatever runs on the instance and is tried until it is done."""
        wish = Wish(operation, expires_at, check_only)
        return accept(
            self._operations,
            context,
            "terminate_instance",
            wish,
            lambda tx: delete.admit(self._core, tx, instance),
            instance=instance,
        )

    @command
    def start_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Start a stopped (or crashed) instance from its disks."""
        return self._power(context, "start_instance", instance, Wish(operation, expires_at, check_only))

    @command
    def stop_instance(
        self,
        context: Context,
        instance: Uuid,
        clean_shutdown: bool = True,
        shutdown_timeout: Seconds | None = None,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Stop the instance: asked by ACPI, again and again, for ``shutdown_timeout`` seconds (the host's default
        where absent), then powered off. ``clean_shutdown=False``: powered off at once."""
        return self._power(
            context,
            "stop_instance",
            instance,
            Wish(operation, expires_at, check_only),
            clean_shutdown=clean_shutdown,
            shutdown_timeout=shutdown_timeout,
        )

    @command
    def reboot_instance(
        self,
        context: Context,
        instance: Uuid,
        reboot_type: RebootType = "SOFT",
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Restart the guest. SOFT asks it and falls back to HARD, which pulls the plug and defines it anew."""
        kind = "reboot_instance" if reboot_type == "SOFT" else "reboot_instance_hard"
        return self._power(
            context,
            kind,
            instance,
            Wish(operation, expires_at, check_only),
            message="reboot_instance",
            reboot_type=reboot_type,
        )

    @command
    def pause_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Stop the guest's processors; its memory stays."""
        return self._power(context, "pause_instance", instance, Wish(operation, expires_at, check_only))

    @command
    def unpause_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Let a paused guest go on."""
        return self._power(context, "unpause_instance", instance, Wish(operation, expires_at, check_only))

    @command
    def suspend_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Save the guest's memory to disk and stop it."""
        return self._power(context, "suspend_instance", instance, Wish(operation, expires_at, check_only))

    @command
    def resume_instance(
        self,
        context: Context,
        instance: Uuid,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Start a suspended guest from its saved memory."""
        return self._power(context, "resume_instance", instance, Wish(operation, expires_at, check_only))

    def _power(
        self,
        context: Context,
        kind: str,
        instance: str,
        wish: Wish,
        *,
        message: str | None = None,
        **args: float | str | None,
    ) -> Accepted:
        return accept(
            self._operations,
            context,
            kind,
            wish,
            lambda tx: power.admit(self._core, tx, instance, kind),
            instance=instance,
            args=args,
            message=message,
        )
