"""What a drain would do, as a pure function of what the hosts say: which instance goes where, and what must stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from compute_worker.ctl.moves import Way, choose
from compute_worker.errors import Unschedulable
from compute_worker.objects import Capacity, Flavor, HostState, Instance, MigrationState
from compute_worker.states import MigrationStatus, VmState, allowed


class How(StrEnum):
    """How an instance leaves its host."""

    COLD = "cold"
    """Shut down, sent, started at the destination."""


@dataclass(frozen=True)
class Move:
    """An instance that can leave."""

    instance: Instance
    how: How
    way: Way


@dataclass(frozen=True)
class Stuck:
    """An instance that cannot. ``passing``: it may be able to soon, without anybody's help."""

    instance: Instance
    reason: str
    passing: bool = False


@dataclass(frozen=True)
class Plan:
    """All instances of a host."""

    moves: Sequence[Move] = ()
    stuck: Sequence[Stuck] = ()


def how_to_move(instance: Instance) -> tuple[How | None, str, bool]:
    """How an instance leaves; else why it cannot, and whether that passes by itself. Running guests will go by live
    migration: this function is where that is chosen."""
    if instance.task_state is not None or instance.vm_state is VmState.BUILDING:
        return None, f"busy: {(instance.task_state or instance.vm_state).value}", True
    if instance.vm_state is VmState.RESIZED:
        return None, "it waits for confirm or revert", False
    if instance.block_device_info.block_device_mapping:
        return None, "it has volumes", False
    may, reason = allowed("resize_instance", instance.vm_state)
    return (How.COLD, "", False) if may else (None, reason, False)


def plan(host: str, instances: Iterable[Instance], states: Sequence[HostState]) -> Plan:
    """Where each instance of ``host`` goes: the largest first, each to the host that then has most memory free.

    :param states: of all hosts that answer, ``host`` among them for its architecture. What is planned counts as used.
    """
    moves: list[Move] = []
    stuck: list[Stuck] = []
    left = list(states)
    for instance in sorted(instances, key=lambda i: (-i.flavor.memory_mb, -i.flavor.vcpus, i.uuid)):
        how, reason, passing = how_to_move(instance)
        if how is None:
            stuck.append(Stuck(instance, reason, passing))
            continue
        try:
            way = choose(left, host, instance.flavor)
        except Unschedulable as exc:
            stuck.append(Stuck(instance, exc.message))
            continue
        left = [_with(state, instance.flavor) if state.host == way.to else state for state in left]
        moves.append(Move(instance, how, way))
    return Plan(moves, stuck)


def _with(state: HostState, flavor: Flavor) -> HostState:
    """A host after one more instance."""

    def more(capacity: Capacity, used: float) -> Capacity:
        return msgspec.structs.replace(capacity, used=capacity.used + used)

    return msgspec.structs.replace(
        state,
        vcpus=more(state.vcpus, flavor.vcpus),
        memory_mb=more(state.memory_mb, flavor.memory_mb),
        disk_gb=more(state.disk_gb, flavor.root_gb + flavor.ephemeral_gb),
        instances=state.instances + 1,
    )


@dataclass(frozen=True)
class Left:
    """What a host still has: its instances, and moves with it that nobody has closed."""

    instances: Sequence[Instance]
    moves: Sequence[MigrationState]

    @property
    def empty(self) -> bool:
        """Whether the host can be switched off without anybody missing anything."""
        return not self.instances and not self.moves

    @property
    def to_confirm(self) -> list[MigrationState]:
        """Moves away from the host that only wait to be confirmed: it keeps a copy for each."""
        return [m for m in self.moves if m.side == "source" and m.migration.status is MigrationStatus.FINISHED]


def verdict(host: str, left: Left) -> str:
    """The last line of a drain."""
    if left.empty:
        return f"host {host} is empty"
    parts = []
    if left.instances:
        parts.append(f"{len(left.instances)} instances stay")
    waiting = len(left.to_confirm)
    if waiting:
        parts.append(f"{waiting} copies are kept until their moves are confirmed")
    if len(left.moves) > waiting:
        parts.append(f"{len(left.moves) - waiting} moves are not closed")
    return f"host {host} is not empty: {', '.join(parts)}"
