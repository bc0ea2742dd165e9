"""The scenario's cell in one process: simulated hosts, the broker in memory, no root, nothing to install."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from compute_worker.ctl.connect import Client
from compute_worker.ctl.text import amount
from compute_worker.demo.cell import Guest
from compute_worker.embedded import EmbeddedCell
from compute_worker.objects import ImageMeta, Instance
from compute_worker.states import PowerState
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated.faults import Stall
from compute_worker.virt.simulated.files import RESIZE
from compute_worker.virt.simulated.host import SimulatedHost

HOSTS = ("node1", "node2")
LATENCY_SECONDS = 0.02
SHUTDOWN_SECONDS = 0.3
DOWNLOAD_RATE = 256 * 1024
LINK_RATE = float(128 << 20)
"""Bytes a second that guests move with."""
IMAGE_BYTES = 64 * 1024
DISK_BYTES = 96 << 20
NOISE_BYTES = 64 * 1024
CUT_IN = "define"
PATIENCE_SECONDS = 10.0


class EmbeddedDemo:
    """See :class:`compute_worker.demo.cell.DemoCell`."""

    title = "two simulated hosts in this process"
    sends_ahead = ()
    line = "simulated hosts take each other's bytes as they are"
    killing = "the worker died, as by SIGKILL: its memory is lost"
    hosts = HOSTS
    guest = Guest(
        boot=r"^boot \w+$",
        tick=r"^tick (\d+)$",
        clean=r"^Power down$",
        memory_mb=128,
        patience=PATIENCE_SECONDS,
        still=0.3,
    )
    strict: Mapping[str, int | float | str] = {
        "bandwidth_mb": 128,
        "max_downtime_ms": 100,
        "completion_timeout": 0.75,
        "timeout_action": "force_complete",
    }
    kernel_image = ImageMeta(id="guest.qcow2", disk_format="qcow2", kernel_id="vmlinuz", ramdisk_id="initrd")
    disk_image = ImageMeta(id="boot.qcow2", disk_format="qcow2")

    def __init__(self, cell: EmbeddedCell) -> None:
        self._cell = cell
        self._stall: Stall | None = None
        self._heard: dict[str, list[str]] = {}
        self._hosts: dict[str, SimulatedHost] = {}
        for name in HOSTS:
            self._tune(name)
        self.client = Client(cell.api, cell.transport, cell.exchange, discover=5.0)

    def _tune(self, name: str) -> None:
        """Let it take its time, as a host does."""
        driver = self._cell.workers[name].manager.core.driver
        assert isinstance(driver, FakeDriver)
        host = self._hosts[name] = driver.simulated
        host.shutdown_seconds, host.rate = SHUTDOWN_SECONDS, DOWNLOAD_RATE
        host.link_rate = LINK_RATE

    def arm(self, host: str, instance: str) -> None:
        """The build will hang in a step until its worker dies."""
        self._stall = self._hosts[host].faults.stall(CUT_IN, instance)

    def until_under_way(self, host: str, operation: str) -> None:
        """Until it hangs."""
        assert self._stall is not None and self._stall.entered.wait(PATIENCE_SECONDS), "the build does not come so far"

    def kill_worker(self, host: str) -> None:
        """Its memory is lost; what it has written stays."""
        self._cell.kill(host)

    def start_worker(self, host: str) -> None:
        """On the same directory."""
        self._cell.start(host)
        self._tune(host)

    def alive(self, instance: str) -> object | None:
        """The clock, while a simulated host runs it."""
        runs = any(host.power_of(instance) is PowerState.RUNNING for host in self._hosts.values())
        return time.monotonic() if runs else None

    def root_disk_bytes(self, host: str, instance: str, console: str) -> int:
        """As the simulated host has it: its guests say nothing of their disks."""
        driver = self._cell.workers[host].manager.core.driver
        record = self.client.api.get_instance(instance, host=host)
        return next(d.virtual_size_bytes for d in driver.get_instance_disk_info(record).disks if d.name == "disk")

    def fill(self, host: str, instance: str) -> int:
        """At the end of what was written to it."""
        simulated = self._hosts[host]
        with simulated.cell.lock:
            disk = simulated.slots[instance].directories[""]["disk"]
            noise = hashlib.shake_256(instance.encode()).digest(NOISE_BYTES)
            simulated.write(instance, {"disk": msgspec.structs.replace(disk, data=disk.data + noise)})
        return NOISE_BYTES

    def compare(self, source: str, dest: str, instance: str) -> str:
        """What a guest would read."""
        before = self._hosts[source].read_disk(instance, suffix=RESIZE)
        after = self._hosts[dest].read_disk(instance)
        assert before == after, f"the disk on {dest} is another than the one that {source} has set aside"
        return f"{amount(len(after))} are the same"

    def policy(self, host: str, live: Mapping[str, int | float | str]) -> None:
        """At once."""
        driver = self._cell.workers[host].manager.core.driver
        assert isinstance(driver, FakeDriver)
        options = dataclasses.replace(driver._settings.live_migration, **live)  # type: ignore[arg-type]
        driver._settings = dataclasses.replace(driver._settings, live_migration=options)
        self._hosts[host].link_rate = float(options.bandwidth_mb << 20) or LINK_RATE

    def busy(self, instance: Instance) -> Instance:
        """All guests are, from now on."""
        for host in self._hosts.values():
            host.dirty_rate = 2 * LINK_RATE
        return instance

    def hear(self, instance: str) -> Sequence[str]:
        """What it would print now, added to what it did."""
        said = self._heard.setdefault(instance, [])
        for host in self._hosts.values():
            domain = host.domain(instance)
            if domain is not None and domain.memory is not None and domain.power is PowerState.RUNNING:
                said.append(f"tick {domain.memory.now()}\n")
        return ["".join(said)]

    def leftovers(self) -> list[str]:
        """What the simulated machines hold."""
        return [f"{name}: {left.kind} {left.where}" for name, host in self._hosts.items() for left in host.leftovers()]


def _qcow2(virtual_size: int, size: int) -> bytes:
    """The beginning of a qcow2 image of version 3, as far as the simulated hosts look at it."""
    head = b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(16) + virtual_size.to_bytes(8, "big")
    return head.ljust(size, b"\0")


@contextmanager
def embedded_demo() -> Iterator[EmbeddedDemo]:
    """The cell, up; its directory is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="compute-worker-demo-") as directory:
        images = Path(directory, "images")
        images.mkdir()
        for image in (EmbeddedDemo.kernel_image, EmbeddedDemo.disk_image):
            (images / image.id).write_bytes(_qcow2(DISK_BYTES, IMAGE_BYTES))
        for name in ("vmlinuz", "initrd"):
            (images / name).write_bytes(name.encode().ljust(IMAGE_BYTES, b"\0"))
        with EmbeddedCell(HOSTS, Path(directory), fake={"latency": LATENCY_SECONDS}) as cell:
            yield EmbeddedDemo(cell)
