"""A host as a set of Linux namespaces around one PID 1.

Killing PID 1 is a power failure: every process of the host dies with it, its mounts and its
network with the last of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.waiting import wait_for

INIT = Path(__file__).with_name("nodeinit.py")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CLONE_NEWNET = 0x40000000
KINDS = {"mount": "-m", "uts": "-u", "ipc": "-i", "pid": "-p", "net": "-n", "user": "-U"}


@dataclass(frozen=True)
class Process:
    """One process of a host; `pid` as the machine sees it, `inner_pid` as the host does."""

    pid: int
    inner_pid: int
    parent: int
    argv: tuple[str, ...]

    def signal(self, number: int) -> None:
        """Send a signal; a process that is gone already is not an error."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


class LabError(RuntimeError):
    """Something of the lab itself failed: says which part, and holds its output."""


class Namespaces:
    """One set of namespaces; `kinds` names them.  The pid file outlives this object."""

    def __init__(self, name: str, directory: Path, kinds: Sequence[str]) -> None:
        self.name = name
        self.directory = directory
        self.kinds = tuple(kinds)
        self.pid_file = directory / "pid"
        self._unshare: subprocess.Popen[bytes] | None = None

    def start(self, steps: Sequence[Sequence[Any]], lifeline: int | None = None) -> None:
        """Make the namespaces and mount what `steps` say; returns when PID 1 holds them up.

        `lifeline` is the read end of a pipe: when its last writer is gone, so is the host.
        Raises LabError with the output of PID 1 if a step failed; nothing is left then.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        ready_r, ready_w = os.pipe()
        plan = {
            "hostname": self.name,
            "steps": [list(step) for step in steps],
            "ready_fd": ready_w,
            "lifeline": lifeline is not None,
        }
        flags = [f"--{kind}" for kind in self.kinds]
        if "user" in self.kinds:
            flags.append("--map-root-user")
        argv = ["unshare", *flags, "--propagation", "private", "--fork", "--kill-child=KILL"]
        argv += ["--", sys.executable, "-I", "-S", str(INIT), json.dumps(plan)]
        with open(self.directory / "init.log", "wb") as log:
            self._unshare = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL if lifeline is None else lifeline,
                stdout=log,
                stderr=log,
                pass_fds=(ready_w,),
                start_new_session=True,
            )
        os.close(ready_w)
        with open(ready_r, "rb") as ready:
            # Up to the newline only: unshare holds the other end until the host goes down.
            pid = ready.readline().decode().strip()
        if not pid:
            self._unshare.wait()
            output = (self.directory / "init.log").read_text()
            raise LabError(f"{self.name}: PID 1 did not start: {output.strip()}")
        self.pid_file.write_text(f"{pid} {_start_time(int(pid))}\n")

    @property
    def pid(self) -> int:
        """PID 1 as seen from outside; raises LabError when the host is down."""
        try:
            pid, started = self.pid_file.read_text().split()
        except (OSError, ValueError):
            raise LabError(f"{self.name} is not up") from None
        # The start time tells a recycled pid from ours.
        if _start_time(int(pid)) != started:
            raise LabError(f"{self.name} is down (its PID 1 was {pid})")
        return int(pid)

    @property
    def alive(self) -> bool:
        try:
            return self.pid > 0
        except LabError:
            return False

    def kill(self) -> None:
        """Power failure: SIGKILL to PID 1; returns when every process of the host is gone."""
        try:
            pid = self.pid
        except LabError:
            pid = 0
        if pid:
            namespace = os.readlink(f"/proc/{pid}/ns/pid")
            os.kill(pid, signal.SIGKILL)
            # The kernel lets PID 1 go only after the last process of its namespace is reaped.
            wait_for(lambda: not _start_time(pid) or _wake_parents(namespace), 30.0,
                     f"the end of {self.name}'s PID 1 ({pid})")
        if self._unshare is not None:
            self._unshare.wait(30.0)
            self._unshare = None
        self.pid_file.unlink(missing_ok=True)

    def command(
        self, argv: Sequence[str], user: str = "root", kinds: Sequence[str] | None = None
    ) -> list[str]:
        """The argument vector that runs `argv` in this host, for subprocess."""
        entered = self.kinds if kinds is None else kinds
        prefix = ["nsenter", "-t", str(self.pid), *(KINDS[kind] for kind in entered)]
        if "user" in entered:
            prefix.append("--preserve-credentials")
        prefix.append("--")
        if user != "root":
            prefix += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
            prefix += ["--inh-caps=-all", "--no-new-privs", "--"]
        return [*prefix, *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        check: bool = True,
        timeout: float = 60.0,
        kinds: Sequence[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the host with `stdin` as its input, and return its output.

        Raises LabError with the output when `check` and it failed, and
        subprocess.TimeoutExpired after `timeout` seconds.
        """
        done = subprocess.run(
            self.command(argv, user, kinds),
            env=environment(user, env),
            input="" if stdin is None else stdin,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=timeout,
        )
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise LabError(f"{self.name}: {' '.join(argv)}: exit {done.returncode}: {said}")
        return done

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a command in the host; the returned process is nsenter, which mirrors its end."""
        return subprocess.Popen(
            self.command(argv, user),
            env=environment(user, env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output != subprocess.DEVNULL else output,
            start_new_session=True,
        )

    def path(self, inside: str | Path) -> Path:
        """A file of the host as a path of the machine; the host must be up."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def processes(self, pattern: str = "") -> list[Process]:
        """The host's processes (PID 1 left out) whose command line matches the expression."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = [p for p in _processes_of(namespace) if p.pid != self.pid]
        return [p for p in found if re.search(pattern, " ".join(p.argv))]

    def socket(self, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A new IPv4 socket of the host's network, usable from this process."""
        made: list[socket.socket | OSError] = []
        pid = self.pid

        def make() -> None:
            try:
                with open(f"/proc/{pid}/ns/net") as namespace:
                    if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                made.append(socket.socket(socket.AF_INET, kind))
            except OSError as error:
                made.append(error)

        # setns holds for one thread only, so it happens in one that ends at once.
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]


def environment(user: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    """What a command in a host finds in its environment: nothing of the caller's."""
    home = "/root" if user == "root" else f"/var/lib/{user}"
    basic = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": home, "USER": user, "LOGNAME": user}
    return {**basic, **(extra or {})}


def _start_time(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _wake_parents(namespace: str) -> bool:
    """Wake the nsenters of a dying host: one that stopped with its child never reaps it."""
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/pid_for_children") == namespace:
                os.kill(int(entry), signal.SIGCONT)
        except OSError:
            continue
    return False


def _processes_of(namespace: str) -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if os.readlink(f"/proc/{entry}/ns/pid") != namespace:
                continue
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
            status = Path(f"/proc/{entry}/status").read_text()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if not command:
            continue
        argv = command.rstrip(b"\0").decode(errors="replace").split("\0")
        inner = int(fields["NSpid"].split()[-1])
        yield Process(int(entry), inner, int(fields["PPid"]), tuple(argv))
