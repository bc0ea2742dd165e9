"""Subcommands that move a guest while it runs, and those that steer it on its way."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from compute_worker import errors
from compute_worker.ctl import movelist
from compute_worker.ctl.chain import Chain, Follower
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit, UsageError
from compute_worker.ctl.moves import Way, accepted_before, way_of
from compute_worker.ctl.text import span
from compute_worker.errors import ComputeError, InvalidState
from compute_worker.objects import Accepted, Instance, MigrateData, Migration, Operation
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.options import CommandOptions
from compute_worker.states import OperationState, allowed

COMMAND = "live_migration"


def live_migrate(ctl: Ctl) -> Exit:
    """Move a running guest to another host; it goes on meanwhile."""
    if ctl.args.to and ctl.args.destination and ctl.args.to != ctl.args.destination:
        raise UsageError("two destinations: HOST and --to")
    ctl.args.to = ctl.args.to or ctl.args.destination
    found = ctl.find()
    source, instance = found.host, found.instance
    options = ctl.options()
    operation = options["operation"]
    again = accepted_before(ctl, operation, source)
    if again is not None:
        return _follow(ctl, again, source, ctl.args.to, instance)
    require_live(instance)
    way = way_of(ctl, source, instance.flavor)
    migration, reasons = first_that_takes(ctl.client.api, operation, instance, source, way, ctl.args.disk_over_commit)
    for host, reason in reasons.items():
        ctl.out.note(f"not to host {host}: {reason}")
    accepted = send(ctl, source, migration, options, ctl.args.disk_over_commit)
    return _follow(ctl, accepted, source, migration.dest_host, instance)


def require_live(instance: Instance) -> None:
    """:raises InvalidState: the source would refuse it."""
    may, reason = allowed(COMMAND, instance.vm_state)
    if not may:
        raise InvalidState(f"instance {instance.uuid}: {reason}", instance=instance.uuid)


def migration_to(operation: str, instance: Instance, source: str, dest: str) -> Migration:
    """The move that an operation makes: the same one whenever the same operation is asked for."""
    return Migration(
        uuid=str(uuid.uuid5(uuid.UUID(operation), "migration")),
        instance=instance.uuid,
        migration_type="live-migration",
        source_host=source,
        dest_host=dest,
    )


def why_not(api: ComputeAPI, instance: Instance, migration: Migration, disk_over_commit: bool = False) -> str | None:
    """Why the destination cannot take the running guest, as the two hosts find it; ``None``: it can."""
    try:
        answer: MigrateData = api.check_can_live_migrate_destination(
            instance, migration, disk_over_commit, host=migration.dest_host
        )
    except ComputeError as exc:
        return exc.message
    assert answer.migration == migration.uuid
    return None


def first_that_takes(
    api: ComputeAPI, operation: str, instance: Instance, source: str, way: Way, disk_over_commit: bool
) -> tuple[Migration, dict[str, str]]:
    """A move to the first host of ``way`` that can take the running guest; and why those before it cannot.

    :raises Unschedulable: none can, with the reason of each.
    """
    reasons: dict[str, str] = {}
    for host in _hosts(way):
        migration = migration_to(operation, instance, source, host)
        reason = why_not(api, instance, migration, disk_over_commit)
        if reason is None:
            return migration, reasons
        reasons[host] = reason
    listed = "; ".join(f"{host}: {reason}" for host, reason in reasons.items())
    raise errors.Unschedulable(f"instance {instance.uuid} cannot move while it runs: {listed}")


def _hosts(way: Way) -> Iterable[str]:
    return (way.to, *way.alternates)


def send(ctl: Ctl, source: str, migration: Migration, options: CommandOptions, over_commit: bool = False) -> Accepted:
    """Ask the source to begin."""

    def ask(host: str, options: CommandOptions) -> Accepted:
        return ctl.client.api.live_migration(migration.instance, migration, over_commit, host=host, **options)

    return ctl.send(source, ask, options, again=f" --to {migration.dest_host}")


def chain_of(operation: str, source: str, dest: str) -> Chain:
    """Where a live migration has its parts. Its COMMIT at the source says that the destination runs the guest."""
    return Chain(operation, [source], [dest])


def _follow(ctl: Ctl, accepted: Accepted, source: str, dest: str, instance: Instance) -> Exit:
    about = f"live migration of instance {instance.uuid}"
    operation = accepted.operation
    migration = str(uuid.uuid5(uuid.UUID(operation), "migration")) if operation else None
    also: dict[str, Any] = {
        "instance": instance.uuid, "migration": migration, "source": source, "destination": dest
    }  # fmt: skip
    code = ctl.finish_chain(accepted, about, chain_of(operation or "", source, dest), lambda: also)
    if code is Exit.OK and operation and ctl.args.wait:
        ctl.out.note(f"  {landed(ctl.client.api.get_operation(operation, host=source), dest)}")
    return code


def stood_still(ended: Operation) -> str:
    """How long the guest stood still, as the hypervisor measured it; empty where it did not."""
    downtime = ended.result.get("downtime")
    return f"stood still for {span(float(downtime))}" if downtime is not None else ""


def landed(ended: Operation, dest: str) -> str:
    """Where it is now and what it cost, in a line."""
    return ", ".join(part for part in (f"it is on host {dest}", stood_still(ended)) if part)


# --- on its way -------------------------------------------------------------------------------------------------------


def abort(ctl: Ctl) -> Exit:
    """Stop a live migration; the guest goes on at the source."""
    side = _under_way(ctl)
    migration, source = side.state.migration, side.host
    api = ctl.client.api

    def ask(host: str, options: CommandOptions) -> Accepted:
        return api.live_migration_abort(migration.instance, migration.uuid, host=host, **options)

    accepted = ctl.send(source, ask, ctl.options())
    about = f"abort of the live migration of instance {migration.instance}"
    if accepted.operation is None or not ctl.args.wait:
        return ctl.finish(accepted, about)
    ended = _end_of_move(ctl, side, about)
    stopped = ended.state is not OperationState.DONE
    if ctl.out.as_json:
        ctl.out.document({"accepted": accepted, "operation": ended, "stopped": stopped, "instance": migration.instance})
    elif stopped:
        ctl.out.line(f"{about}: it goes on at host {source} (operation {ended.uuid})")
    else:
        ctl.out.note(f"{about}: too late: {landed(ended, migration.dest_host)}")
    return Exit.OK if stopped else Exit.FAILED


def force_complete(ctl: Ctl) -> Exit:
    """Finish a live migration at the guest's expense."""
    side = _under_way(ctl)
    migration, source = side.state.migration, side.host
    api = ctl.client.api

    def ask(host: str, options: CommandOptions) -> Accepted:
        how = ctl.args.how
        return api.live_migration_force_complete(migration.instance, migration.uuid, how, host=host, **options)

    accepted = ctl.send(source, ask, ctl.options())
    about = f"live migration of instance {migration.instance}, forced"
    if accepted.operation is None or not ctl.args.wait:
        return ctl.finish(accepted, about)
    ended = _end_of_move(ctl, side, about)
    done = ended.state is OperationState.DONE
    if ctl.out.as_json:
        ctl.out.document({"accepted": accepted, "operation": ended, "instance": migration.instance})
    elif done:
        ctl.out.line(f"{about}: {landed(ended, migration.dest_host)} (operation {ended.uuid})")
    else:
        message = (ended.error or {}).get("message", "no reason was recorded")
        ctl.out.note(f"{about}: it stays at host {source}: {message}")
    return Exit.OK if done else Exit.FAILED


def _under_way(ctl: Ctl) -> movelist.Side:
    side = movelist.find_source_side(ctl)
    migration = side.state.migration
    if migration.migration_type != "live-migration":
        raise InvalidState(
            f"instance {migration.instance}: migration {migration.uuid} is no live migration"
            f" ({migration.migration_type}, {migration.status.value})",
            instance=migration.instance,
        )
    return side


def _end_of_move(ctl: Ctl, side: movelist.Side, about: str) -> Operation:
    """The live migration itself, final on both hosts."""
    chain = chain_of(side.state.operation, side.host, side.state.migration.dest_host)
    with ctl.out.following(about, by=lambda part: part.host) as following:
        follower = Follower(ctl.client.api, chain, following)
        ended = follower.until_end(ctl.args.timeout)
        follower.until_witnessed()
    return ended
