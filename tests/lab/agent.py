"""The other host of a world: its driver and what is seen of it, from inside a first host, as the worker's own user.

:func:`main` serves; :class:`Remote` calls. What goes over is pickled: both ends are these tests.
"""

from __future__ import annotations

import itertools
import os
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from compute_worker import errors
from compute_worker.virt.driver import Part
from tests.lab.libvirt_world import LibvirtWorld
from tests.virt.jobs import RecordingJob

KEY = b"lab"
PORT = 7001


@dataclass(frozen=True)
class _Job:
    """Stands for the caller's job."""

    cancel_at: int | None


@dataclass(frozen=True)
class _Parts:
    """Stands for parts that the other end keeps."""

    number: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: dict[str, Any] | str | None = None
    reasons: tuple[str, ...] = ()
    reports: tuple[Any, ...] = ()


class _Agent:
    """Calls methods of the world, of its driver (``driver.spawn``) and of parts that it made."""

    def __init__(self, world: LibvirtWorld, host: str) -> None:
        self._world = world
        self._host = host
        self._parts: dict[int, Sequence[Part]] = {}
        self._numbers = itertools.count()

    def answer(self, what: str, arguments: tuple[Any, ...]) -> _Answer:
        jobs = [RecordingJob(a.cancel_at) if isinstance(a, _Job) else None for a in arguments]
        passed = [job or a for job, a in zip(jobs, arguments, strict=True)]
        try:
            value, error = self._call(what, passed), None
        except errors.ComputeError as exc:
            value, error = None, exc.to_dict()
        except BaseException:
            value, error = None, traceback.format_exc()
        made = [job for job in jobs if job is not None]
        return _Answer(value, error, tuple(r for j in made for r in j.reasons),
                       tuple(r for j in made for r in j.reports))  # fmt: skip

    def _call(self, what: str, arguments: list[Any]) -> Any:
        if what.startswith("part."):
            number, index, *rest = arguments
            return getattr(self._parts[number][index], what.removeprefix("part."))(*rest)
        if what == "available":
            return self._world.driver(self._host).available
        if what == "restart":
            self._world.restart(self._host)
            return None
        target: Any = self._world
        if what.startswith("driver."):
            target, what = self._world.driver(self._host), what.removeprefix("driver.")
        found = getattr(target, what)(*arguments)
        if isinstance(found, list) and found and isinstance(found[0], Part):
            number = next(self._numbers)
            self._parts[number] = found
            return _Parts(number, tuple(part.name for part in found))
        return found

    def serve(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    what, arguments = connection.recv()
                except (EOFError, OSError):
                    return
                connection.send(self.answer(what, arguments))


class Remote:
    """The other host, asked by any number of threads."""

    def __init__(self, host: str, port: int = PORT) -> None:
        self._address = (host, port)
        self._local = threading.local()

    def call(self, what: str, *arguments: Any) -> Any:
        """:raises ComputeError: as raised there."""
        if not hasattr(self._local, "connection"):
            self._local.connection = Client(self._address, authkey=KEY)
        passed = tuple(_Job(a._cancel_at) if isinstance(a, RecordingJob) else a for a in arguments)
        self._local.connection.send((what, passed))
        answer: _Answer = self._local.connection.recv()
        for job in arguments:
            if isinstance(job, RecordingJob):
                job.reasons += answer.reasons
                job.reports += answer.reports
        if isinstance(answer.error, dict):
            raise errors.from_dict(answer.error)
        if answer.error is not None:
            raise AssertionError(f"host {self._address[0]}: {answer.error}")
        if isinstance(answer.value, _Parts):
            return [self._part(answer.value.number, index, name) for index, name in enumerate(answer.value.names)]
        return answer.value

    def _part(self, number: int, index: int, name: str) -> Part:
        return Part(name, partial(self.call, "part.do", number, index), partial(self.call, "part.undo", number, index))


class RemoteDriver:
    """The other host's driver; methods that take callables are not for it."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    @property
    def available(self) -> bool:
        return bool(self._remote.call("available"))

    def __getattr__(self, name: str) -> Any:
        return partial(self._remote.call, f"driver.{name}")


def main(port: int) -> None:
    """Serve until the process is ended."""
    host = os.uname().nodename
    agent = _Agent(LibvirtWorld(), host)
    with Listener((host, port), authkey=KEY) as listener:
        while True:
            threading.Thread(target=agent.serve, args=(listener.accept(),), daemon=True).start()
