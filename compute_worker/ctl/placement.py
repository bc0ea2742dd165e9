"""Which host gets a new instance when the operator names none: the one with the most free memory."""

from __future__ import annotations

from collections.abc import Iterable

from compute_worker.ctl.text import number
from compute_worker.objects import Flavor, HostState


def unfit(state: HostState, flavor: Flavor) -> str | None:
    """Why ``flavor`` cannot go to this host, in words; ``None``: it can. The worker's own claim decides in the end."""
    if not state.enabled:
        return f"disabled ({state.disabled_reason or 'no reason given'})"
    if not state.hypervisor_up:
        return "its hypervisor does not answer"
    wanted = {
        "vcpus": (flavor.vcpus, state.vcpus.free),
        "memory_mb": (flavor.memory_mb, state.memory_mb.free),
        "disk_gb": (flavor.root_gb + flavor.ephemeral_gb, state.disk_gb.free),
    }
    for resource, (asked, free) in wanted.items():
        if asked > free:
            return f"{resource}: {asked} asked for, {number(free)} free"
    return None


def rank(states: Iterable[HostState], flavor: Flavor) -> tuple[list[str], dict[str, str]]:
    """Hosts to try, best first, and by host why the others are left out."""
    fit: list[HostState] = []
    left_out: dict[str, str] = {}
    for state in states:
        reason = unfit(state, flavor)
        if reason is None:
            fit.append(state)
        else:
            left_out[state.host] = reason
    fit.sort(key=lambda s: (-s.memory_mb.free, s.instances, s.host))
    return [state.host for state in fit], left_out
