"""The transfer of a cold move between two real hosts against bare tools on the same file and the same cable: seconds of
sending and comparing a disk, and the bytes that left the source meanwhile.

The guest's overlay holds data that do not compress. Each round moves it there, sends the copy that was set aside by the
bare tools, and reverts. The bare tools leave the file flushed on the destination's disk, as the worker does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common import Report, arguments, finish, median, run
from lab_moves import MIB, Hosts, Watch, convert_over_nbd, hosts, rsync_over_ssh
from moves import seconds_of

from compute_worker.objects import Instance
from tests.lab.cell import interrupt_as_exit
from tests.lab.settings import INSTANCES_PATH

BYTES_GOAL, WALL_GOAL = 1.02, 1.15
TRANSPORTS = ("nbd", "ssh")
BARE = "convert_tls"


def one_round(made: Hosts, instance: Instance, bare: bool) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of the move's transfer, and of each bare tool; and the bytes that the file occupies."""
    with Watch(made, instance) as watch:
        moved = made.resize(instance)
    steps = [step for step in moved.source.steps if step.name in ("send_disk", "verify_copy")]
    seconds = sum(seconds_of(moved.source, step.name) for step in steps)
    begin, end = min(s.started_at for s in steps), max(s.ended_at or 0.0 for s in steps)
    aside = f"{INSTANCES_PATH}/{instance.uuid}_resize/disk"
    found = {"move": (seconds, watch.seen.sent(begin, end)), "allocated": (0.0, made.allocated(aside))}
    if bare:
        found[BARE] = convert_over_nbd(made, aside, tls=True)
        found["convert_plain"] = convert_over_nbd(made, aside, tls=False)
        found["rsync"] = rsync_over_ssh(made, aside)
    made.revert(instance, moved)
    return found


def tell(report: Report, transport: str, rounds: Sequence[dict[str, tuple[float, int]]]) -> None:
    """Medians, and the ratios to what the goals are set by."""

    def middle(name: str, index: int) -> float:
        return median([found[name][index] for found in rounds])

    seconds, share = middle("move", 0), median([found["move"][1] / found["allocated"][1] for found in rounds])
    ratio = median([found["move"][0] / found[BARE][0] for found in rounds])
    plain = median([found["move"][0] / found["convert_plain"][0] for found in rounds])
    report.add(
        f"{transport}: bytes from the source to allocated bytes", f"{share:.4f}", f"<= {BYTES_GOAL}",
        share <= BYTES_GOAL, **{f"{transport}_bytes_ratio": share},
    )  # fmt: skip
    report.add(
        f"{transport}: seconds of the transfer, to qemu-img convert with TLS", f"{seconds:.2f}, {ratio:.2f}",
        f"<= {WALL_GOAL}", ratio <= WALL_GOAL, **{f"{transport}_s": seconds, f"{transport}_wall_ratio": ratio},
    )  # fmt: skip
    report.add(
        f"{transport}: the same to qemu-img convert without TLS, to rsync over ssh",
        f"{plain:.2f}, {median([found['move'][0] / found['rsync'][0] for found in rounds]):.2f}",
        **{f"{transport}_plain_ratio": plain},
    )
    bare: dict[str, Any] = {f"{transport}_{name}_s": middle(name, 0) for name in (BARE, "convert_plain", "rsync")}
    report.add(
        f"{transport}: the bare tools in the same rounds, s: convert with TLS, without, rsync",
        ", ".join(f"{value:.2f}" for value in bare.values()), **bare,
    )  # fmt: skip
    shares = [median([found[name][1] / found["allocated"][1] for found in rounds]) for name in (BARE, "rsync")]
    theirs = ", ".join(f"{value:.4f}" for value in shares)
    report.add(f"{transport}: their bytes to allocated bytes: convert with TLS, rsync", theirs)


def measure(options: argparse.Namespace) -> Report:
    """All transports with the same guest."""
    report = Report(f"transfer of {options.mib} MiB, {options.rounds} rounds")
    with hosts() as made:
        made.use(transport=TRANSPORTS[0], resize_precopy="never")
        instance = made.written(options.mib)
        for transport in TRANSPORTS:
            made.use(transport=transport, resize_precopy="never")
            # The destination's base image, and what is loaded once, are not what is measured.
            one_round(made, instance, bare=False)
            rounds = [one_round(made, instance, bare=True) for _ in range(options.rounds)]
            size = rounds[-1]["allocated"][1]
            report.add(f"{transport}: allocated bytes of the overlay, MiB", f"{size / MIB:.1f}", allocated=size)
            tell(report, transport, rounds)
        made.delete(instance)
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", mib=1024, rounds=3).parse_args(argv)
    interrupt_as_exit()
    return finish(measure(options), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
