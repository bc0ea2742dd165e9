"""How long a guest is off while it is resized to another real host, warm (its disk is sent while it runs) and cold, by
how much was written to its disk; what bare tools need to send that disk; and the same guest stopped and started again
where it is.

Off is from the moment the worker begins to shut it down until its processors run at the destination, by the clock of
both hypervisors' own events. The guest's shutdown is its own, so the goal is set for what comes after it: 0.5 s and the
bytes that are still to be sent, at the speed of ``qemu-img convert`` in the same run. What the guest itself sees, the
gap between two ticks of its counter, holds its boot too, which is the same where it never left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from common import Report, arguments, finish, median, run
from lab_moves import DESTINATION, MIB, SOURCE, Hosts, Seen, Watch, convert_over_nbd, hosts

from compute_worker.objects import Instance, Operation
from tests.lab.cell import interrupt_as_exit
from tests.lab.settings import INSTANCES_PATH

ADDED_GOAL = 0.5
FLAT = 1.25
"""Ratio of the longest to the shortest blackout over all sizes, up to which the line is called flat."""


@dataclass(frozen=True)
class Blackout:
    """Seconds of one move. ``shutdown``: until the guest was off; ``after``: from there until it ran again; ``gap``:
    between two ticks; ``sent``: bytes that left the source in ``after``; ``start``: of ``after``, what the hypervisor
    takes from a definition to a process that could run."""

    shutdown: float
    after: float
    gap: float
    sent: int = 0
    start: float = 0.0

    @property
    def off(self) -> float:
        """All of it."""
        return self.shutdown + self.after


def blackout(seen: Seen, off: Operation, where: str) -> Blackout:
    """What was seen of a guest that ``off`` shut down on the source and that then came up at ``where``."""
    began = next(s.started_at for s in off.steps if s.name == "power_off" and s.direction == "do")
    stopped = seen.event(SOURCE, "Stopped", began)
    resumed = seen.event(where, "Resumed", stopped)
    start = seen.event(where, "Started", stopped) - seen.event(where, "Defined", stopped)
    gap, sent = seen.tick_gap(SOURCE, where, stopped), seen.sent(stopped, resumed)
    return Blackout(stopped - began, resumed - stopped, gap, sent, start)


def moved(made: Hosts, instance: Instance) -> Blackout:
    """Resize it and bring it back."""
    with Watch(made, instance) as watch:
        watch.wait_tick(SOURCE, 0)
        resized = made.resize(instance)
        watch.wait_tick(DESTINATION, 0)
    made.revert(instance, resized)
    return blackout(watch.seen, resized.source, DESTINATION)


def restarted(made: Hosts, instance: Instance) -> Blackout:
    """Stop and start it where it is."""
    with Watch(made, instance) as watch:
        watch.wait_tick(SOURCE, 0)
        stop, start = made.restart(instance)
        ran = max(step.ended_at or 0.0 for step in start.steps)
        watch.wait_tick(SOURCE, ran)
    return blackout(watch.seen, stop, SOURCE)


def size(made: Hosts, mib: int, rounds: int) -> tuple[dict[str, list[Blackout]], float]:
    """Moves of a guest that has written ``mib``, and bytes a second that bare tools send its disk with."""
    made.use(transport="nbd", resize_precopy="auto")
    instance = made.written(mib)
    found: dict[str, list[Blackout]] = {"restart": [restarted(made, instance) for _ in range(rounds)]}
    speeds = []
    for _ in range(rounds):
        disk = f"{INSTANCES_PATH}/{instance.uuid}/disk"
        # The guest has it open and goes on: only the speed counts.
        seconds, sent = convert_over_nbd(made, disk, tls=True, in_use=True)
        speeds.append(sent / seconds)
    for name, precopy in (("warm", "auto"), ("cold", "never")):
        made.use(transport="nbd", resize_precopy=precopy)
        found[name] = [moved(made, instance) for _ in range(rounds)]
    made.delete(instance)
    return found, median(speeds)


def tell(report: Report, mib: int, found: dict[str, list[Blackout]], speed: float) -> None:
    """Medians of one size."""
    gap = median([one.gap for one in found["restart"]])
    rate = speed / MIB
    report.add(f"{mib} MiB: bare qemu-img convert with TLS, MiB/s", f"{rate:.0f}", **{f"{mib}_bare_mib_s": rate})
    for name in ("warm", "cold"):
        runs = found[name]
        after, allowed = median([one.after for one in runs]), median([ADDED_GOAL + one.sent / speed for one in runs])
        shutdown, sent = median([one.shutdown for one in runs]), median([one.sent / MIB for one in runs])
        spread = f"{min(one.after for one in runs):.2f} to {max(one.after for one in runs):.2f}"
        report.add(
            f"{mib} MiB, {name}: s to shut down + s off after it (range); MiB sent meanwhile",
            f"{shutdown:.2f} + {after:.2f} ({spread}); {sent:.1f}",
            f"<= {allowed:.2f} after it" if name == "warm" else "", after <= allowed if name == "warm" else None,
            **{f"{mib}_{name}_shutdown_s": shutdown, f"{mib}_{name}_after_s": after, f"{mib}_{name}_sent_mib": sent},
        )  # fmt: skip
        start = median([one.start for one in runs])
        bare = median([one.start for one in found["restart"]])
        report.add(
            f"{mib} MiB, {name}: of it the hypervisor's start of the guest; the same when it is only started, s",
            f"{start:.2f}; {bare:.2f}", **{f"{mib}_{name}_start_s": start, f"{mib}_restart_start_s": bare},
        )  # fmt: skip
        ticks = median([one.gap for one in runs])
        report.add(
            f"{mib} MiB, {name}: s between two ticks of the guest; when it is only stopped and started",
            f"{ticks:.1f}; {gap:.1f}", **{f"{mib}_{name}_gap_s": ticks, f"{mib}_restart_gap_s": gap},
        )  # fmt: skip


def measure(options: argparse.Namespace) -> Report:
    """Every size, each with a guest of its own."""
    sizes = [int(mib) for mib in options.mib.split(",")]
    report = Report(f"blackout of a resize, {options.rounds} rounds")
    after: dict[str, list[float]] = {"warm": [], "cold": []}
    with hosts() as made:
        made.use(transport="nbd", resize_precopy="auto")
        # The destination's base image, and what is loaded once, are not what is measured.
        warm_up = made.written(1)
        moved(made, warm_up)
        made.delete(warm_up)
        for mib in sizes:
            found, speed = size(made, mib, options.rounds)
            tell(report, mib, found, speed)
            for name, values in after.items():
                values.append(median([one.after for one in found[name]]))
    if len(sizes) > 1:
        ratios = {name: max(values) / min(values) for name, values in after.items()}
        report.add(
            f"longest to shortest of {options.mib} MiB: warm; cold", f"{ratios['warm']:.2f}; {ratios['cold']:.2f}",
            f"<= {FLAT} (a flat line)", ratios["warm"] <= FLAT, flat=ratios["warm"],
        )  # fmt: skip
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", mib="256,1024,2048", rounds=3).parse_args(argv)
    interrupt_as_exit()
    return finish(measure(options), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
