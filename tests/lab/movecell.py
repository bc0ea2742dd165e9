"""Two hosts under real workers, and one guest that moves between them: what became of it, from outside."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from compute_worker import errors
from compute_worker.objects import Flavor, Instance, Migration
from compute_worker.states import OperationState
from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import MEMORY_MIB, GuestImages
from tests.lab.killcell import PATIENCE, KillHost, kill_hosts
from tests.lab.namespaces import LabError
from tests.lab.node import Node
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH, WORKER_UID, Settings
from tests.lab.worker import Config, merge_config
from tests.waiting import wait_for

SOURCE, DESTINATION = "node1", "node2"
MIB = 1 << 20
FLAVOR = Flavor(vcpus=1, memory_mb=MEMORY_MIB, root_gb=1, ephemeral_gb=1, swap_mb=8)
FILLER_AT = 200 * MIB
"""Where the root disk has bytes of which the guest knows nothing."""
CONFIG: Config = {
    "compute": {"peer_ask_interval": 1.0},
    "transfer": {"window_mb": 4, "bandwidth_mb": 16, "resize_precopy": "never"},
}
SETTLED = 30.0
"""Seconds after which, with every host back, nothing may be open any more."""
BUSY = r"^(\S*/)?(qemu-nbd|qemu-img|rsync|ssh|cp)( |$)|^sshd: \S+@"
"""Processes that only a transfer has."""
_LOOK_SECONDS = 0.1


def at(kind: str, step: str, point: str, direction: str = "do") -> str:
    return f"{kind}:{step}:{direction}:{point}"


FILL = at("build_and_run_instance", "start_paused", "before_do")
COMMIT = at("prep_resize", "commit", "before_record")


class Watch(threading.Thread):
    """Looks at both hosts until it is told to stop: two copies of one guest that run, and every console there was."""

    def __init__(self, nodes: list[Node], uuid: str, shared: bool) -> None:
        super().__init__(name="watch", daemon=True)
        self._nodes = nodes
        self._uuid = uuid
        self._shared = shared
        self._end = threading.Event()
        self._consoles: dict[int, str] = {}
        self._spoken_on: dict[int, str] = {}
        self.twice: list[list[str]] = []
        self.ticked: list[tuple[float, str, int]] = []
        """When which host's console showed which tick first."""

    def run(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            try:
                self._look()
            except (OSError, LabError):
                # A host is just going off.
                continue

    def _look(self) -> None:
        where = oracle.where_running(self._nodes).get(self._uuid, [])
        if len(where) > 1 and self._go_on():
            self.twice.append(where)
        for node in self._nodes:
            for path in sorted(node.instances.glob(f"{self._uuid}*/console.log")):
                # The nodes' disks are one file system of the machine's: a file keeps its number when it is set aside.
                file, text = path.stat().st_ino, path.read_text(errors="replace")
                host = self._spoken_on.get(file) or ((where or [""])[0] if self._shared else node.name)
                if host and text and text != self._consoles.get(file):
                    self._spoken_on[file], self._consoles[file] = host, text
                    self._note(host, text)

    def _go_on(self) -> bool:
        """Whether more than one of them really goes on: one that never ran may stand by, paused."""
        states = [node.virsh("domstate", self._uuid, check=False).stdout.strip() for node in self._nodes]
        return states.count("running") > 1

    def _note(self, host: str, text: str) -> None:
        ticks = [tick for boot in oracle.boots(text) for tick in boot.ticks]
        if ticks and (not self.ticked or self.ticked[-1][1:] != (host, ticks[-1])):
            self.ticked.append((time.monotonic(), host, ticks[-1]))

    def console(self, host: str) -> str:
        """Everything that the guest said on a host in its last visit there, also where that is set aside."""
        files = [file for file, name in self._spoken_on.items() if name == host]
        return self._consoles[files[-1]] if files else ""

    def boots(self, host: str) -> list[oracle.Boot]:
        return oracle.boots(self.console(host))

    def gap(self) -> float:
        """Seconds between the last tick on one host and the first on the other, as seen from outside."""
        moves = [b[0] - a[0] for a, b in zip(self.ticked, self.ticked[1:], strict=False) if a[1] != b[1]]
        return max(moves, default=0.0)

    def stop(self) -> None:
        self._end.set()
        self.join()


class MoveCell:
    """``source`` and ``destination``; see :class:`KillHost`."""

    def __init__(self, cell: Cell, source: KillHost, destination: KillHost) -> None:
        self.cell = cell
        self.source = source
        self.destination = destination
        self.api = source.api
        self.hosts = (source, destination)
        self.filler = hashlib.sha256()
        self.filler_bytes = 0
        self.shared = False
        self._marks: dict[str, list[str]] = {}
        self._watch: Watch | None = None

    def host(self, name: str) -> KillHost:
        return next(host for host in self.hosts if host.name == name)

    @property
    def watch(self) -> Watch:
        assert self._watch is not None, "nothing was booted"
        return self._watch

    def start(self, *, kill_at: str = "", hold_at: str = "", **config: Any) -> None:
        """Start both workers; groups of options by name (``transfer={...}``). Points need no host: each kind of
        operation has its own."""
        holds = ",".join(filter(None, (FILL, hold_at)))
        for host in self.hosts:
            host.start(kill_at=kill_at, hold_at=holds, config=merge_config(CONFIG, config))

    def watching(self, instance: Instance) -> Watch:
        return Watch([host.node for host in self.hosts], instance.uuid, self.shared)

    def stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def stop(self) -> None:
        """A clean end of workers and watch, and what the watch saw all the time."""
        self.stop_watch()
        if self._watch is not None:
            assert self._watch.twice == [], "two copies ran at once"
        for host in self.hosts:
            host.stop()

    # --- the guest ----------------------------------------------------------------------------------------------

    def boot(
        self, filler_mib: int = 16, prepare: Callable[[Instance], None] = lambda instance: None, **changes: Any
    ) -> Instance:
        """The guest runs on the source and has ticked; its root disk has ``filler_mib`` of noise, and what ``prepare``
        did to it before the guest ever ran."""
        instance = self.source.instance(**changes)
        self._watch = self.watching(instance)
        self._watch.start()
        operation = self.source.send("build_and_run_instance", instance)
        self.source.wait_held(FILL)
        self.fill(instance, filler_mib)
        prepare(instance)
        self.source.release(FILL)
        ended = self.source.outcome(operation)
        assert ended.state is OperationState.DONE, ended
        self.wait_boot(SOURCE, 1)
        return instance

    def fill(self, instance: Instance, mebibytes: int) -> None:
        """Noise on a disk that nobody has open."""
        if not mebibytes:
            return
        data = hashlib.shake_256(uuid.UUID(instance.uuid).bytes).digest(mebibytes * MIB)
        self.write(instance, FILLER_AT, data)
        self.filler, self.filler_bytes = hashlib.sha256(data), len(data)

    def write(self, instance: Instance, at: int, data: bytes) -> None:
        """Bytes on the root disk of a guest that does not run yet."""
        node, copy = self.source.node, "/var/tmp/written"
        node.path(copy).write_bytes(data)
        form = self.disks(SOURCE, instance.uuid)["disk"]
        command = f"write -q -s {copy} {at} {len(data)}"
        node.run("qemu-io", "-f", form, "-c", command, self._inside(instance, "disk"))
        node.path(copy).unlink()

    def wait_boot(self, host: str, number: int, ticks: int = 2) -> oracle.Boot:
        """The guest is in the ``number``-th boot of its life, on this host, and has ticked."""

        def ticked() -> oracle.Boot | None:
            self.source.revive()
            found = [b for b in self.watch.boots(host)[-1:] if b.number == number and len(b.ticks) >= ticks]
            return found[0] if found else None

        boot = wait_for(ticked, PATIENCE, f"boot {number} on {host}")
        assert boot is not None
        return boot

    # --- commands -----------------------------------------------------------------------------------------------

    def migration(self, instance: Instance, **changes: Any) -> Migration:
        fields: dict[str, Any] = {
            "uuid": str(uuid.uuid4()),
            "instance": instance.uuid,
            "migration_type": "resize",
            "source_host": SOURCE,
            "dest_host": DESTINATION,
            "new_flavor": msgspec.structs.replace(instance.flavor, name="bigger", root_gb=2, ephemeral_gb=2),
        }
        return Migration(**(fields | changes))

    def resize(self, instance: Instance, **changes: Any) -> tuple[Migration, str]:
        """Send ``prep_resize`` with the record as the source has it; the move and its operation."""
        migration = self.migration(instance, **changes)
        record = self.api.get_instance(instance.uuid, host=SOURCE)
        return migration, self.destination.send("prep_resize", record, migration)

    def ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What a worker answers; one that has just died is started again and asked again."""

        def answered() -> list[Any]:
            self.source.revive()
            try:
                return [getattr(self.api, method)(*arguments, **named)]
            except (errors.PeerUnavailable, errors.MessageUndeliverable):
                return []

        return (wait_for(answered, SETTLED, f"an answer to {method}") or [None])[0]

    def steps(self, host: str, operation: str) -> list[tuple[str, str, float]]:
        """The journal's lines of an operation: step, direction, seconds."""
        found = self.ask("get_operation", operation, host=host).steps
        return [(s.name, s.direction, round((s.ended_at or s.started_at) - s.started_at, 2)) for s in found]

    def blackout(self, operation: str) -> float:
        """Seconds from the request to shut down at the source to the start at the destination, by the journals."""
        off = next(s for s in self.api.get_operation(operation, host=SOURCE).steps if s.name == "power_off")
        on = next(s for s in self.api.get_operation(operation, host=DESTINATION).steps if s.name == "resume_guest")
        return (on.ended_at or 0.0) - off.started_at

    def resized(self, instance: Instance, operation: str, patience: float = PATIENCE) -> None:
        """Both hosts say that it is done, and told it once."""
        for host in (self.destination, self.source):
            ended = host.outcome(operation, patience)
            print(host.name, self.steps(host.name, operation))
            assert ended.state is OperationState.DONE, (host.name, ended)
        self.destination.assert_ended_once(instance, operation, "instance.resize_prep.end")
        self.source.assert_ended_once(instance, operation, "instance.resize.end")

    def undone(self, instance: Instance, operation: str, patience: float = PATIENCE) -> None:
        """Both hosts say that it came to nothing, and told it once; the destination has nothing of it."""
        for host in (self.destination, self.source):
            ended = host.outcome(operation, patience)
            print(host.name, self.steps(host.name, operation), ended.error)
            assert ended.state is OperationState.UNDONE, (host.name, ended)
        self.destination.assert_ended_once(instance, operation, "instance.resize_prep.error")
        self.source.assert_ended_once(instance, operation, "instance.resize.error")
        self.wait_clean(DESTINATION, instance)

    def confirm(self, instance: Instance, migration: Migration) -> None:
        self.destination.do("confirm_resize", instance.uuid, migration.uuid)
        self.wait_clean(SOURCE, instance)
        self.assert_owner(instance, DESTINATION, "active")

    def revert(self, instance: Instance, migration: Migration) -> None:
        operation = self.destination.do("revert_resize", instance.uuid, migration.uuid)
        ended = self.source.outcome(operation)
        assert ended.state is OperationState.DONE, ended
        self.wait_clean(DESTINATION, instance)
        self.assert_stayed(instance)
        self.assert_owner(instance, SOURCE, "active")

    def arrived(self, instance: Instance, operation: str, patience: float = PATIENCE) -> None:
        """The bytes are the same before the guest runs there (the destination's worker is held at its COMMIT); then it
        runs, its counter goes on, and both hosts agree."""
        self.destination.wait_held(COMMIT)
        self.assert_same_disks(instance)
        self.destination.release(COMMIT)
        self.resized(instance, operation, patience)
        self.assert_arrived(instance)
        self.assert_owner(instance, DESTINATION, "resized")

    def power_off(self, host: str) -> None:
        """A power failure; what its worker had marked of its points is kept."""
        node, mark = self.host(host).node, self.host(host).mark
        self._marks[host] = [path.name for path in node.path(mark).iterdir()]
        self.cell.kill_node(host)

    def power_on(self, host: str) -> None:
        """The host is back, and its worker is started."""
        self.cell.start_node(host)
        marks = self.host(host).node.path(self.host(host).mark)
        marks.mkdir(parents=True)
        for name in self._marks.pop(host):
            (marks / name).touch()
        marks.chmod(0o777)
        self.host(host).revive()

    def delete(self, instance: Instance, host: str) -> None:
        """Delete it: nothing is left on either host."""
        self.host(host).do("terminate_instance", instance.uuid)
        self.assert_gone(instance)

    # --- the oracle ---------------------------------------------------------------------------------------------

    def disks(self, host: str, instance: str, suffix: str = "") -> dict[str, str]:
        """Format by name, as the host wrote it beside the disks."""
        info = json.loads((self.host(host).node.instances / (instance + suffix) / "disk.info").read_text())
        return {disk["name"]: disk["format"] for disk in info["disks"]}

    def path(self, host: str, instance: Instance, name: str, suffix: str = "") -> Path:
        return self.host(host).node.instances / (instance.uuid + suffix) / name

    def assert_same_disks(self, instance: Instance, but: tuple[str, ...] = ()) -> None:
        """What a guest would read of each disk that arrived is what it would read of the one set aside; what it grew
        by reads as zeros. For a guest that has not run at the destination yet."""
        for name, form in self.disks(SOURCE, instance.uuid, "_resize").items():
            if name in but:
                continue
            there = self.disks(DESTINATION, instance.uuid)[name]
            words = ["qemu-img", "compare", "-U", "-q", "-f", form, "-F", there]
            paths = [self.path(SOURCE, instance, name, "_resize"), self.path(DESTINATION, instance, name)]
            done = subprocess.run([*words, *paths], capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, (name, done.stdout, done.stderr)

    def assert_sound(self, host: str, instance: Instance) -> None:
        """No disk of a guest that is off has a defect, and the noise is what was written."""
        disks = self.disks(host, instance.uuid)
        for name, form in disks.items():
            if form == "qcow2":
                self.host(host).node.run("qemu-img", "check", "-q", "-f", form, self._inside(instance, name))
        assert self.noise(host, instance) == self.filler.hexdigest()

    def noise(self, host: str, instance: Instance) -> str:
        """Digest of what is where the noise was written."""
        return hashlib.sha256(self.read(host, instance, FILLER_AT, self.filler_bytes)).hexdigest()

    def read(self, host: str, instance: Instance, at: int, length: int) -> bytes:
        """What a guest would read there on its root disk."""
        node, copy = self.host(host).node, "/var/tmp/read.raw"
        form = self.disks(host, instance.uuid)["disk"]
        node.run("qemu-img", "convert", "-U", "-f", form, "-O", "raw", self._inside(instance, "disk"), copy)
        try:
            with open(node.path(copy), "rb") as raw:
                raw.seek(at)
                return raw.read(length)
        finally:
            node.path(copy).unlink()

    @staticmethod
    def _inside(instance: Instance, name: str) -> str:
        return f"{INSTANCES_PATH}/{instance.uuid}/{name}"

    def assert_owner(self, instance: Instance, owner: str, vm_state: str, power_state: str = "running") -> None:
        """One host owns it and runs it, and has a domain for it; the other has neither."""
        other = next(host for host in self.hosts if host.name != owner)
        mine = self.host(owner)

        def settled() -> bool:
            record = self.ask("get_instance", instance.uuid, host=owner)
            return (record.host, record.vm_state, record.task_state, record.power_state) == (
                owner, vm_state, None, power_state,
            )  # fmt: skip

        wait_for(settled, SETTLED, f"{instance.uuid} to be {vm_state} on {owner}")
        listed = [(name, i.uuid) for name in (SOURCE, DESTINATION) for i in self.ask("list_instances", host=name)]
        assert listed == [(owner, instance.uuid)]
        running = [owner] if power_state == "running" else []
        assert oracle.where_running(self.cell.nodes.values()).get(instance.uuid, []) == running
        assert list(oracle.domains(mine.node)) == [instance.uuid]
        assert oracle.domains(other.node) == {}
        assert oracle.interfaces(other.node) == []
        self.assert_quiet()

    def assert_quiet(self) -> None:
        """No operation is open, and no process of a transfer is left."""
        for host in self.hosts:
            wait_for(lambda h=host: self.ask("list_operations", open_only=True, host=h.name) == [], SETTLED,
                     f"every operation of {host.name} to end")  # fmt: skip
            assert [" ".join(p.argv) for p in host.node.ns.processes(BUSY)] == []

    def assert_arrived(self, instance: Instance, boot: int = 2, clean: bool = True) -> None:
        """The guest's counter goes on at the destination where the source's ended; no write of it was lost."""
        self.wait_boot(DESTINATION, boot)
        source, there = self.watch.boots(SOURCE), self.watch.boots(DESTINATION)
        assert [b.number for b in source + there] == list(range(1, boot + 1))
        assert oracle.continuity_problems(self.watch.console(SOURCE) + self.watch.console(DESTINATION)) == []
        assert source[-1].clean_shutdown is clean

    def assert_stayed(self, instance: Instance, boot: int = 2) -> None:
        """The guest runs on the source, in this boot of its life, and its counter never jumped."""
        self.wait_boot(SOURCE, boot)
        assert [b.number for b in self.watch.boots(SOURCE)] == list(range(1, boot + 1))
        assert oracle.continuity_problems(self.watch.console(SOURCE)) == []
        assert self.noise(SOURCE, instance) == self.filler.hexdigest()

    def wait_clean(self, host: str, instance: Instance) -> None:
        """Nothing of the instance is left on a host: no file, no domain, no process. Of what both see, no copy."""
        node, uuid = self.host(host).node, instance.uuid

        def clean() -> bool:
            self.source.revive()
            left = oracle.files(node, uuid)
            return not [name for name in left if not (self.shared and name.partition("/")[0] == uuid)]

        wait_for(clean, SETTLED, f"the last file of it on {host}")
        assert uuid not in oracle.domains(node)
        assert not [p for p in oracle.qemu_processes(node) if p.uuid == uuid]

    def assert_gone(self, instance: Instance) -> None:
        """Nothing of any instance is on either host, and nothing is claimed."""
        for host in self.hosts:
            self.wait_clean(host.name, instance)
        self.assert_quiet()
        for host in self.hosts:
            assert oracle.leftovers(host.node) == []
            assert self.ask("list_instances", host=host.name) == []
            assert self.ask("get_host_state", host=host.name).memory_mb.used == 0

    def wait_bytes(self, instance: Instance, mebibytes: int = 2) -> None:
        """So much of a disk is at the destination: the copy is in the middle of it."""

        def some() -> bool:
            parts = (self.destination.node.instances / instance.uuid).glob("disk*.part")
            return any(path.stat().st_blocks * 512 >= mebibytes * MIB for path in parts)

        wait_for(some, PATIENCE, f"{mebibytes} MiB at the destination")


@contextmanager
def move_cell(cell: Cell, images: GuestImages) -> Iterator[MoveCell]:
    """Both hosts; no worker yet."""
    with kill_hosts(cell, images, SOURCE, DESTINATION) as (source, destination):
        made = MoveCell(cell, source, destination)
        try:
            yield made
        finally:
            made.stop_watch()


@contextmanager
def tls_cell() -> Iterator[Cell]:
    """Two hosts with certificates, and a RabbitMQ, beside any other cell."""
    with Cell(settings=Settings(nodes=2, net="10.79.0", tls=True)) as made:
        yield made


@contextmanager
def shared_instances(moves: MoveCell) -> Iterator[None]:
    """Both hosts see one instances directory."""
    inside, target = f"{IMAGES_PATH}/shared", INSTANCES_PATH
    directory = moves.cell.state / "images" / "shared"
    directory.mkdir(mode=0o700)
    nodes = [host.node for host in moves.hosts]
    for node in nodes:
        node.run("chown", f"{WORKER_UID}:{WORKER_UID}", inside)
        node.run("mount", "--bind", inside, target)
    moves.shared = True
    lazy: list[str] = ["-l"]
    try:
        yield
        lazy = []
    finally:
        moves.shared = False
        for node in nodes:
            wait_for(lambda n=node: n.run("umount", *lazy, target, check=False).returncode == 0,
                     10, f"umount on {node.name}")  # fmt: skip
        subprocess.run(["rm", "-rf", str(directory)], check=True)
