"""What systemd wants to hear (sd_notify(3)), in plain Python. Without systemd every call does nothing."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping

LOG = logging.getLogger(__name__)


class SystemdNotifier:
    """Talks to the socket that systemd named in the environment.

    :param environment: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC``, ``WATCHDOG_PID``; default: this process's.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        self._address = given.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self.watchdog_seconds = _watchdog(given)

    @property
    def present(self) -> bool:
        """Whether there is a systemd to talk to."""
        return bool(self._address)

    def send(self, *assignments: str) -> bool:
        """Send ``NAME=value`` lines. Returns whether they were sent; never raises, never blocks."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as connection:
                connection.sendto("\n".join(assignments).encode(), self._address)
        except OSError:
            return False
        return True

    def ready(self, status: str) -> bool:
        """The worker takes commands."""
        return self.send("READY=1", f"STATUS={_line(status)}")

    def status(self, status: str) -> bool:
        """One line for ``systemctl status``."""
        return self.send(f"STATUS={_line(status)}")

    def stopping(self, seconds: float) -> bool:
        """The worker ends, and needs up to ``seconds`` for it."""
        return self.send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> bool:
        """Put off the watchdog."""
        return self.send("WATCHDOG=1")


class Watchdog:
    """A thread that puts off systemd's watchdog, twice in its interval, for as long as the worker is alive.

    :param alive: whether it is, e.g. that the journal answered a read; when it hangs, so does the thread, and systemd
        starts the worker anew, which goes on from the journal.
    """

    def __init__(self, notifier: SystemdNotifier, alive: Callable[[], bool]) -> None:
        self._notifier = notifier
        self._alive = alive
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> bool:
        """Begin; false when nobody asked for it."""
        if self._notifier.watchdog_seconds is None or not self._notifier.present:
            return False
        self._thread.start()
        return True

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(1)

    def _run(self) -> None:
        interval = (self._notifier.watchdog_seconds or 0) / 2
        while True:
            try:
                if self._alive():
                    self._notifier.alive()
            except Exception:
                LOG.exception("the worker cannot tell whether it is alive: systemd will start it anew")
            if self._stopping.wait(interval):
                return


def _watchdog(given: Mapping[str, str]) -> float | None:
    """Seconds within which systemd wants to hear from this process; ``None``: it does not."""
    if given.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(given.get("WATCHDOG_USEC", "0")) / 1e6 or None
    except ValueError:
        return None


def _line(text: str) -> str:
    return " ".join(text.split())
