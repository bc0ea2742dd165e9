"""A guest with as much data as is wanted on the first of two real hosts of the lab, and what is seen of its moves from
outside: what the hypervisors tell when, what the guest's console shows when, what the cable carried."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from common import CannotRun
from moves import Moved, ended, resize

from compute_worker.objects import Flavor, ImageMeta, Instance, Operation
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.lab.cell import Cell
from tests.lab.guest_images import DATA_MIB, MEMORY_MIB, GuestImages, guest_images
from tests.lab.rabbit import ADMINISTRATOR, broker_url
from tests.lab.requirements import missing
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH, Settings
from tests.lab.worker import Config, merge_config
from tests.waiting import wait_for

SOURCE, DESTINATION = "node1", "node2"
CONFIG: Config = {
    "images": {"file_path": IMAGES_PATH},
    "claims": {"reserved_host_memory_mb": 0},
    "compute": {"shutdown_retry_interval": 1.0},
}
MIB = 1 << 20
PIECE_MIB = 64
LOOK_SECONDS = 0.02
TICK = re.compile(rb"LAB: tick (\d+) up=")
EVENT = re.compile(r"^(\S+ \S+): event 'lifecycle' for domain \S+: (.*)$")
BARE_PORT = 10_801
TLS = "tls-creds-x509,id=tls0,dir=/etc/pki/qemu"


class Hosts:
    """Both hosts, under workers with the same options of [transfer]."""

    def __init__(self, cell: Cell, api: ComputeAPI, images: GuestImages) -> None:
        self.cell = cell
        self.api = api
        self.source, self.destination = cell[SOURCE], cell[DESTINATION]
        self._image = ImageMeta(
            id=images.data_qcow2.name, disk_format="qcow2", kernel_id=images.kernel.name, ramdisk_id=images.initrd.name
        )

    def use(self, more: Config | None = None, **transfer: Any) -> None:
        """Start both workers (again) with these options of [transfer], and ``more``."""
        self.cell.stop_workers()
        config = merge_config(CONFIG, {"transfer": transfer}, more or {})
        for worker in [self.cell.start_worker(name, config) for name in (SOURCE, DESTINATION)]:
            worker.wait_ready(60)
        for name in (SOURCE, DESTINATION):
            wait_for(lambda host=name: self.api.get_host_state(host=host).vcpus.total, 30, f"{name} to say what it has")

    def written(self, mib: int, root_gb: int | None = None) -> Instance:
        """A guest that runs, whose overlay holds ``mib`` MiB past its file system that do not compress; its disk is as
        large as that needs, or ``root_gb``."""
        root_gb = root_gb or -(-(mib + DATA_MIB) // 1024)
        instance = Instance(
            uuid=str(uuid.uuid4()), name="bench", image=self._image, kernel_cmdline="quiet lab.noga",
            flavor=Flavor(vcpus=1, memory_mb=MEMORY_MIB, root_gb=root_gb),
        )  # fmt: skip
        self._do("build_and_run_instance", instance)
        self.wait_tick(instance)
        self._do("stop_instance", instance.uuid)
        self._fill(f"{INSTANCES_PATH}/{instance.uuid}/disk", mib)
        self._do("start_instance", instance.uuid)
        self.wait_tick(instance)
        return self.api.get_instance(instance.uuid, host=SOURCE)

    def _fill(self, disk: str, mib: int) -> None:
        for at in range(0, mib, PIECE_MIB):
            count = min(PIECE_MIB, mib - at)
            write = shlex.quote(f"write -q -s /var/tmp/random {DATA_MIB + at}M {count}M")
            script = f"head -c {count}M /dev/urandom > /var/tmp/random; qemu-io -f qcow2 -c {write} {disk}"
            self.source.run("sh", "-ec", script)
        self.source.run("sh", "-ec", f"rm -f /var/tmp/random; sync -f {disk}", timeout=300)

    def _do(self, method: str, what: Any) -> Operation:
        accepted = getattr(self.api, method)(what, host=SOURCE)
        return ended(self.api, str(accepted.operation), SOURCE)

    def wait_tick(self, instance: Instance) -> None:
        """Until the guest has ticked on the source since its last boot."""
        console = self.source.instances / instance.uuid / "console.log"

        def ticked() -> bool:
            said = console.read_bytes() if console.exists() else b""
            return TICK.search(said, max(0, said.rfind(b"LAB: BOOT OK"))) is not None and b"LAB: BOOT OK" in said

        wait_for(ticked, 120, f"{instance.uuid} to tick")

    def resize(self, instance: Instance) -> Moved:
        """To the other host, with one more GiB."""
        larger = msgspec.structs.replace(instance.flavor, root_gb=instance.flavor.root_gb + 1)
        return resize(self.api, instance, SOURCE, DESTINATION, larger)

    def restart(self, instance: Instance) -> tuple[Operation, Operation]:
        """Off and on again where it is: the two operations."""
        return self._do("stop_instance", instance.uuid), self._do("start_instance", instance.uuid)

    def revert(self, instance: Instance, moved: Moved) -> None:
        """Back to the source as it was; returns when it ticks there."""
        accepted = self.api.revert_resize(instance.uuid, moved.migration.uuid, host=DESTINATION)
        ended(self.api, str(accepted.operation), DESTINATION)
        wait_for(lambda: not self.api.list_operations(open_only=True, host=SOURCE), 60, "the source to have it back")
        self.wait_tick(instance)

    def delete(self, instance: Instance) -> None:
        """Remove it from the source."""
        self._do("terminate_instance", instance.uuid)

    def allocated(self, path: str) -> int:
        """Bytes that a file of the source occupies."""
        return int(self.source.run("stat", "--format=%b", path).stdout) * 512

    def carried(self) -> tuple[int, int]:
        """Bytes on the source's cable so far: from it, to it."""
        counters = self.cell.hub.ns.path(f"/sys/class/net/v{SOURCE}/statistics")
        return int((counters / "rx_bytes").read_text()), int((counters / "tx_bytes").read_text())


