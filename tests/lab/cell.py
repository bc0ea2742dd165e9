"""The cell: a hub, N hosts, a RabbitMQ and the workers, made and removed as one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from tests.lab import certs
from tests.lab.hub import Hub
from tests.lab.namespaces import LabError
from tests.lab.node import Node
from tests.lab.rabbit import Permissions, Ports, Rabbit, User
from tests.lab.relay import Relay
from tests.lab.settings import (
    CONFIG_FILE,
    IMAGES_PATH,
    LONGEST_SOCKET,
    STATE_PATH,
    WORKER_UID,
    Settings,
)
from tests.lab.worker import (
    HEALTH_PORT,
    Config,
    Worker,
    default_command,
    merge_config,
    python_paths,
    render_config,
)

KEEPER = Path(__file__).with_name("keeper.py")


class Cell:
    """`with Cell(nodes=2) as cell:` brings it up and takes it down, also after a partial failure.

    When the process that made it dies, in whatever way, the hosts die with it and the state
    directory is removed; with `keep=True` (for a person) the cell lives until `down`.
    """

    def __init__(
        self,
        state: Path | None = None,
        settings: Settings | None = None,
        *,
        nodes: int | None = None,
        rabbit: bool = True,
        keep: bool = False,
        permissions: Callable[[str], Permissions] | None = None,
        venv: Path = Path(sys.prefix),
    ) -> None:
        self.settings = settings or Settings(nodes=nodes or 2)
        self.state = (state or Path(tempfile.mkdtemp(prefix="cwlab-", dir="/tmp"))).absolute()
        self.keep = keep
        if len(str(self.state)) + LONGEST_SOCKET > 107:
            raise ValueError(f"{self.state} is too long a path for libvirt's sockets")
        if str(self.state).startswith(("/etc/", "/var/", "/run/", "/dev/")):
            raise ValueError(f"{self.state}: the hosts replace /etc, /var, /run and /dev")
        self.hub = Hub(self.state, self.settings)
        exposed = python_paths(venv)
        self.nodes = {
            name: Node(index, self.state, self.settings, self.hub, exposed)
            for index, name in enumerate(self.settings.node_names(), 1)
        }
        ports = Ports(tls=5671 if self.settings.tls else 0)
        authority = self.state / "ca" if self.settings.tls else None
        self.rabbit = Rabbit(self.state / "mq", self.hub.ns, self.settings.hub_address, ports,
                             own_namespaces=False, authority=authority)
        self.users = {
            name: User(name, f"secret-of-{name}",
                       permissions(name) if permissions else Permissions())
            for name in self.nodes
        }
        self.workers: list[Worker] = []
        self._with_rabbit = rabbit
        self._lifeline: tuple[int, int] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._relays: list[Relay] = []

    @classmethod
    def attach(cls, state: Path) -> Cell:
        """The cell that `up` with `keep` left in `state`; FileNotFoundError without one."""
        return cls(state, Settings.load(state), keep=True)

    def __enter__(self) -> Cell:
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def up(self) -> None:
        """Everything up and answering; on failure everything is taken down again."""
        if (self.state / "lab.json").exists() and self.hub.ns.alive:
            raise LabError(f"a cell is up in {self.state} already")
        try:
            self._make_state()
            self.hub.start(self._reading_end)
            starts: list[Callable[[], None]] = [
                lambda node=node: node.start(self._reading_end)  # type: ignore[misc]
                for node in self.nodes.values()
            ]
            if self._with_rabbit:
                starts.append(lambda: self.rabbit.up(list(self.users.values())))
            _all(starts)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Take everything down, whatever state it is in; harmless when nothing is up."""
        for relay in self._relays:
            relay.close()
        problems: list[Exception] = []
        # The hub last: RabbitMQ and the cables are in it.
        for step in [*(node.kill for node in self.nodes.values()), self.hub.ns.kill]:
            try:
                step()
            except (AssertionError, OSError, LabError) as error:
                problems.append(error)
        for worker in self.workers:
            if worker.running:
                worker.wait()
        self.workers.clear()
        if not problems:
            shutil.rmtree(self.state, ignore_errors=True)
        self._close_lifeline()
        if problems:
            raise LabError(f"{self.state}: {problems}")

    def start_node(self, name: str) -> Node:
        """Power on a host that was killed."""
        self.nodes[name].start(self._reading_end)
        return self.nodes[name]

    def kill_node(self, name: str) -> None:
        """Power failure of a host; its workers are gone too."""
        node = self.nodes[name]
        node.kill()
        for worker in self.workers:
            if worker.node is node and worker.running:
                worker.wait()

    def add_image(self, source: Path, name: str | None = None) -> str:
        """Put a file into the image directory that all hosts see; its path as they see it."""
        name = name or source.name
        target = self.state / "images" / name
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", "--", str(source), str(target)],
                       check=True, timeout=120)
        os.chown(target, WORKER_UID, WORKER_UID)
        os.chmod(target, 0o644)
        return f"{IMAGES_PATH}/{name}"

    def worker_config(self, name: str) -> Config:
        """The configuration a worker gets when nothing else is said."""
        return {
            "DEFAULT": {"transport_url": self.rabbit.url(self.users[name])},
            "compute": {"host": name, "state_path": STATE_PATH},
        }

    def write_config(self, name: str, *layers: Config) -> None:
        """Write a host's configuration file: readable by the worker's group, not the world."""
        path = self.nodes[name].path(CONFIG_FILE)
        text = render_config(merge_config(self.worker_config(name), *layers))
        path.touch(mode=0o640)
        os.chown(path, 0, WORKER_UID)
        path.write_text(text)

    def start_worker(
        self,
        name: str,
        extra_config: Config | None = None,
        env: Mapping[str, str] | None = None,
        *,
        argv: Sequence[str] | None = None,
        health_port: int = HEALTH_PORT,
    ) -> Worker:
        """Write the configuration and start a worker in a host; see `Worker.wait_ready`."""
        self.write_config(name, extra_config or {})
        log = self.state / name / "worker.log"
        command = argv or default_command(CONFIG_FILE)
        worker = Worker(self.nodes[name], command, log, env, health_port)
        worker.start()
        self.workers.append(worker)
        return worker

    def stop_workers(self) -> list[Worker]:
        """SIGKILL to every worker that runs; returns those."""
        running = [worker for worker in self.workers if worker.running]
        for worker in running:
            worker.kill()
        self.workers.clear()
        return running

    def relay(self, port: int = 5672, address: str | None = None) -> Relay:
        """A port of 127.0.0.1 of this machine that leads to the hub's network."""
        made = Relay(self.hub.ns, address or self.settings.hub_address, port)
        self._relays.append(made)
        return made

    def log_files(self) -> list[Path]:
        """Every log of the cell, from outside; also of hosts that are off."""
        patterns = ("*/init.log", "node*/worker.log", "node*/var/log/**/*.log", "mq/log/*.log")
        return sorted(path for pattern in patterns for path in self.state.glob(pattern)
                      if path.is_file())

    def collect_logs(self, target: Path) -> None:
        """Copy every log to `target`, keeping the directories."""
        for path in self.log_files():
            copy = target / path.relative_to(self.state)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

    @property
    def _reading_end(self) -> int | None:
        return self._lifeline[0] if self._lifeline else None

    def _make_state(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        # qemu and the worker are not root, and must get through.
        os.chmod(self.state, 0o755)
        self.settings.save(self.state)
        if not self.keep:
            self._lifeline = os.pipe()
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), str(self.state)],
                stdin=self._lifeline[0], start_new_session=True,
            )
        (self.state / "hosts").write_text(self.settings.hosts_file())
        images = self.state / "images"
        images.mkdir(exist_ok=True)
        os.chown(images, WORKER_UID, WORKER_UID)
        _make_keys(self.state / "keys")
        if self.settings.tls:
            certs.make_authority(self.state / "ca")

    def _close_lifeline(self) -> None:
        if self._lifeline:
            for end in self._lifeline:
                os.close(end)
            self._lifeline = None
        if self._keeper:
            self._keeper.wait(40)
            self._keeper = None


def _make_keys(directory: Path) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    for name in ("id", "hostkey"):
        if not (directory / name).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab",
                            "-f", str(directory / name)], check=True, timeout=30,
                           stdin=subprocess.DEVNULL)


def _all(starts: Iterable[Callable[[], None]]) -> None:
    """Run them at once; all have ended when this returns, and the first failure is raised."""
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(start) for start in starts]
    for future in futures:
        future.result()


def interrupt_as_exit() -> None:
    """Let SIGTERM unwind like an interrupt, so that `with Cell()` cleans up at once."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
