"""Moves of instances as a conductor asks for them, and what is known of them afterwards."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from compute_worker.objects import Flavor, Instance, Migration, Operation
from compute_worker.rpc.client import ComputeAPI
from compute_worker.states import OperationState

PATIENCE = 300.0


@dataclass(frozen=True)
class Moved:
    """An instance that was resized and waits for a decision. ``source``, ``destination``: the two operations."""

    migration: Migration
    source: Operation
    destination: Operation


def ended(api: ComputeAPI, operation: str, host: str) -> Operation:
    """The operation at its end.

    :raises AssertionError: it is not done.
    """
    found = api.get_operation(operation, wait=PATIENCE, host=host)
    if found.state is not OperationState.DONE:
        raise AssertionError(f"{found.kind} of instance {found.instance} at {host} is {found.state}: {found.error}")
    return found


def ask(api: ComputeAPI, instance: Instance, source: str, destination: str, flavor: Flavor) -> tuple[Migration, str]:
    """Ask ``destination`` to resize it; the migration and the operation."""
    migration = Migration(
        uuid=str(uuid.uuid4()), instance=instance.uuid, migration_type="resize", source_host=source,
        dest_host=destination, old_flavor=instance.flavor, new_flavor=flavor,
    )  # fmt: skip
    return migration, str(api.prep_resize(instance, migration, host=destination).operation)


def resize(api: ComputeAPI, instance: Instance, source: str, destination: str, flavor: Flavor) -> Moved:
    """Ask for it and wait until both hosts have recorded it."""
    migration, operation = ask(api, instance, source, destination, flavor)
    there = ended(api, operation, destination)
    return Moved(migration, ended(api, operation, source), there)


def confirm(api: ComputeAPI, migration: Migration) -> Operation:
    """Keep it where it is now."""
    accepted = api.confirm_resize(migration.instance, migration.uuid, host=migration.dest_host)
    return ended(api, str(accepted.operation), migration.dest_host)


def seconds_of(operation: Operation, step: str) -> float:
    """How long a step of it took, by its journal; all tries of it together."""
    found = [s for s in operation.steps if s.name == step and s.direction == "do" and s.ended_at is not None]
    if not found:
        raise AssertionError(f"{operation.kind} has no ended step {step!r}: {[s.name for s in operation.steps]}")
    return sum((s.ended_at or 0.0) - s.started_at for s in found)