@contextmanager
def hosts() -> Iterator[Hosts]:
    """The cell with certificates, no worker yet; all of it is removed at the end.

    :raises CannotRun: this machine cannot hold it.
    """
    if lacking := missing():
        raise CannotRun(f"real libvirt hosts need {'; '.join(lacking)}")
    images = guest_images()
    with Cell(settings=Settings(nodes=2, tls=True)) as cell:
        for path in (images.kernel, images.initrd, images.data_qcow2):
            cell.add_image(path)
        transport = get_transport(
            broker_url("rabbit", ADMINISTRATOR, "127.0.0.1", cell.relay().port, cell.rabbit.vhost)
        )
        try:
            yield Hosts(cell, ComputeAPI(transport, timeout=90), images)
        finally:
            transport.cleanup()


# --- bare tools -----------------------------------------------------------------------------------------------------


def convert_over_nbd(made: Hosts, path: str, tls: bool, in_use: bool = False) -> tuple[float, int]:
    """``qemu-img convert -n -W -m 16`` of a file of the source into a new raw file behind a ``qemu-nbd`` of the
    destination, flushed there: seconds, and the bytes that left the source meanwhile.

    :param in_use: a guest has the file open: the copy is worth nothing, its speed is.
    """
    target, node = "/var/tmp/bare", made.destination
    size = made.source.run("stat", "--format=%s", path).stdout.strip()
    node.run("truncate", "-s", size, target)
    serve = ["qemu-nbd", "--format=raw", f"--port={BARE_PORT}", "--export-name=bare"]
    serve += ["--object", f"{TLS},endpoint=server,verify-peer=yes", "--tls-creds=tls0"] if tls else []
    process = node.ns.popen([*serve, target])
    try:
        wait_for(lambda: f":{BARE_PORT} " in node.run("ss", "-ltn").stdout, 20, "qemu-nbd to listen")
        options = ["--object", f"{TLS},endpoint=client"] if tls else []
        where = f"driver=nbd,host={DESTINATION},port={BARE_PORT},export=bare" + (",tls-creds=tls0" if tls else "")
        options += ["-U"] if in_use else []
        argv = ["qemu-img", "convert", "-n", "-W", "-m", "16", "-t", "writeback", "--target-is-zero", *options]
        return _timed(made, [*argv, "-f", "raw", "--target-image-opts", path, where])
    finally:
        for server in node.ns.processes(rf"qemu-nbd .*--port={BARE_PORT}"):
            server.signal(signal.SIGTERM)
        process.wait(20)
        node.run("rm", "-f", target)


