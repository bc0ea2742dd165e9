"""Live migrations between two hosts under real workers: what became of the guest, from outside."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from compute_worker.objects import Instance, Migration
from compute_worker.states import OperationState
from tests.lab import oracle
from tests.lab.cell import Cell
from tests.lab.guest_images import GuestImages
from tests.lab.killcell import PATIENCE, KillHost, kill_hosts
from tests.lab.movecell import DESTINATION, FILL, SETTLED, SOURCE, MoveCell, Watch
from tests.lab.node import Node
from tests.lab.settings import Settings
from tests.lab.worker import merge_config
from tests.waiting import wait_for

LEAVE, COME = "live_migration", "pre_live_migration"
"""The kinds of the two sides, which are also the names of steps."""
CONFIG: dict[str, dict[str, Any]] = {
    "compute": {"peer_ask_interval": 1.0},
    # Few iterations: QEMU 7.2 loses pages of an emulated guest between them (see ``livemigration_plan.policy``).
    "live_migration": {"max_downtime_ms": 2000},
}
SLOW = {"bandwidth_mb": 3}
"""Some fifteen seconds for the guest's memory: it is in the air until :meth:`LiveCell.hasten`."""
LIBVIRT_PORTS = (16509, 16514)
BROKER_PORTS = (5671, 5672)
STILL = 6.0
"""Seconds of its own time between two ticks, at most: it ticks once a second, on a machine that has much to do."""
_BUSY_JIFFIES = 4


class LiveWatch(Watch):
    """Also reads consoles that were removed meanwhile, and sees by the processors' time which qemu runs its guest,
    where libvirt cannot be asked."""

    def __init__(self, nodes: list[Node], uuid: str, shared: bool) -> None:
        super().__init__(nodes, uuid, shared)
        self._files: dict[int, tuple[str, IO[bytes]]] = {}
        self._used: dict[int, int] = {}
        self.worked: list[tuple[float, str, int]] = []
        """When the processor of which host's qemu (a pid) had worked."""
        self.twice_at: list[float] = []

    def _look(self) -> None:
        where = oracle.where_running(self._nodes).get(self._uuid, [])
        for node in self._nodes:
            for path in sorted(node.instances.glob(f"{self._uuid}*/console.log")):
                with suppress(FileNotFoundError):
                    self._keep(node, path.open("rb"))
        self._note_consoles(where)
        self._note_processors()
        if len(where) > 1 and self._go_on():
            self.twice.append(where)
            self.twice_at.append(time.monotonic())

    def _keep(self, node: Node, file: IO[bytes]) -> None:
        number = os.fstat(file.fileno()).st_ino
        if number in self._files:
            file.close()
        else:
            self._files[number] = (node.name, file)

    def _note_consoles(self, where: list[str]) -> None:
        for number, (name, file) in self._files.items():
            file.seek(0)
            text = file.read().decode(errors="replace")
            host = self._spoken_on.get(number) or ((where or [""])[0] if self._shared else name)
            if host and text and text != self._consoles.get(number):
                self._spoken_on[number], self._consoles[number] = host, text
                self._note(host, text)

    def _note_processors(self) -> None:
        for node in self._nodes:
            for process in oracle.qemu_processes(node) if node.ns.alive else ():
                used = processor_time(process.pid)
                if process.uuid == self._uuid and used >= self._used.setdefault(process.pid, used) + _BUSY_JIFFIES:
                    self._used[process.pid] = used
                    self.worked.append((time.monotonic(), node.name, process.pid))

    def _go_on(self) -> bool:
        """One that runs, the other runs, the first runs still: both did at the second look."""
        first, second = self._nodes[:2]
        return all(
            node.virsh("domstate", self._uuid, check=False).stdout.strip() == "running"
            for node in (first, second, first)
        )

    def interleaved(self) -> list[tuple[float, str, int]]:
        """Work of a qemu after another one, begun later, had worked: the guest ran twice."""
        order = list(dict.fromkeys(pid for _, _, pid in self.worked))
        found, newest = [], 0
        for entry in self.worked:
            position = order.index(entry[2])
            if position < newest:
                found.append(entry)
            newest = max(newest, position)
        return found

    def story(self) -> str:
        """All that the guest ever said, in the order of its hosts."""
        return "".join(self._consoles[number] for number in self._spoken_on if number in self._consoles)

    def last(self, host: str) -> int:
        """The last tick that this host's console shows; 0: none. There is one console where both write to one file."""
        boots = oracle.boots(self.story() if self._shared else self.console(host))
        return boots[-1].ticks[-1] if boots and boots[-1].ticks else 0

    def stop(self) -> None:
        super().stop()
        for _, file in self._files.values():
            file.close()
        self._files.clear()


