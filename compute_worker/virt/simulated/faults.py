"""Faults to inject into a simulated host, by the name of the call they strike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

BEFORE = "before"
"""Nothing was done yet."""
PARTIAL = "partial"
"""Half of the work was done: a directory with some of its disks, a ``.part`` file."""
AFTER = "after"
"""All was done, and the answer was lost."""


@dataclass
class Stall:
    """A call that does not come back until :meth:`release`."""

    released: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    """Set once a call hangs in it."""

    def release(self) -> None:
        """Let every call that hangs here go on."""
        self.released.set()


@dataclass
class _Fault:
    call: str
    when: str
    uuid: str | None
    times: int | None
    action: Callable[[str], None] | Stall

    def matches(self, call: str, uuid: str, when: str) -> bool:
        return self.call in (call, "*") and self.when == when and self.uuid in (None, uuid)


class Faults:
    """What will go wrong. Thread-safe. ``call`` is a name the driver enters the host by (``define``, ``start``,
    ``receive``, ...) or ``*``; ``times=None`` means until :meth:`clear`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []

    def fail(
        self,
        call: str,
        error: BaseException,
        times: int | None = 1,
        when: str = BEFORE,
        uuid: str | None = None,
    ) -> None:
        """The next ``times`` calls raise ``error``."""

        def strike(_uuid: str) -> None:
            raise error

        self.hook(call, strike, times, when, uuid)

    def hook(
        self,
        call: str,
        action: Callable[[str], None],
        times: int | None = 1,
        when: str = BEFORE,
        uuid: str | None = None,
    ) -> None:
        """The next ``times`` calls run ``action(uuid)``, with no lock held (except for ``partial``)."""
        self._add(_Fault(call, when, uuid, times, action))

    def stall(self, call: str, uuid: str | None = None, times: int | None = 1) -> Stall:
        """The next ``times`` calls hang until the returned stall is released."""
        stall = Stall()
        self._add(_Fault(call, BEFORE, uuid, times, stall))
        return stall

    def clear(self) -> None:
        """Nothing goes wrong any more; what hangs goes on."""
        with self._lock:
            faults, self._faults = self._faults, []
        for fault in faults:
            if isinstance(fault.action, Stall):
                fault.action.release()

    def armed(self, call: str, uuid: str, when: str = BEFORE) -> bool:
        """Whether such a fault waits, without using it up."""
        with self._lock:
            return any(f.matches(call, uuid, when) for f in self._faults)

    def strike(self, call: str, uuid: str, when: str) -> Stall | None:
        """Do what is due at this point. A stall is returned, for the caller to wait in its own way."""
        if not self._faults:
            return None
        action = self._take(call, uuid, when)
        if action is None or isinstance(action, Stall):
            return action
        action(uuid)
        return None

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _take(self, call: str, uuid: str, when: str) -> Callable[[str], None] | Stall | None:
        with self._lock:
            for fault in self._faults:
                if fault.matches(call, uuid, when):
                    break
            else:
                return None
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self._faults.remove(fault)
            return fault.action
