"""Disks that nobody writes to, served by a ``qemu-nbd`` of their own: a guest's that is off, an image in a store."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any

from compute_worker.virt.libvirt.snapshot import reading
from compute_worker.virt.libvirt.snapshot.reading import Reader, Still, Unreadable
from compute_worker.virt.libvirt.transfer.export import Export
from compute_worker.virt.libvirt.transfer.layer import ALLOCATION, unix_address
from compute_worker.virt.libvirt.transfer.nbd import Connection, NbdError

_CLIENTS = 16


def node(path: Path, fmt: str, backing: Path | None = None, backing_format: str = "raw") -> str:
    """A disk in QEMU's own notation: formats and files are those that were written down when it was made. Nothing is
    guessed, and no name that stands in the disk itself is followed (CVE-2015-7548)."""
    made: dict[str, Any] = {"driver": fmt, "file": _file(path)}
    if fmt == "qcow2":
        made["backing"] = {"driver": backing_format, "file": _file(backing)} if backing is not None else None
    return "json:" + json.dumps(made)


def _file(path: Path) -> dict[str, str]:
    return {"driver": "file", "filename": str(path)}


class Served:
    """The disk ``source`` (see :func:`node`), readable while the context is open.

    :param directory: where its socket is; nobody else may search it.
    :raises CommandFailed: qemu-nbd does not start.
    """

    def __init__(self, name: str, source: str, directory: Path, idle_seconds: float) -> None:
        self._name = name
        self._source = source
        self._directory = directory
        self._idle_seconds = idle_seconds

    def __enter__(self) -> Served:
        self._fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._address = unix_address(self._fd, f"{self._name}.nbd")
        self._address.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self._address))
        listener.listen(_CLIENTS)
        options = ["--read-only", "--persistent", f"--shared={_CLIENTS}", "--", self._source]
        self._export = Export(self._name, listener, options, self._idle_seconds)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._export.stop()
        self._address.unlink(missing_ok=True)
        os.close(self._fd)

    def touch(self) -> None:
        """Somebody still reads."""
        self._export.touch()

    def look(self) -> Still:
        """Its size and data.

        :raises Unreadable: it is not what it should be.
        """
        try:
            return reading.look(Connection(self._address, "", contexts=(ALLOCATION,)))
        except NbdError as exc:
            self._export.stop()
            raise Unreadable(f"{self._name} cannot be read: {self._export.problem or exc}") from None

    def connect(self) -> Reader:
        """A reader of it."""
        connection = Connection(self._address, "", contexts=(ALLOCATION,))
        connection.open()
        return connection