def processor_time(pid: int) -> int:
    """Hundredths of a second that the guest's processors have worked, in that qemu; 0: it is gone."""
    total = 0
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            name, _, rest = Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")
            if "(CPU " in name:
                total += sum(int(word) for word in rest.split()[11:13])
    return total


def gaps(console: str) -> list[float]:
    """Seconds of the guest's own time between each two ticks of one boot."""
    found: list[float] = []
    for boot in console.split("LAB: BOOT OK"):
        ups = [float(up) for up in re.findall(r"LAB: tick \d+ up=([\d.]+)", boot)]
        found += [b - a for a, b in itertools.pairwise(ups)]
    return found


class LiveCell(MoveCell):
    """``source`` and ``destination`` as in :class:`MoveCell`; a guest moves while it runs."""

    @property
    def watch(self) -> LiveWatch:
        assert isinstance(self._watch, LiveWatch), "nothing was booted"
        return self._watch

    def watching(self, instance: Instance) -> Watch:
        return LiveWatch([host.node for host in self.hosts], instance.uuid, self.shared)

    def start(self, *, kill_at: str = "", hold_at: str = "", **config: Any) -> None:
        """Both at once."""
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(self.start_one, host, kill_at, hold_at, **config) for host in self.hosts]
        for one in done:
            one.result()

    def start_one(self, host: KillHost, kill_at: str = "", hold_at: str = "", **config: Any) -> None:
        """One worker, with options of its own."""
        holds = ",".join(filter(None, (FILL, hold_at)))
        host.start(kill_at=kill_at, hold_at=holds, config=merge_config(CONFIG, config))

    def boot(self, filler_mib: int = 2, prepare: Callable[[Instance], None] = lambda instance: None, **changes: Any
             ) -> Instance:  # fmt: skip
        return super().boot(filler_mib, prepare, **changes)

    # --- commands -----------------------------------------------------------------------------------------------

    def migrate(
        self, instance: Instance, source: str = SOURCE, destination: str = DESTINATION, **changes: Any
    ) -> tuple[Migration, str]:
        """Send ``live_migration``; the move and its operation."""
        migration = self.migration(
            instance, migration_type="live-migration", new_flavor=None, source_host=source, dest_host=destination,
            **changes,
        )  # fmt: skip
        return migration, self.host(source).send("live_migration", instance.uuid, migration)

    def wait_air(self, instance: Instance, host: str = SOURCE) -> None:
        """The guest's memory is on its way."""

        def sending() -> bool:
            self.source.revive()
            said = self.host(host).node.virsh("domjobinfo", instance.uuid, check=False).stdout
            found = re.search(r"Memory processed:\s+([\d.]+) [MG]iB", said)
            return found is not None and float(found[1]) >= 1

        wait_for(sending, PATIENCE, f"{instance.uuid} to be in the air")

    def fly(self, instance: Instance) -> tuple[Migration, str]:
        """From the source, slowly, until it is in the air."""
        found = self.migrate(instance)
        self.wait_air(instance)
        return found

    def hasten(self, instance: Instance, host: str = SOURCE) -> None:
        """The rest of the flight at full speed."""
        self.host(host).node.virsh("migrate-setspeed", instance.uuid, "1000", check=False)

    # --- what became of it --------------------------------------------------------------------------------------

    def arrived(
        self, instance: Instance, operation: str, patience: float = PATIENCE,
        *, source: str = SOURCE, destination: str = DESTINATION, boot: int = 1,
    ) -> None:  # fmt: skip
        """Both hosts say that it is done, and told it once; the guest goes on at the destination, alone."""
        for name, event in ((source, "live_migration"), (destination, "live_migration_dest")):
            ended = self.host(name).outcome(operation, patience)
            print(name, self.steps(name, operation))
            assert ended.state is OperationState.DONE, (name, ended)
            self.host(name).assert_ended_once(instance, operation, f"instance.{event}.end")
        self.assert_goes_on(instance, destination, boot)
        if not self.shared:
            self.wait_clean(source, instance)
        self.assert_owner(instance, destination, "active")

    def stayed(self, instance: Instance, operation: str, patience: float = SETTLED, *, boot: int = 1) -> str:
        """It came to nothing, both hosts say so, and the guest goes on at the source; why, as the source says."""
        ended = self.source.outcome(operation, patience)
        print(SOURCE, self.steps(SOURCE, operation), ended.error)
        assert ended.state is OperationState.UNDONE, ended
        self.source.assert_ended_once(instance, operation, "instance.live_migration.error")
        self.wait_clean(DESTINATION, instance)
        self.assert_goes_on(instance, SOURCE, boot)
        self.assert_owner(instance, SOURCE, "active")
        return str(ended.error)

    def assert_goes_on(self, instance: Instance, host: str, boot: int = 1) -> None:
        """It ticks there on and on; its console has no hole over all hosts, its memory was never lost but at the
        boots that there were, and the bytes on its disk are what they were."""
        seen = self.watch.last(host)
        wait_for(lambda: self.watch.last(host) >= max(seen + 1, 2), PATIENCE, f"it to tick on {host} beyond {seen}")
        self.assert_continuous(boot)
        if self.filler_bytes:
            assert self.noise(host, instance) == self.filler.hexdigest()

    def assert_continuous(self, boot: int = 1) -> None:
        story = self.watch.story()
        assert [b.number for b in oracle.boots(story)] == list(range(1, boot + 1))
        assert oracle.continuity_problems(story) == []
        between = gaps(story)
        assert min(between) > 0, "its memory is not what it was"
        assert max(between) < STILL, f"it stood still for {max(between)} s"

    def stop(self) -> None:
        super().stop()
        assert self.watch.interleaved() == [], "two copies worked"

    def finish(self, instance: Instance, host: str) -> None:
        """Shut down there its disks are sound and count what was said last; deleted nothing is left anywhere."""
        self.host(host).do("stop_instance", instance.uuid)
        self.assert_sound(host, instance)
        said = self.watch.last(host)
        assert self.counter(host, instance) in (said, said + 1)
        self.delete(instance, host)
        self.stop()

    def counter(self, host: str, instance: Instance) -> int:
        """The guest's counter on its disk, which nobody has open."""
        form = self.disks(host, instance.uuid)["disk"]
        return oracle.counter_on(self.host(host).node, self._inside(instance, "disk"), form)

    def leave(self, instance: Instance, host: str) -> None:
        """Deleted there, nothing is left anywhere."""
        self.delete(instance, host)
        self.stop()


