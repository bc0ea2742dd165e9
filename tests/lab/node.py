"""One host of the cell: its namespaces, its disk (kept over a power failure), its daemons."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import certs, nodefiles
from tests.lab.hub import Hub
from tests.lab.namespaces import LabError, Namespaces, Process
from tests.lab.settings import IMAGES_PATH, STATE_PATH, WORKER_UID, Settings
from tests.waiting import wait_for


@dataclass(frozen=True)
class DaemonSpec:
    """How a daemon is started; it puts itself into the background and writes its pid file."""

    argv: tuple[str, ...]
    pid_file: str


DAEMONS = {
    "sshd": DaemonSpec(("/usr/sbin/sshd",), "/run/sshd.pid"),
    "virtlogd": DaemonSpec(
        ("/usr/sbin/virtlogd", "-d", "-p", "/run/virtlogd.pid"), "/run/virtlogd.pid"
    ),
    "libvirtd": DaemonSpec(
        ("/usr/sbin/libvirtd", "-d", "--listen", "-p", "/run/libvirtd.pid"), "/run/libvirtd.pid"
    ),
}
# Directories of the host that are its own, below the node's directory, with mode and owner.
OWN_DIRECTORIES = (
    ("etc/libvirt", 0o755, 0),
    ("etc/ssh", 0o755, 0),
    ("etc/pki", 0o755, 0),
    ("etc/compute-worker", 0o750, WORKER_UID),
    ("var/lib/libvirt", 0o755, 0),
    ("var/cache/libvirt", 0o755, 0),
    ("var/log/libvirt", 0o755, 0),
    ("var/log/compute-worker", 0o750, WORKER_UID),
)


class Daemon:
    """libvirtd, virtlogd or sshd of one host."""

    def __init__(self, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        self.spec = DAEMONS[name]

    def start(self) -> None:
        """Start it; for libvirtd, returns when it answers."""
        self.node.ns.run(self.spec.argv)
        if self.name == "libvirtd":
            wait_for(lambda: self.node.virsh("version", check=False).returncode == 0, 20.0,
                     f"libvirtd of {self.node.name} to answer")
        else:
            wait_for(self.process, 10.0, f"{self.name} of {self.node.name}")

    def process(self) -> Process | None:
        """The running daemon, or None."""
        try:
            inner = int(self.node.path(self.spec.pid_file).read_text())
        except (OSError, ValueError):
            return None
        binary = os.path.basename(self.spec.argv[0])
        for process in self.node.ns.processes(binary):
            if process.inner_pid == inner:
                return process
        return None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Signal it and wait until it is gone."""
        process = self.process()
        if process is None:
            raise LabError(f"{self.name} of {self.node.name} is not running")
        process.signal(signal.SIGCONT)
        process.signal(number)
        wait_for(lambda: self.process() is None, 20.0, f"the end of {self.name}")
        self.node.path(self.spec.pid_file).unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL."""
        self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: it neither answers nor closes its connections."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        process = self.process()
        if process is None:
            raise LabError(f"{self.name} of {self.node.name} is not running")
        process.signal(number)


class Node:
    """One host.  `directory` holds its disk and outlives a power failure."""

    def __init__(
        self, index: int, state: Path, settings: Settings, hub: Hub, exposed: Sequence[str] = ()
    ) -> None:
        self.index = index
        self.name = f"node{index}"
        self.state = state
        self.directory = state / self.name
        self.settings = settings
        self.hub = hub
        self.exposed = tuple(exposed)
        self.address = settings.address(index)
        self.ns = Namespaces(self.name, self.directory, ("mount", "uts", "ipc", "pid", "net"))
        self.daemons = {name: Daemon(self, name) for name in DAEMONS}

    @property
    def libvirtd(self) -> Daemon:
        return self.daemons["libvirtd"]

    @property
    def uri(self) -> str:
        """libvirt's URI of this host, from outside."""
        return f"qemu+unix:///system?socket={self.directory}/run/libvirt/libvirt-sock"

    @property
    def instances(self) -> Path:
        """The instances directory, from outside; as the host sees it while it is up."""
        inside = f"{STATE_PATH}/instances"
        return self.path(inside) if self.ns.alive else self.directory / "worker" / "instances"

    def start(self, lifeline: int | None = None) -> None:
        """Power on, plug in, start the daemons; returns when libvirtd answers."""
        if self.ns.alive:
            return
        self._prepare_disk()
        self.ns.start(self._mounts(), lifeline)
        self.hub.plug(self.name, self.ns.pid)
        # The same addresses after a power failure: the others remember them for a minute.
        self.ns.run(["sh", "-ec", f"""
            ip link set lo up
            ip link set eth0 address 52:54:00:aa:01:{self.index:02x}
            ip link add br0 address 52:54:00:aa:02:{self.index:02x} type bridge
            ip link set eth0 master br0 up
            ip link set br0 up
            ip addr add {self.address}/24 dev br0
            echo {self.settings.tcp_retries2} > /proc/sys/net/ipv4/tcp_retries2"""])
        for daemon in self.daemons.values():
            daemon.start()

    def kill(self) -> None:
        """Power failure."""
        self.ns.kill()

    def run(
        self,
        *argv: str,
        user: str = "root",
        check: bool = True,
        stdin: str | None = None,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host; see `Namespaces.run`."""
        return self.ns.run(argv, user=user, check=check, stdin=stdin, timeout=timeout, env=env)

    def virsh(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """virsh of the machine on this host's libvirtd; raises LabError with its output."""
        argv = ["virsh", "-q", "-c", self.uri, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False,
                              stdin=subprocess.DEVNULL)
        if check and done.returncode != 0:
            raise LabError(f"{self.name}: virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def path(self, inside: str | Path) -> Path:
        """A file of the running host as a path of the machine."""
        return self.ns.path(inside)

    def _prepare_disk(self) -> None:
        """Everything below the node's directory, /run fresh as after a boot."""
        first = not (self.directory / "etc").exists()
        shutil.rmtree(self.directory / "run", ignore_errors=True)
        for name in ("run/libvirt", "run/sshd", "run/lock", "overlay/etc/up", "overlay/etc/work",
                     "overlay/var/up", "overlay/var/work", "dev", "expose"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        _owned(self.directory / "run" / "compute-worker", 0o755, WORKER_UID)
        for name, mode, owner in OWN_DIRECTORIES:
            _owned(self.directory / name, mode, owner)
        _owned(self.directory / "worker", 0o700, WORKER_UID)
        _owned(self.directory / "worker" / "instances", 0o700, WORKER_UID)
        if first:
            self._write_files()

    def _write_files(self) -> None:
        etc = self.directory / "overlay" / "etc" / "up"
        nodefiles.write_accounts(etc)
        (etc / "hostname").write_text(self.name + "\n")
        nodefiles.write_libvirt(self.directory / "etc" / "libvirt", self.settings, self.index)
        nodefiles.write_ssh(self.directory / "etc" / "ssh", self.state / "keys", self.settings,
                            self.index)
        if self.settings.tls:
            pki = self.directory / "etc" / "pki"
            certs.make_certificate(self.state / "ca", pki, self.name, self.address)
            certs.install_for_host(pki, WORKER_UID)

    def _mounts(self) -> list[list[object]]:
        """The plan of PID 1, in order."""
        own = str(self.directory)
        steps: list[list[object]] = [["proc", "/proc"], ["sysfs", "/sys"]]
        for top in ("/etc", "/var"):
            steps.append(["overlay", top, f"{own}/overlay{top}/up", f"{own}/overlay{top}/work"])
        for name, _mode, _owner in OWN_DIRECTORIES:
            steps.append(["bind", f"{own}/{name}", f"/{name}"])
        steps.append(["bind", str(self.state / "hosts"), "/etc/hosts"])
        steps.append(["bind", f"{own}/worker", STATE_PATH])
        steps.append(["bind", str(self.state / "images"), IMAGES_PATH])
        steps.append(["bind", f"{own}/run", "/run"])
        steps.append(["dev", f"{own}/dev", [] if self.settings.kvm else ["kvm"]])
        steps.append(["expose", f"{own}/expose", list(self.exposed), ["/tmp"]])
        return steps


def _owned(path: Path, mode: int, owner: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    os.chmod(path, mode)
    os.chown(path, owner, owner)
