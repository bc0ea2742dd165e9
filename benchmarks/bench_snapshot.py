"""Snapshots of a running guest on real libvirt against ``qemu-img convert`` of the same disk into the same directory,
both flushed: seconds, how long the guest stood still, what a second snapshot reads, room, memory.

Two disks that do not compress: 300 MiB of data in 1 GiB, and 1 GiB in 4 GiB. How long the guest stands still is the
largest gap between two ticks of its console while it is read, beside the largest one of as many seconds before.
"""

from __future__ import annotations

import argparse
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import CannotRun, Report, arguments, finish, median, rss_mib, run
from lab_moves import MIB, SOURCE, Hosts, Watch, hosts
from moves import ended

from compute_worker.objects import Instance, Operation
from tests.lab.cell import interrupt_as_exit
from tests.lab.guest_images import DATA_MIB
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH

SIZES = "300/1,1024/4"
"""MiB of data / GiB of disk."""
CHANGED_MIB = 50
WALL_GOAL = 1.1
SAMPLE_SECONDS = 0.1
QUIET_SECONDS = 5.0


class Sampled:
    """The largest value of something while the context is open."""

    def __init__(self, look: Callable[[], float]) -> None:
        self._look = look
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampling")
        self.first = self.largest = look()

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            self.largest = max(self.largest, self._look())

    def __enter__(self) -> Sampled:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@dataclass(frozen=True)
class Taken:
    """One snapshot. Seconds, bytes; ``room``: bytes beyond the image at their most; ``rss``: MiB of the worker;
    ``steps``: seconds of each."""

    seconds: float
    gap: float
    quiet_gap: float
    read: int
    size: int
    room: float
    rss: float
    steps: Mapping[str, float]


def occupied(*directories: Path) -> float:
    """Bytes that all files below occupy, each counted once however many names it has."""
    found: dict[int, int] = {}
    for directory in directories:
        for root, _, names in os.walk(directory):
            for name in names:
                try:
                    seen = os.stat(os.path.join(root, name), follow_symlinks=False)
                except FileNotFoundError:
                    continue
                found[seen.st_ino] = seen.st_blocks * 512
    return float(sum(found.values()))


def longest_gap(ticks: Sequence[tuple[str, float, int]], begin: float, end: float) -> float:
    """Between two ticks of which one at least lies between the times."""
    times = sorted(when for _, when, _ in ticks)
    return max((b - a for a, b in itertools.pairwise(times) if b >= begin and a <= end), default=0.0)


def snapshot(made: Hosts, instance: Instance, image: str) -> Taken:
    """Take one, watched."""
    worker = next(found for found in made.cell.workers if found.node is made.source and found.running)
    directories = (made.source.instances / instance.uuid, made.cell.state / "images")
    with Watch(made, instance) as watch:
        watch.wait_tick(SOURCE, time.time() + QUIET_SECONDS)
        with Sampled(lambda: occupied(*directories)) as room, Sampled(lambda: rss_mib(worker.pid)) as rss:
            accepted = made.api.snapshot_instance(instance.uuid, image, host=SOURCE)
            operation: Operation = ended(made.api, str(accepted.operation), SOURCE)
        watch.wait_tick(SOURCE, time.time())
    ticks = watch.seen.ticks
    size = int(operation.result["image"]["size_bytes"])
    return Taken(
        seconds=operation.updated_at - operation.created_at,
        gap=longest_gap(ticks, operation.created_at, operation.updated_at),
        quiet_gap=longest_gap(ticks, operation.created_at - QUIET_SECONDS, operation.created_at),
        read=int(operation.result["how"].get("read_bytes", 0)),
        size=size,
        room=room.largest - room.first - size,
        rss=rss.largest,
        steps={step.name: (step.ended_at or step.started_at) - step.started_at for step in operation.steps},
    )


def convert(made: Hosts, instance: Instance) -> float:
    """Seconds of ``qemu-img convert`` of the same disk, flushed."""
    disk, target = f"{INSTANCES_PATH}/{instance.uuid}/disk", f"{IMAGES_PATH}/bare.qcow2"
    bare = f"qemu-img convert -U -f qcow2 -O qcow2 {disk} {target}; sync {target}"
    began = time.monotonic()
    made.source.run("sh", "-ec", bare, timeout=600)
    seconds = time.monotonic() - began
    made.source.run("rm", "-f", target)
    return seconds