@contextmanager
def live_hosts() -> Iterator[Cell]:
    """Two hosts with certificates and a RabbitMQ, beside any other cell; a silent libvirtd is given up after 6 s."""
    with Cell(settings=Settings(nodes=2, net="10.79.0", tls=True, keepalive_interval=1)) as made:
        yield made


@contextmanager
def live_cell(cell: Cell, images: GuestImages) -> Iterator[LiveCell]:
    """Both hosts; no worker yet."""
    with kill_hosts(cell, images, SOURCE, DESTINATION) as (source, destination):
        made = LiveCell(cell, source, destination)
        try:
            yield made
        finally:
            made.stop_watch()


@contextmanager
def patient_libvirt(node: Node, seconds: int) -> Iterator[None]:
    """A host whose libvirt waits so long for the one that a guest goes to. No worker runs there yet."""
    conf = node.path("/etc/libvirt/qemu.conf")
    usual = conf.read_text()
    # Counted five times, and once more until it is acted on.
    conf.write_text(re.sub(r"(?m)^keepalive_interval = .*$", f"keepalive_interval = {seconds // 6}", usual))
    restart_libvirtd(node)
    try:
        yield
    finally:
        conf.write_text(usual)
        restart_libvirtd(node)


def restart_libvirtd(node: Node) -> None:
    """It reads its files when it starts; guests run on."""
    node.libvirtd.stop()
    node.libvirtd.start()


def pause(seconds: float) -> None:
    """A fault of so long."""
    since = time.monotonic()
    wait_for(lambda: time.monotonic() - since >= seconds, seconds + 1, f"{seconds} s to pass")
