"""What guests wrote to their serial consoles: hostile bytes, bounded, read without following any link.

virtlogd rolls ``console.log`` over into ``console.log.0``, ``.1`` and so on, and makes each new one for root alone.
What this process may not open, libvirtd reads for it: members of libvirt's group may ask for files of a directory by
way of a storage pool. The pool is transient and exists while it is read.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import libvirt

from compute_worker import errors
from compute_worker.images import files
from compute_worker.virt.libvirt.faults import code_of
from compute_worker.virt.libvirt.host import Host
from compute_worker.virt.libvirt.xml_builder import CONSOLE_LOG

LOG = logging.getLogger(__name__)
_ROLLED = 16
"""More rolled-over files than virtlogd is ever told to keep are not looked for."""


class Console:
    """Reads the consoles of one host's guests."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()

    def tail(self, uuid: str, directory: Path, size: int) -> bytes:
        """The last ``size`` bytes of what the guest wrote, over as many rolled-over files as hold them.

        :raises HypervisorUnavailable: libvirtd would have to read it, and does not answer.
        """
        output = b""
        for name in (CONSOLE_LOG, *(f"{CONSOLE_LOG}.{number}" for number in range(_ROLLED))):
            if len(output) >= size:
                break
            piece = self._tail_of(uuid, directory / name, size - len(output))
            if piece is None:
                break
            output = piece + output
        return output

    def _tail_of(self, uuid: str, path: Path, size: int) -> bytes | None:
        """The end of one file; ``None`` where there is none."""
        with files.disk_errors(path):
            try:
                return read_tail(path, size)
            except FileNotFoundError:
                return None
            except PermissionError:
                pass
        return self._through_libvirt(uuid, path, size)

    def _through_libvirt(self, uuid: str, path: Path, size: int) -> bytes | None:
        # Two at once would share one pool, and the first to end would take it from the other.
        with self._lock, self._host.calling("reading its console", uuid) as conn:
            pool = _open_pool(conn, uuid, path.parent)
            try:
                return _download(conn, pool, path.name, size)
            finally:
                pool.destroy()

    def forget(self, uuid: str) -> None:
        """Remove the pool that a reader left that was killed."""
        with self._host.calling("forgetting its console", uuid) as conn:
            pool = _find_pool(conn, uuid)
            if pool is not None:
                pool.destroy()


def read_tail(path: Path, size: int) -> bytes:
    """The last ``size`` bytes of a plain file that is no link.

    :raises OSError: it cannot be opened.
    :raises Broken: it is no plain file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as log:
        found = os.fstat(log.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise errors.Broken(f"{path} is not a plain file: remove it")
        log.seek(max(0, found.st_size - size))
        return log.read(size)


def _pool_name(uuid: str) -> str:
    return f"compute-worker-console-{uuid}"


def _find_pool(conn: Any, uuid: str) -> Any:
    try:
        return conn.storagePoolLookupByName(_pool_name(uuid))
    except libvirt.libvirtError as exc:
        if code_of(exc) in (libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_SUPPORT):
            return None
        raise


def _open_pool(conn: Any, uuid: str, directory: Path) -> Any:
    pool = _find_pool(conn, uuid)
    if pool is None:
        root = ET.Element("pool", type="dir")
        ET.SubElement(root, "name").text = _pool_name(uuid)
        ET.SubElement(ET.SubElement(root, "target"), "path").text = str(directory)
        return conn.storagePoolCreateXML(ET.tostring(root, encoding="unicode"), 0)
    pool.refresh(0)
    return pool


def _download(conn: Any, pool: Any, name: str, size: int) -> bytes | None:
    try:
        volume = pool.storageVolLookupByName(name)
    except libvirt.libvirtError as exc:
        if code_of(exc) == libvirt.VIR_ERR_NO_STORAGE_VOL:
            return None
        raise
    length = int(volume.info()[1])
    offset, pieces = max(0, length - size), []
    stream = conn.newStream(0)
    volume.download(stream, offset, length - offset, 0)
    stream.recvAll(lambda _, data, __: pieces.append(data), None)
    stream.finish()
    return b"".join(pieces)
