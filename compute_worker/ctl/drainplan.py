"""What a drain would do, as a pure function of what the hosts say: which instance goes where, and what must stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from compute_worker.ctl.moves import Way, choose
from compute_worker.errors import Unschedulable
from compute_worker.objects import Capacity, Flavor, HostState, Instance, MigrationState
from compute_worker.states import MigrationStatus, VmState, allowed


class How(StrEnum):
    """How an instance leaves its host."""

    LIVE = "live"
    """Moved while it runs."""
    COLD = "cold"
    """Shut down, sent, started at the destination."""


AUTO = "auto"
"""Live where the guest runs and a host can take it so, cold otherwise."""
Refuses = Callable[[Instance, str], str | None]
"""Why a host cannot take an instance while it runs; ``None``: it can."""


@dataclass(frozen=True)
class Move:
    """An instance that can leave. ``reason``: why this way."""

    instance: Instance
    how: How
    way: Way
    reason: str = ""


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


def how_to_move(instance: Instance, wanted: str = AUTO) -> tuple[How | None, str, bool]:
    """How an instance leaves and why; or why it cannot, and whether that passes by itself.

    :param wanted: ``auto``, or the only way that may be taken.
    """
    if instance.task_state is not None or instance.vm_state is VmState.BUILDING:
        return None, f"busy: {(instance.task_state or instance.vm_state).value}", True
    if instance.vm_state is VmState.RESIZED:
        return None, "it waits for confirm or revert", False
    if instance.block_device_info.block_device_mapping:
        return None, "it has volumes", False
    live, why_not_live = allowed("live_migration", instance.vm_state)
    if live and wanted != How.COLD:
        return How.LIVE, f"it is {instance.vm_state.value}", False
    if wanted == How.LIVE:
        return None, why_not_live, False
    cold, why_not = allowed("resize_instance", instance.vm_state)
    if not cold:
        return None, why_not, False
    return How.COLD, "asked for" if live else f"it is {instance.vm_state.value}", False


def plan(
    host: str,
    instances: Iterable[Instance],
    states: Sequence[HostState],
    wanted: str = AUTO,
    refuses: Refuses = lambda instance, host: None,
) -> Plan:
    """Where each instance of ``host`` goes: the largest first, each to the host that then has most memory free.

    :param states: of all hosts that answer, ``host`` among them for its architecture. What is planned counts as used.
    :param refuses: asked for instances that would move while they run.
    """
    moves: list[Move] = []
    stuck: list[Stuck] = []
    left = list(states)
    for instance in sorted(instances, key=lambda i: (-i.flavor.memory_mb, -i.flavor.vcpus, i.uuid)):
        how, reason, passing = how_to_move(instance, wanted)
        if how is None:
            stuck.append(Stuck(instance, reason, passing))
            continue
        try:
            way = choose(left, host, instance.flavor)
        except Unschedulable as exc:
            stuck.append(Stuck(instance, exc.message))
            continue
        made: Move | None = Move(instance, how, way, reason)
        if how is How.LIVE:
            made, reason = _live(Move(instance, how, way, reason), refuses, wanted)
        if made is None:
            stuck.append(Stuck(instance, reason))
            continue
        left = [_with(state, instance.flavor) if state.host == made.way.to else state for state in left]
        moves.append(made)
    return Plan(moves, stuck)


def _live(move: Move, refuses: Refuses, wanted: str) -> tuple[Move | None, str]:
    """To the first host that can take it while it runs; else cold, unless that is not wanted."""
    problems: dict[str, str] = {}
    for host in (move.way.to, *move.way.alternates):
        problem = refuses(move.instance, host)
        if problem is None:
            return Move(move.instance, How.LIVE, Way(host), move.reason), ""
        problems[host] = problem
    why = "not live: " + "; ".join(f"{host}: {problem}" for host, problem in problems.items())
    may, cold_problem = allowed("resize_instance", move.instance.vm_state)
    if wanted == How.LIVE or not may:
        return None, why if may else f"{why}; {cold_problem}"
    return Move(move.instance, How.COLD, move.way, why), ""


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