def rsync_over_ssh(made: Hosts, path: str) -> tuple[float, int]:
    """``rsync --sparse`` of a file of the source to the destination, and ``sync`` there; returns what
    :func:`convert_over_nbd` does."""
    target = f"{DESTINATION}:/var/tmp/bare"
    script = f"rsync --sparse {path} {target} && ssh {DESTINATION} sync /var/tmp/bare"
    try:
        return _timed(made, ["sh", "-ec", script])
    finally:
        made.destination.run("rm", "-f", "/var/tmp/bare")


def _timed(made: Hosts, argv: list[str]) -> tuple[float, int]:
    before, began = made.carried()[0], time.perf_counter()
    made.source.run(*argv, timeout=600)
    return time.perf_counter() - began, made.carried()[0] - before


# --- what is seen ---------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What was seen of one guest, in seconds since the epoch. ``events``: host, time, what libvirt told; ``ticks``:
    host, time, number; ``carried``: time, bytes from the source so far."""

    events: list[tuple[str, float, str]] = field(default_factory=list)
    ticks: list[tuple[str, float, int]] = field(default_factory=list)
    carried: list[tuple[float, int]] = field(default_factory=list)

    def event(self, host: str, word: str, after: float = 0.0) -> float:
        """When libvirt of a host first told of ``word`` after a time.

        :raises AssertionError: it did not.
        """
        found = [when for where, when, what in self.events if where == host and word in what and when >= after]
        if not found:
            raise AssertionError(f"{host} did not tell {word!r}: {self.events}")
        return min(found)

    def tick_gap(self, host: str, other: str, off: float) -> float:
        """Seconds between the last tick on ``host`` before ``off`` and the first one on ``other`` after it."""
        last = max(when for where, when, _ in self.ticks if where == host and when <= off)
        return min(when for where, when, _ in self.ticks if where == other and when > off) - last

    def sent(self, begin: float, end: float) -> int:
        """Bytes that left the source between two times."""
        before = max((count for when, count in self.carried if when <= begin), default=self.carried[0][1])
        return max(count for when, count in self.carried if when <= end) - before


class Watch:
    """Looks at both hosts, fifty times a second. Use it as a context; everything is told when it has ended."""

    def __init__(self, made: Hosts, instance: Instance) -> None:
        self.seen = Seen()
        self._made = made
        self._uuid = instance.uuid
        self._stop = threading.Event()
        self._read: dict[tuple[str, int], int] = {}
        self._thread = threading.Thread(target=self._look, name="watch")
        self._listening: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Watch:
        for node in (self._made.source, self._made.destination):
            argv = ["virsh", "-c", node.uri, "event", "--event", "lifecycle", "--loop", "--timestamp"]
            self._listening[node.name] = subprocess.Popen(
                ["stdbuf", "-oL", *argv], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
            )
        # What the consoles hold by now is not new.
        self._consoles(lambda host, when, number: None)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for host, process in self._listening.items():
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=20)
            self.seen.events += [(host, *event) for event in map(_event, said.splitlines()) if event is not None]

    def wait_tick(self, host: str, after: float) -> None:
        """Until it has ticked on a host after a time."""
        ticks = self.seen.ticks
        wait_for(lambda: any(where == host and when > after for where, when, _ in ticks), 120, f"a tick on {host}")

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self.seen.carried.append((time.time(), self._made.carried()[0]))
            self._consoles(lambda host, when, number: self.seen.ticks.append((host, when, number)))

    def _consoles(self, tell: Any) -> None:
        for node in (self._made.source, self._made.destination):
            for directory in (self._uuid, f"{self._uuid}_resize"):
                try:
                    with open(node.instances / directory / "console.log", "rb") as console:
                        self._new_ticks(node.name, console, tell)
                except OSError:
                    continue

    def _new_ticks(self, host: str, console: Any, tell: Any) -> None:
        key = (host, os.fstat(console.fileno()).st_ino)
        console.seek(self._read.get(key, 0))
        said = console.read()
        whole = said.rfind(b"\n") + 1
        self._read[key] = self._read.get(key, 0) + whole
        for match in TICK.finditer(said[:whole]):
            tell(host, time.time(), int(match.group(1)))


def _event(line: str) -> tuple[float, str] | None:
    match = EVENT.match(line)
    if match is None:
        return None
    when = datetime.datetime.strptime(match.group(1), "%Y-%m-%d %H:%M:%S.%f%z")
    return when.timestamp(), match.group(2)
