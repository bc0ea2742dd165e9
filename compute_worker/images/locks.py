"""Locks by name, held between threads and between processes, and given up by death alone.

They are ``flock`` on files in one directory: each holder opens its own file, so that threads of one process exclude
each other too, and the kernel lets go when the holder dies.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compute_worker.images.files import disk_errors

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
_LOOK_SECONDS = 0.05


class NamedLocks:
    """Exclusive locks in ``directory`` (made by its owner). The lock file's mtime is when the name was last used."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pause = threading.Event()

    def path(self, name: str) -> Path:
        """The lock's file.

        :raises ValueError: a name that could leave the directory.
        """
        if not _NAME.match(name):
            raise ValueError(f"not a lock name: {name!r}")
        return self._directory / f"{name}.lock"

    @contextmanager
    def hold(self, name: str, job: Job) -> Iterator[None]:
        """Wait for the lock, then hold it. Waiting ends at once when the job is cancelled.

        :raises compute_worker.errors.Cancelled: while waiting.
        """
        fd = self._try(name)
        while fd is None:
            job.check()
            self._pause.wait(_LOOK_SECONDS)
            fd = self._try(name)
        try:
            yield
        finally:
            os.close(fd)

    @contextmanager
    def try_hold(self, name: str) -> Iterator[bool]:
        """Hold the lock if nobody does; yields whether it is held."""
        fd = self._try(name)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def touch(self, name: str) -> None:
        """Note that ``name`` is used now."""
        path = self.path(name)
        with disk_errors(path):
            os.utime(path)

    def last_used(self, name: str) -> float:
        """When ``name`` was last touched (seconds since the epoch), 0 when never."""
        try:
            return self.path(name).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def names(self) -> set[str]:
        """Every name that has a lock file."""
        with disk_errors(self._directory):
            found = {entry.removesuffix(".lock") for entry in os.listdir(self._directory) if entry.endswith(".lock")}
        return {name for name in found if _NAME.match(name)}

    def forget(self, name: str) -> None:
        """Remove the lock's file. Only its holder may."""
        self.path(name).unlink(missing_ok=True)

    def _try(self, name: str) -> int | None:
        path = self.path(name)
        with disk_errors(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file after we opened it: then we locked nothing.
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(fd)
        return None
