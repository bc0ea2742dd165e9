"""Live migration between two real hosts, with local disks and TLS, against bare ``virsh migrate`` of the same guest
with the same flags: how much time is ours beyond libvirt's own job, how long the guest stands still, and many guests at
once.

Ours is from the command until both hosts have recorded where the guest is: checks, an empty disk over its base at the
destination, libvirt's job, the persistent definition there, and everything gone here. Bare is ``virsh migrate`` alone:
somebody has made the directory and the disk at the destination before. libvirt's own job, and the downtime, are what
libvirt says of the job that has completed (``virsh domjobinfo --completed``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common import Report, arguments, finish, median, run
from lab_moves import DESTINATION, SOURCE, Hosts, hosts
from moves import ended

from compute_worker.objects import Instance, Migration
from tests.lab.cell import interrupt_as_exit
from tests.lab.node import Node
from tests.lab.settings import INSTANCES_PATH

BEYOND_GOAL, DOWNTIME_GOAL = 0.5, 1.1
QEMU_DOWNTIME_MS = 300
LEFT_BEHIND = shutil.ignore_patterns("disk", "console.log*", "live_migration.json", "instance.json")


@dataclass(frozen=True)
class Trip:
    """Seconds of one move: all of it, libvirt's own job, and how long the guest stood still."""

    wall: float
    job: float
    downtime: float

    @property
    def beyond(self) -> float:
        """What was not libvirt's job."""
        return self.wall - self.job


def ours(made: Hosts, instance: Instance, source: str, dest: str) -> Trip:
    """By its workers."""
    began = time.perf_counter()
    migration = Migration(
        uuid=str(uuid.uuid4()), instance=instance.uuid, migration_type="live-migration", source_host=source,
        dest_host=dest,
    )  # fmt: skip
    operation = str(made.api.live_migration(instance.uuid, migration, host=source).operation)
    told = ended(made.api, operation, source).result
    ended(made.api, operation, dest)
    return Trip(time.perf_counter() - began, float(told["elapsed"]), float(told["downtime"]))


def bare(made: Hosts, instance: Instance, source: str, dest: str) -> Trip:
    """By ``virsh``, into a directory that is made before."""
    here, there = made.cell[source], made.cell[dest]
    prepare(here, there, instance.uuid)
    virsh = ["virsh", "-c", "qemu:///system"]
    argv = ["migrate", "--live", "--p2p", "--persistent", "--tls", "--tls-destination", dest, "--copy-storage-inc"]
    began = time.perf_counter()
    here.run(*virsh, *argv, "--migrate-disks", "vda", instance.uuid, f"qemu+tls://{dest}/system", timeout=300)
    wall = time.perf_counter() - began
    said = here.run(*virsh, "domjobinfo", instance.uuid, "--completed").stdout
    return Trip(wall, milliseconds(said, "Time elapsed"), milliseconds(said, "Total downtime"))


def prepare(here: Node, there: Node, uuid_: str) -> None:
    """Everything but the disk's bytes: an empty one over the same base."""
    path = f"{INSTANCES_PATH}/{uuid_}/disk"
    info = json.loads(here.run("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", path).stdout)
    target = there.instances / uuid_
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(here.instances / uuid_, target, ignore=LEFT_BEHIND)
    options = ["-b", info["full-backing-filename"], "-F", info["backing-filename-format"]]
    there.run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(info["virtual-size"]))
    for copy in (target, *target.iterdir()):
        original = (here.instances / uuid_ / copy.relative_to(target)).stat()
        os.chown(copy, original.st_uid, original.st_gid)
        copy.chmod(original.st_mode & 0o777)


def milliseconds(said: str, name: str) -> float:
    """A figure of ``virsh domjobinfo``, in seconds.

    :raises AssertionError: it is not there.
    """
    found = re.search(rf"^{name}:\s+(\d+)\s+ms$", said, re.MULTILINE)
    if found is None:
        raise AssertionError(f"virsh domjobinfo does not tell {name!r}: {said}")
    return int(found[1]) / 1000


