"""The oracle: says from outside what is true of the hosts, whatever the worker believes."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.lab.namespaces import LabError
from tests.lab.node import Node

SECTOR = 512
LINUX_PARTITION = 0x83
# What an instances directory may always hold; everything else belongs to an instance.
SHARED_NAMES = frozenset({"_base", "locks", "directory.id"})
OWN_INTERFACES = frozenset({"lo", "eth0", "br0"})


@dataclass(frozen=True)
class QemuProcess:
    """A qemu as the host's process table shows it."""

    uuid: str
    name: str
    pid: int
    incoming: bool


@dataclass(frozen=True)
class Domain:
    """A domain as the host's libvirt shows it; `state` in virsh's words."""

    uuid: str
    state: str
    persistent: bool


def qemu_processes(node: Node) -> list[QemuProcess]:
    """Every qemu guest of the host, by its command line; two of one uuid are two entries."""
    found = []
    for process in node.ns.processes(r"^\S*qemu-system-\S+ .*-uuid "):
        argv = process.argv
        uuid = argv[argv.index("-uuid") + 1]
        guest = re.search(r"guest=([^,]*)", argv[argv.index("-name") + 1])
        found.append(QemuProcess(uuid, guest.group(1) if guest else "", process.pid,
                                 "-incoming" in argv))
    return found


def domains(node: Node) -> dict[str, Domain]:
    """Every domain of the host's libvirt, running or not, by uuid."""
    found = {}
    for uuid in node.virsh("list", "--all", "--uuid").stdout.split():
        info = node.virsh("dominfo", uuid, check=False)
        fields = dict(re.findall(r"^(\w[\w ]*):\s+(.*)$", info.stdout, re.MULTILINE))
        if info.returncode == 0:
            found[uuid] = Domain(uuid, fields["State"], fields["Persistent"] == "yes")
    return found


def where_running(nodes: Iterable[Node]) -> dict[str, list[str]]:
    """Per uuid the hosts with a qemu for it; a host that is off runs nothing."""
    where: dict[str, list[str]] = {}
    for node in nodes:
        if node.ns.alive:
            for process in qemu_processes(node):
                where.setdefault(process.uuid, []).append(node.name)
    return where


def files(node: Node, uuid: str) -> list[str]:
    """Everything below the instances directory that carries the uuid, relative to it."""
    return [name for name in _below(node.instances) if uuid in name]


def _below(root: Path) -> list[str]:
    """Everything below a directory, also while somebody removes it."""
    return sorted(os.path.relpath(os.path.join(above, name), root)
                  for above, directories, names in os.walk(root) for name in (*directories, *names))


def interfaces(node: Node) -> list[str]:
    """The host's network interfaces besides its own: those of guests."""
    return sorted(set(os.listdir(node.path("/sys/class/net"))) - OWN_INTERFACES)


def leftovers(node: Node) -> list[str]:
    """What an idle host must not have: guests, domains, instance files, part files, taps."""
    if not node.ns.alive:
        return [f"{node.name} is off"]
    found = [f"{node.name}: qemu {p.uuid} (pid {p.pid})" for p in qemu_processes(node)]
    found += [f"{node.name}: domain {d.uuid} {d.state}" for d in domains(node).values()]
    found += [f"{node.name}: interface {name}" for name in interfaces(node)]
    root = node.instances
    found += [f"{node.name}: {path.name}" for path in root.iterdir()
              if path.name not in SHARED_NAMES]
    found += [f"{node.name}: {name}" for name in _below(root) if name.endswith(".part")]
    return sorted(found)


@dataclass(frozen=True)
class Boot:
    """One boot of the guest, as its console told."""

    number: int
    ticks: tuple[int, ...]
    clean_shutdown: bool


def boots(console: str) -> list[Boot]:
    """The boots a console log holds, in order.

    Ticks before the first boot line (a guest that arrived by live migration) are a boot with
    number 0.
    """
    found: list[Boot] = []
    number, clean, begun = 0, False, False
    ticks: list[int] = []
    line_re = re.compile(r"LAB: (?:BOOT OK boots=(\d+)|tick (\d+) up=|(CLEAN SHUTDOWN))")
    for match in line_re.finditer(console):
        boot, tick, shutdown = match.groups()
        if boot is not None:
            if begun:
                found.append(Boot(number, tuple(ticks), clean))
            number, ticks, clean = int(boot), [], False
        elif tick is not None:
            ticks.append(int(tick))
        elif shutdown:
            clean = True
        begun = True
    if begun:
        found.append(Boot(number, tuple(ticks), clean))
    return found


