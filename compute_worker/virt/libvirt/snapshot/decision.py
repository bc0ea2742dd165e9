"""How a guest's disk is brought to stand still, decided from facts alone."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from compute_worker.states import PowerState

OFF = frozenset({PowerState.NOSTATE, PowerState.SHUTDOWN, PowerState.CRASHED, PowerState.SUSPENDED})


class Method(enum.StrEnum):
    """Ways to a disk that stands still."""

    BACKUP = "backup"
    """The hypervisor keeps a point in time while the guest runs on (a backup job in pull mode)."""
    SAVED = "saved"
    """The guest's memory is saved to disk; it goes on from there when its disk has been read."""
    COLD = "cold"
    """The guest is off."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the decision needs. ``obstacle``: why the hypervisor cannot keep a point in time; empty: it can."""

    power: PowerState
    live: bool
    obstacle: str = ""


def decide(facts: Facts) -> tuple[Method, str]:
    """The method, and why."""
    if facts.power in OFF:
        return Method.COLD, f"the guest is off ({facts.power})"
    if not facts.live:
        return Method.SAVED, "asked to be made without the guest running (live = false)"
    if facts.obstacle:
        return Method.SAVED, f"its disk cannot be read while it runs: {facts.obstacle}"
    return Method.BACKUP, f"the guest is {facts.power} and goes on"


@dataclass(frozen=True, slots=True)
class ChainFacts:
    """What there is to build on. ``wanted``: the option; ``last``: an image was made of this disk before; ``held``: the
    guest still has that image's checkpoint; ``there``: the image is in a store as a file here, and is as it was."""

    wanted: bool
    compressed: bool
    last: bool
    held: bool
    there: bool


def builds_on_last(facts: ChainFacts) -> tuple[bool, str]:
    """Whether only what was written since the last image is read from the guest's disk, and why (not)."""
    refusals = (
        (not facts.wanted, "libvirt.snapshot_incremental is off"),
        (facts.compressed, "a compressed image is made from the whole disk"),
        (not facts.last, "it is the first image of this disk here"),
        (not facts.held, "the guest does not have the last image's checkpoint any more"),
        (not facts.there, "the last image is not in this store any more as it was"),
    )
    reason = next((reason for refused, reason in refusals if refused), "")
    return not reason, reason or "only what was written since the last image is read from the guest's disk"
