"""``qemu-nbd`` at the destination: one process for one disk that arrives, never longer than somebody sends it."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from compute_worker import errors
from compute_worker.virt.libvirt.disks.process import PATH

LOG = logging.getLogger(__name__)
_RANGE = re.compile(r"(\d{1,5})-(\d{1,5})\Z")
_END_SECONDS = 5.0
_ASK_SECONDS = 0.2
_LOOK_SECONDS = 1.0
# systemd's socket activation (sd_listen_fds(3)): the first socket is descriptor 3, and LISTEN_PID is who is meant.
# It lets us choose the port, know that it is ours, and hand it over listening.
_HAND_OVER = 'exec 3<&0 0</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a host listens for disks: ``address`` (empty: everywhere), first and last port."""

    address: str
    first: int
    last: int

    @classmethod
    def parse(cls, address: str, ports: str) -> Listening:
        """From ``transfer.listen_address`` and ``transfer.ports``.

        :raises compute_worker.errors.Broken: the ports are no range.
        """
        match = _RANGE.match(ports.replace(" ", ""))
        if match is None or not 0 < int(match[1]) <= int(match[2]) < 65_536:
            raise errors.Broken(f"transfer.ports is {ports!r}: write it as 10900-10999")
        return cls(address, int(match[1]), int(match[2]))

    def bind(self) -> socket.socket:
        """A listening socket on the first free port.

        :raises compute_worker.errors.Broken: the address is not this host's.
        :raises compute_worker.errors.HypervisorBusy: every port is taken.
        """
        everywhere = not self.address
        dual = everywhere and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in self.address else socket.AF_INET
        for port in range(self.first, self.last + 1):
            try:
                return socket.create_server((self.address, port), family=family, dualstack_ipv6=dual, backlog=16)
            except OSError as exc:
                if exc.errno is None or isinstance(exc, socket.gaierror) or "assign" in str(exc.strerror):
                    problem = f"cannot listen on {self.address!r} (transfer.listen_address): {exc.strerror or exc}"
                    raise errors.Broken(problem) from None
        raise errors.HypervisorBusy(reason=f"all ports {self.first}-{self.last} (transfer.ports) are taken")


class Export:
    """A running ``qemu-nbd``. It ends when its last client leaves, when nobody asked for it for ``idle_seconds``, when
    :meth:`stop` is called, and when this process dies.

    :param options: of qemu-nbd, the file or node to export last.
    :raises compute_worker.errors.CommandFailed: it does not start.
    """

    def __init__(self, name: str, listener: socket.socket, options: Sequence[str], idle_seconds: float) -> None:
        self.name = name
        self.port = int(listener.getsockname()[1]) if listener.family != socket.AF_UNIX else 0
        self._idle_seconds = idle_seconds
        self._touched = time.monotonic()
        self._started = threading.Event()
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.problem = ""
        """What it said when it did not start, or ended by itself."""
        # The kernel ends a child with the *thread* that made it: so this thread lives exactly as long as the child.
        self._keeper = threading.Thread(target=self._keep, args=(listener, list(options)), name=f"nbd-{name}")
        self._keeper.daemon = True
        self._keeper.start()
        self._started.wait()
        if self._process is None:
            raise errors.CommandFailed(command="qemu-nbd", status="not started", stderr=self.problem)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def touch(self) -> None:
        """Somebody still wants it."""
        self._touched = time.monotonic()

    def stop(self) -> None:
        """End it, and return when it has ended."""
        self._stop.set()
        self._keeper.join(_END_SECONDS * 3)

    def _keep(self, listener: socket.socket, options: list[str]) -> None:
        with tempfile.TemporaryFile() as said:
            try:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", "prlimit", "--core=0", "--",
                     "sh", "-c", _HAND_OVER, "sh", "qemu-nbd", *options],
                    stdin=listener.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env={"PATH": PATH, "LC_ALL": "C"},
                    cwd="/",
                    start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                self.problem = str(exc.strerror)
                return
            finally:
                listener.close()
                self._started.set()
            self._watch(self._process)
            if self._process.returncode > 0:
                said.seek(0)
                lines = said.read(65_536).decode(errors="replace").strip().splitlines() or ["no reason given"]
                self.problem = lines[-1][-500:]
                LOG.warning("qemu-nbd for %s ended with %d: %s", self.name, self._process.returncode, self.problem)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        while not self._stop.is_set():
            if time.monotonic() - self._touched > self._idle_seconds:
                LOG.warning("%s: nobody sent anything for %.0f s: no longer listening", self.name, self._idle_seconds)
                break
            try:
                process.wait(0)
                return
            except subprocess.TimeoutExpired:
                self._stop.wait(_LOOK_SECONDS)
        deadline = time.monotonic() + _END_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            # Again and again: one that has just begun does not hear the first.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ASK_SECONDS)
        process.kill()
        process.wait()
