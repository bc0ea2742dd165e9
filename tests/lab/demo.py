"""The scenario on a cell of two real hosts: `python -m tests.lab.demo`.

Exit status: 0 every step was good, 1 one was not, 3 this machine cannot hold the cell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

import msgspec

from compute_worker.threads import use_threads
from tests.lab import oracle
from tests.lab.cell import Cell, interrupt_as_exit
from tests.lab.guest_images import MEMORY_MIB, GuestImages, guest_images
from tests.lab.rabbit import ADMINISTRATOR, broker_url
from tests.lab.requirements import missing
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH, Settings
from tests.lab.worker import Config
from tests.waiting import wait_for

use_threads()

from compute_worker.cmd.demo import INSTEAD, embedded  # noqa: E402
from compute_worker.ctl.connect import Client  # noqa: E402
from compute_worker.ctl.output import Output  # noqa: E402
from compute_worker.ctl.text import amount  # noqa: E402
from compute_worker.demo.cell import Guest  # noqa: E402
from compute_worker.demo.scenario import SCENES  # noqa: E402
from compute_worker.demo.stage import Stage, play  # noqa: E402
from compute_worker.objects import ImageMeta, Instance  # noqa: E402
from compute_worker.rpc.client import ComputeAPI  # noqa: E402
from compute_worker.rpc.transport import get_transport  # noqa: E402
from compute_worker.states import OperationState  # noqa: E402

CANNOT = 3
MIB = 1 << 20
BANDWIDTH_MB, NOISE_MIB, NOISE_AT = 48, 64, 200 * MIB
DIRTY_MIB = 16
PRECOPY = {"node1": "never", "node2": "auto"}
"""By host: the same guest leaves one of them cold and the other one warm."""


def config(host: str) -> Config:
    transfer = {"resize_precopy": PRECOPY[host], "bandwidth_mb": BANDWIDTH_MB}
    live = {"bandwidth_mb": BANDWIDTH_MB}
    return {"images": {"file_path": IMAGES_PATH}, "transfer": transfer, "live_migration": live}


class RealDemo:
    """See `compute_worker.demo.cell.DemoCell`."""

    title = "two real libvirt hosts in namespaces of this machine, and a RabbitMQ"
    killing = "the worker was killed by SIGKILL"
    sends_ahead = frozenset(name for name, mode in PRECOPY.items() if mode == "auto")
    line = f"disks go by TLS, {BANDWIDTH_MB} MiB/s at most"
    strict: Mapping[str, int | float | str] = {
        "bandwidth_mb": 10,
        "max_downtime_ms": 300,
        "completion_timeout": 3.0,
        "timeout_action": "force_complete",
    }
    guest = Guest(
        boot=r"LAB: BOOT OK boots=\d+",
        tick=r"LAB: tick (\d+) up=",
        clean=r"LAB: CLEAN SHUTDOWN",
        memory_mb=MEMORY_MIB,
        patience=120.0,
        still=2.5,
        keeps_count=True,
    )

    def __init__(self, cell: Cell, client: Client, images: GuestImages) -> None:
        self._cell = cell
        self._ticks: dict[int, int] = {}
        self._seen = 0
        self._heard: dict[str, dict[int, TextIO]] = {}
        self.client = client
        self.hosts = list(cell.nodes)
        self.kernel_image = ImageMeta(
            id=images.data_qcow2.name, disk_format="qcow2", kernel_id=images.kernel.name,
            ramdisk_id=images.initrd.name,
        )
        self.disk_image = ImageMeta(id=images.boot_qcow2.name, disk_format="qcow2")

    def arm(self, host: str, instance: str) -> None:
        """A real build takes long enough: nothing has to hold it."""

    def until_under_way(self, host: str, operation: str) -> None:
        """Until a step of it has begun and another one has ended."""

        def under_way() -> bool:
            seen = self.client.api.get_operation(operation, host=host)
            assert not seen.state.final, f"the build was {seen.state} before its worker could be killed"
            return seen.state is OperationState.RUNNING and any(s.state == "done" for s in seen.steps)

        wait_for(under_way, 30.0, "the build to be in the middle of its steps")

    def kill_worker(self, host: str) -> None:
        self._worker(host).kill()

    def start_worker(self, host: str) -> None:
        self._worker(host).start()
        self._worker(host).wait_ready()

    def alive(self, instance: str) -> object | None:
        """How many ticks its consoles on both hosts ever showed, set aside or not."""
        for node in self._cell.nodes.values():
            for path in node.instances.glob(f"{instance}*/console.log"):
                try:
                    file, ticks = path.stat().st_ino, len(re.findall(self.guest.tick, path.read_text(errors="replace")))
                except OSError:
                    # It is just being set aside or removed.
                    continue
                # A file keeps its number when its directory is set aside; fewer than before: another one got it.
                before = self._ticks.get(file, 0)
                self._seen += ticks - before if ticks >= before else ticks
                self._ticks[file] = ticks
        return self._seen or None

    def root_disk_bytes(self, host: str, instance: str, console: str) -> int:
        """What the guest said of its first disk at its last boot."""
        return int(re.findall(r"LAB: disk vda size=(\d+)", console)[-1])

    def fill(self, host: str, instance: str) -> int:
        """Behind the guest's file system."""
        node, noise = self._cell[host], "/var/tmp/noise"
        node.path(noise).write_bytes(hashlib.shake_256(instance.encode()).digest(NOISE_MIB * MIB))
        command = f"write -q -s {noise} {NOISE_AT} {NOISE_MIB * MIB}"
        form = self._formats(host, instance)["disk"]
        node.run("qemu-io", "-f", form, "-c", command, f"{INSTANCES_PATH}/{instance}/disk")
        node.path(noise).unlink()
        return NOISE_MIB * MIB

    def compare(self, source: str, dest: str, instance: str) -> str:
        """qemu-img check where they are qcow2, and qemu-img compare of all that a guest would read."""
        before, after = self._formats(source, f"{instance}_resize"), self._formats(dest, instance)
        assert before.keys() == after.keys(), f"{source} had {sorted(before)}, {dest} has {sorted(after)}"
        read = 0
        for name, form in after.items():
            there = f"{INSTANCES_PATH}/{instance}/{name}"
            if form == "qcow2":
                self._cell[dest].run("qemu-img", "check", "-q", "-f", form, there)
            aside = self._cell[source].instances / f"{instance}_resize" / name
            arrived = self._cell[dest].instances / instance / name
            words = ["qemu-img", "compare", "-U", "-q", "-f", before[name], "-F", form, str(aside), str(arrived)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
            shown = self._cell[dest].run("qemu-img", "info", "--output=json", "-f", form, there).stdout
            read += int(json.loads(shown)["virtual-size"])
        return f"qemu-img check clean, qemu-img compare: {amount(read)} identical"

    def _formats(self, host: str, directory: str) -> dict[str, str]:
        """Of an instance's disks by name, as the host wrote it beside them."""
        info = json.loads((self._cell[host].instances / directory / "disk.info").read_text())
        return {disk["name"]: disk["format"] for disk in info["disks"]}

    def policy(self, host: str, live: Mapping[str, int | float | str]) -> None:
        """In its configuration; it is started anew."""
        self._cell.write_config(host, config(host), {"live_migration": live})
        self._worker(host).restart()
        self._worker(host).wait_ready()
        wait_for(lambda: self.client.api.get_host_state(host=host).vcpus.total, 30.0, f"the hypervisor of {host}")

    def busy(self, instance: Instance) -> Instance:
        """It rewrites a sixth of its memory for ever."""
        return msgspec.structs.replace(instance, kernel_cmdline=f"quiet lab.dirty={DIRTY_MIB}")

    def hear(self, instance: str) -> Sequence[str]:
        """Files are held open: what is removed can still be read, and no other file gets its number."""
        held = self._heard.setdefault(instance, {})
        for node in self._cell.nodes.values():
            path = node.instances / instance / "console.log"
            try:
                number = path.stat().st_ino
                if number not in held:
                    held[number] = path.open(errors="replace")
            except OSError:
                # Not there, or just removed.
                continue
        for file in held.values():
            file.seek(0)
        return [file.read() for file in held.values()]

    def leftovers(self) -> list[str]:
        """What the oracle sees on the hosts."""
        return [line for node in self._cell.nodes.values() for line in oracle.leftovers(node)]

    def _worker(self, host: str):  # type: ignore[no-untyped-def]
        return next(w for w in self._cell.workers if w.node.name == host)


@contextmanager
def real_demo(out: Output) -> Iterator[RealDemo]:
    """The cell with its workers, up and answering; all of it is removed at the end."""
    began = time.monotonic()
    images = guest_images()
    # With certificates: disks go by NBD over TLS, and while the guest runs.
    with Cell(settings=Settings(nodes=2, tls=True)) as cell:
        for path in (images.kernel, images.initrd, images.data_qcow2, images.boot_qcow2):
            cell.add_image(path)
        for worker in [cell.start_worker(name, config(name)) for name in cell.nodes]:
            worker.wait_ready()
        relay = cell.relay()
        transport = get_transport(broker_url("rabbit", ADMINISTRATOR, "127.0.0.1", relay.port, cell.rabbit.vhost))
        try:
            client = Client(ComputeAPI(transport, timeout=15.0, retry=1), transport, discover=5.0)
            for name in cell.nodes:
                wait_for(lambda host=name: client.api.get_host_state(host=host).vcpus.total, 30.0,
                         f"the hypervisor of {name} to tell what it has")
            out.line(f"    up in {time.monotonic() - began:.1f} s: {', '.join(cell.nodes)}, RabbitMQ, two workers")
            yield RealDemo(cell, client, images)
        finally:
            transport.cleanup()


def main(arguments: Sequence[str]) -> int:
    lacking = missing()
    if lacking:
        print(f"compute-worker-demo: two real hosts need {'; '.join(lacking)}", end="", file=sys.stderr)
        if "--or-embedded" not in arguments:
            print(file=sys.stderr)
            return CANNOT
        print(f"; {INSTEAD}", file=sys.stderr)
        return embedded()
    interrupt_as_exit()
    # What kombu and oslo.messaging log in this process is not what the demo shows.
    logging.getLogger().setLevel(logging.CRITICAL)
    out = Output()
    out.line(f"compute-worker-demo: {RealDemo.title}")
    with real_demo(out) as cell:
        return 0 if play(Stage(cell, out), SCENES) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