def continuity_problems(console: str) -> list[str]:
    """What a console says against one uninterrupted counter: gaps, repeats, lost writes.

    A tick is printed after its write, so a killed guest may have written one more than it said.
    """
    problems = []
    last: int | None = None
    for boot in boots(console):
        for position, tick in enumerate(boot.ticks):
            if last is not None:
                allowed = {last + 1} if position else {last + 1, last + 2}
                if tick not in allowed:
                    problems.append(f"boot {boot.number}: tick {tick} after {last}")
            last = tick
    return problems


def double_run(console_a: str, console_b: str) -> list[int]:
    """Ticks that two hosts' consoles of one guest both show: it ran twice."""
    ticks_a = {tick for boot in boots(console_a) for tick in boot.ticks}
    ticks_b = {tick for boot in boots(console_b) for tick in boot.ticks}
    return sorted(ticks_a & ticks_b)


def seen_disks(console: str) -> dict[str, dict[str, str]]:
    """The block devices the guest saw at its last boot: name -> size, label, fs, ro, serial."""
    found = {}
    for name, rest in re.findall(r"LAB: disk (\w+) ([^\r\n]*)", _last_boot(console)):
        found[name] = dict(re.findall(r"(\w+)=(\S*)", rest))
    return found


def seen_nics(console: str) -> list[str]:
    """The MAC addresses the guest saw at its last boot."""
    return re.findall(r"LAB: nic \w+ mac=(\S+)", _last_boot(console))


def seen_config_drive(console: str) -> dict[str, str]:
    """uuid, device and meta_data (JSON text) of the config drive at the last boot; or empty."""
    text = _last_boot(console)
    head = re.search(r"LAB: configdrive uuid=(\S+) device=(\S+)", text)
    if not head:
        return {}
    meta = re.search(r"LAB: configdrive meta_data=([^\r\n]*)", text)
    return {"uuid": head.group(1), "device": head.group(2),
            "meta_data": meta.group(1) if meta else ""}


def _last_boot(console: str) -> str:
    return console[max(console.rfind("LAB: cmdline"), 0):]


def read_console(node: Node, uuid: str) -> str:
    """console.log of an instance with its rolled-over parts, oldest first; read as root."""
    directory = node.instances / uuid
    parts = sorted(directory.glob("console.log*"), reverse=True)
    return "".join(part.read_text(errors="replace") for part in parts)


def counter(disk: Path, disk_format: str = "raw") -> int:
    """The guest's counter on a disk image, read without mounting; see `read_guest_file`."""
    return int(read_guest_file(disk, "/counter", disk_format))


def counter_on(node: Node, inside: str, disk_format: str) -> int:
    """The counter on a disk of a host that is up, also with a backing file or a running guest."""
    copy = f"/var/tmp/lab-oracle-{os.getpid()}.raw"
    try:
        node.run("qemu-img", "convert", "-U", "-f", disk_format, "-O", "raw", inside, copy)
        return counter(node.path(copy))
    finally:
        node.run("rm", "-f", copy)


def read_guest_file(disk: Path, name: str, disk_format: str = "raw") -> str:
    """A file of the guest's ext4 on an image; the image is not changed.

    Works on a copy, on which the file system's journal is replayed first: what the guest
    fsynced may be nowhere else.  Raises LabError when the file is not there.
    """
    with tempfile.TemporaryDirectory(prefix="lab-oracle-") as work:
        copy = Path(work) / "disk.raw"
        _run("qemu-img", "convert", "-U", "-f", disk_format, "-O", "raw", str(disk), str(copy))
        offset = _linux_partition(copy)
        if offset:
            part = Path(work) / "part.raw"
            with open(copy, "rb") as source, open(part, "wb") as target:
                source.seek(offset)
                shutil.copyfileobj(source, target, 1024 * 1024)
            copy = part
        _run("e2fsck", "-p", "-E", "journal_only", str(copy), allowed=(0, 1))
        done = _run("debugfs", "-R", f"cat {name}", str(copy))
        if "File not found" in done.stderr:
            raise LabError(f"no {name} on {disk}: {done.stderr.strip()}")
        return done.stdout


def _linux_partition(disk: Path) -> int:
    """Where the first Linux partition starts, in bytes; 0 without a partition table."""
    with open(disk, "rb") as image:
        sector = image.read(SECTOR)
    if len(sector) < SECTOR or sector[510:] != b"\x55\xaa":
        return 0
    for entry in range(4):
        kind, start = struct.unpack_from("<4xB3xI", sector, 446 + 16 * entry)
        if kind == LINUX_PARTITION:
            return int(start) * SECTOR
    return 0


def _run(*argv: str, allowed: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    path = "/usr/sbin:/sbin:" + os.environ.get("PATH", "/usr/bin:/bin")
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=60,
                          check=False, stdin=subprocess.DEVNULL,
                          env={"PATH": path, "LANG": "C.UTF-8"})
    if done.returncode not in allowed:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done