def change(made: Hosts, instance: Instance, mib: int) -> None:
    """Let the running guest's disk be written to, through the hypervisor that has it open."""
    names = made.source.virsh("list", "--name").stdout.split()
    domain = next(name for name in names if made.source.virsh("domuuid", name).stdout.strip() == instance.uuid)
    blocks = made.source.virsh("qemu-monitor-command", domain, "--hmp", "info block").stdout
    ours = blocks[blocks.index(f"{instance.uuid}/disk") :]
    device = next(line.split()[-1] for line in ours.splitlines() if "Attached to:" in line)
    for at in range(0, mib, 10):
        write = f'qemu-io -d {device} "write -P {at + 1} {DATA_MIB + at}M 10M"'
        said = made.source.virsh("qemu-monitor-command", domain, "--hmp", write).stdout
        if said.strip():  # it says nothing when it is good
            raise CannotRun(f"the guest's disk cannot be written to from outside: {said.strip()}")


def one_round(made: Hosts, mib: int, root_gb: int) -> tuple[float, Taken, Taken]:
    """A guest of its own, so that its first snapshot is a full one: bare, first, second."""
    instance = made.written(mib, root_gb)
    convert(made, instance)  # what is loaded once is not what is measured
    bare = convert(made, instance)
    first = snapshot(made, instance, str(uuid.uuid4()))
    change(made, instance, CHANGED_MIB)
    second = snapshot(made, instance, str(uuid.uuid4()))
    made.delete(instance)
    return bare, first, second


def tell(report: Report, mib: int, root_gb: int, rounds: Sequence[tuple[float, Taken, Taken]]) -> None:
    """All figures of one disk."""
    name = f"{mib} MiB in {root_gb} GiB"
    bare, first, second = ([one[index] for one in rounds] for index in range(3))
    ratio = median([one.seconds / seconds for one, seconds in zip(first, bare, strict=True)])
    seconds = median([one.seconds for one in first])
    report.add(
        f"{name}: s of a snapshot, of qemu-img convert; ratio", f"{seconds:.2f}, {median(bare):.2f}; {ratio:.2f}",
        f"<= {WALL_GOAL}", ratio <= WALL_GOAL, **{f"{mib}_wall_ratio": ratio, f"{mib}_s": seconds},
    )  # fmt: skip
    steps = {step: median([one.steps[step] for one in first]) for step in first[0].steps}
    told = ", ".join(f"{step} {value:.2f}" for step, value in steps.items())
    report.add(f"{name}: s of its steps", told, **{f"{mib}_steps_s": steps})
    gap, quiet = max(one.gap for one in first), max(one.quiet_gap for one in first)
    report.add(
        f"{name}: s between two ticks at most: while it is read, before", f"{gap:.2f}, {quiet:.2f}",
        **{f"{mib}_gap_s": gap, f"{mib}_quiet_gap_s": quiet},
    )  # fmt: skip
    read, again = median([one.read / MIB for one in second]), median([one.seconds for one in second])
    report.add(
        f"{name}: MiB that a second one reads after {CHANGED_MIB} MiB were written; its s", f"{read:.1f}; {again:.2f}",
        **{f"{mib}_second_read_mib": read, f"{mib}_second_s": again},
    )  # fmt: skip
    room = max(one.room / MIB for one in first)
    report.add(f"{name}: MiB of room beyond the image at most", f"{room:.1f}", **{f"{mib}_room_mib": room})


def measure(options: argparse.Namespace) -> Report:
    """Both disks under one worker."""
    report, rss = Report(f"snapshots, {options.rounds} rounds"), []
    with hosts() as made:
        made.use()
        for size in options.sizes.split(","):
            mib, root_gb = map(int, size.split("/"))
            rounds = [one_round(made, mib, root_gb) for _ in range(options.rounds)]
            tell(report, mib, root_gb, rounds)
            rss.append(max(taken.rss for _, *both in rounds for taken in both))
    report.add("worker, MiB resident at most, by disk", ", ".join(f"{value:.0f}" for value in rss), rss_mib=rss)
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", rounds=3, sizes=SIZES).parse_args(argv)
    interrupt_as_exit()
    return finish(measure(options), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