Mover = Callable[[Hosts, Instance, str, str], Trip]


def there_and_back(made: Hosts, mover: Mover, instance: Instance, rounds: int) -> list[Trip]:
    """As many moves as ``rounds``, each followed by the way back, which counts too."""
    ways = [(SOURCE, DESTINATION), (DESTINATION, SOURCE)]
    return [mover(made, instance, *way) for _ in range(rounds) for way in ways]


def at_once(made: Hosts, mover: Mover, instances: Sequence[Instance], source: str, dest: str) -> tuple[float, float]:
    """Seconds until all are there, and the median downtime."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(instances)) as pool:
        trips = list(pool.map(lambda one: mover(made, one, source, dest), instances))
    return time.perf_counter() - began, median([trip.downtime for trip in trips])


def tell(report: Report, name: str, trips: Sequence[Trip]) -> None:
    """Medians of one mover."""
    wall, job, beyond = (median([getattr(t, what) for t in trips]) for what in ("wall", "job", "beyond"))
    downtime = median([t.downtime for t in trips])
    spread = f"{min(t.beyond for t in trips):.2f} to {max(t.beyond for t in trips):.2f}"
    goal = f"<= {BEYOND_GOAL}" if name == "ours" else ""
    report.add(
        f"{name}: s beyond libvirt's own job, median of {len(trips)} (range)", f"{beyond:.2f} ({spread})", goal,
        beyond <= BEYOND_GOAL if goal else None, **{f"{name}_beyond_s": beyond},
    )  # fmt: skip
    report.add(
        f"{name}: s in all; libvirt's own job; ms stood still", f"{wall:.2f}; {job:.2f}; {downtime * 1000:.0f}",
        **{f"{name}_wall_s": wall, f"{name}_job_s": job, f"{name}_downtime_s": downtime},
    )  # fmt: skip


def measure(options: argparse.Namespace) -> Report:
    """One guest again and again, then many; ours first, as bare moves leave records of workers behind."""
    report = Report(f"live migration with a disk of {options.mib} MiB, {options.rounds} rounds there and back")
    with hosts() as made:
        many = options.at_once
        limits = {"max_concurrent_outbound": max(1, many), "max_concurrent_inbound": max(1, many)}
        # The downtime that QEMU permits by itself, which is what virsh leaves it at.
        live = {"tls": "required", "max_downtime_ms": QEMU_DOWNTIME_MS, "downtime_steps": 1}
        made.use({"compute": limits, "live_migration": live}, transport="nbd")
        guests = [made.written(options.mib) for _ in range(max(1, many))]
        first = guests[0]
        # What is loaded once, and the destination's base image, are not what is measured.
        there_and_back(made, ours, first, 1)
        by_us = there_and_back(made, ours, first, options.rounds)
        tell(report, "ours", by_us)
        crowd = {"ours": at_once(made, ours, guests, SOURCE, DESTINATION)} if many else {}
        if many:
            at_once(made, ours, guests, DESTINATION, SOURCE)
        made.cell.stop_workers()
        by_virsh = there_and_back(made, bare, first, options.rounds)
        tell(report, "bare", by_virsh)
        if many:
            crowd["bare"] = at_once(made, bare, guests, SOURCE, DESTINATION)
    ratio = median([t.downtime for t in by_us]) / max(0.001, median([t.downtime for t in by_virsh]))
    report.add(
        "stood still, ours to bare", f"{ratio:.2f}", f"<= {DOWNTIME_GOAL}", ratio <= DOWNTIME_GOAL,
        downtime_ratio=ratio,
    )  # fmt: skip
    for name, (seconds, downtime) in crowd.items():
        report.add(
            f"{name}: {many} guests at once: s until all are there; ms stood still, median",
            f"{seconds:.1f}; {downtime * 1000:.0f}",
            **{f"{name}_at_once_s": seconds, f"{name}_at_once_downtime_s": downtime},
        )
    return report


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", mib=64, rounds=5, at_once=10).parse_args(argv)
    interrupt_as_exit()
    return finish(measure(options), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
