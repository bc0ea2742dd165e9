"""Faults, all inside the namespaces.  Each is a context manager: leaving it undoes the fault."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.lab.namespaces import LabError, Process
from tests.lab.node import Node
from tests.lab.settings import INSTANCES_PATH, WORKER_UID
from tests.waiting import wait_for

DROP_TABLE = "inet lab_drop"
LOSS_TABLE = "inet lab_loss"
MUTE_TABLE = "inet lab_mute"


def set_link(node: Node, up: bool) -> None:
    """Pull a host's cable, or put it back: a partition, silent for both sides."""
    node.hub.cable(node.name, up)


@contextmanager
def link_down(node: Node) -> Iterator[None]:
    set_link(node, False)
    try:
        yield
    finally:
        set_link(node, True)


def drop_ports(node: Node, ports: Sequence[int]) -> None:
    """Drop TCP from and to these ports at the host, both ways; replaces an earlier drop."""
    listed = ", ".join(str(port) for port in ports)
    rules = [f"tcp {end} {{ {listed} }} drop" for end in ("dport", "sport")]
    _set_table(node, DROP_TABLE, rules)


def clear_drops(node: Node) -> None:
    _delete_table(node, DROP_TABLE)


@contextmanager
def ports_dropped(node: Node, *ports: int) -> Iterator[None]:
    drop_ports(node, ports)
    try:
        yield
    finally:
        clear_drops(node)


@contextmanager
def muted(node: Node, *ports: int) -> Iterator[None]:
    """What the host sends from or to these TCP ports is dropped; what is sent to it arrives."""
    listed = ", ".join(str(port) for port in ports)
    rules = [f"tcp {end} {{ {listed} }} drop" for end in ("dport", "sport")]
    _set_table(node, MUTE_TABLE, rules, {"output": "oifname"})
    try:
        yield
    finally:
        _delete_table(node, MUTE_TABLE)


def set_loss(node: Node, percent: int) -> None:
    """Lose this share of the host's packets, both ways; 0 ends it."""
    if percent:
        _set_table(node, LOSS_TABLE, [f"numgen random mod 100 < {percent} drop"])
    else:
        _delete_table(node, LOSS_TABLE)


def set_rate(node: Node, kilobits: int) -> None:
    """Cap what the host sends, in kbit/s; 0 ends it."""
    node.run("tc", "qdisc", "del", "dev", "eth0", "root", check=False)
    if kilobits:
        node.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", f"{kilobits}kbit",
                 "burst", "32kb", "latency", "400ms")


_BOTH_WAYS = {"input": "iifname", "output": "oifname"}


def _set_table(node: Node, table: str, rules: Sequence[str], hooks: Mapping[str, str] = _BOTH_WAYS) -> None:
    _delete_table(node, table)
    chains = []
    for hook, direction in hooks.items():
        body = "; ".join(f"{direction} br0 {rule}" for rule in rules)
        chains.append(f"chain {hook} {{ type filter hook {hook} priority 0; {body}; }}")
    body = "\n".join(chains)
    node.run("nft", "-f", "-", stdin=f"table {table} {{\n{body}\n}}\n")


def _delete_table(node: Node, table: str) -> None:
    node.run("nft", "delete", "table", *table.split(), check=False)


def small_disk(node: Node, mebibytes: int, path: str = INSTANCES_PATH) -> None:
    """Put a file system of this size over a directory of the host: it fills up soon."""
    options = f"size={mebibytes}m,mode=700,uid={WORKER_UID},gid={WORKER_UID}"
    node.run("mount", "-t", "tmpfs", "-o", options, "lab-small", path)


def usual_disk(node: Node, path: str = INSTANCES_PATH) -> None:
    """Take the small disk away again, with what is on it."""
    # A process that just ended may hold it for a moment.
    wait_for(lambda: node.run("umount", path, check=False).returncode == 0, 10.0,
             f"umount of {path} on {node.name}")


@contextmanager
def disk_of(node: Node, mebibytes: int, path: str = INSTANCES_PATH) -> Iterator[None]:
    small_disk(node, mebibytes, path)
    try:
        yield
    finally:
        usual_disk(node, path)


def signal_processes(node: Node, pattern: str, number: int) -> list[Process]:
    """Send a signal to the host's processes whose command line matches; at least one must."""
    found = node.ns.processes(pattern)
    if not found:
        raise LabError(f"{node.name} has no process that matches {pattern!r}")
    for process in found:
        process.signal(number)
    return found


@contextmanager
def frozen(node: Node, pattern: str) -> Iterator[list[Process]]:
    """SIGSTOP on entry, SIGCONT on leaving, to the same processes."""
    found = signal_processes(node, pattern, signal.SIGSTOP)
    try:
        yield found
    finally:
        for process in found:
            process.signal(signal.SIGCONT)


def qemu_pattern(uuid: str) -> str:
    """Matches the qemu process of one guest."""
    return rf"qemu-system-\S+ .*-uuid {re.escape(uuid)}"


def heal(node: Node) -> list[str]:
    """Undo every fault of the network and the disk that is still there; says which."""
    healed = []
    tables = node.run("nft", "list", "tables").stdout
    for table in (DROP_TABLE, LOSS_TABLE, MUTE_TABLE):
        if table in tables:
            _delete_table(node, table)
            healed.append(f"table {table}")
    if "tbf" in node.run("tc", "qdisc", "show", "dev", "eth0").stdout:
        set_rate(node, 0)
        healed.append("rate")
    if node.path("/sys/class/net/eth0/carrier").read_text().strip() != "1":
        set_link(node, True)
        healed.append("link")
    mounts = Path(f"/proc/{node.ns.pid}/mounts").read_text()
    for path in re.findall(r"^lab-small (\S+) ", mounts, re.MULTILINE):
        with suppress(AssertionError):
            usual_disk(node, path)
        healed.append(f"small disk on {path}")
    return healed
