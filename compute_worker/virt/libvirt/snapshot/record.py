"""What a snapshot must know again after its process died: beside the disks, written before what it tells of happens."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from compute_worker import errors
from compute_worker.images import files
from compute_worker.virt.libvirt.snapshot.decision import Method

DIRECTORY = "snapshot.part"
"""In the instance's directory, for its user and its hypervisor alone (CVE-2013-7048): socket, scratch, compressed
image, and :class:`Held`. An instance has at most one."""
_HELD = "snapshot.json"
_LAST = "snapshots.json"
T = TypeVar("T")


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A point in time that is being frozen (``ready`` false), is frozen, or has been written to the store
    (``written``)."""

    image: str
    origin: str
    method: Method
    target: str = ""
    """The guest's name of the disk."""
    token: str = ""
    """The checkpoint that was made with it."""
    since: str = ""
    """The checkpoint that it is told from."""
    parent: str = ""
    """The image of that checkpoint."""
    ready: bool = False
    thawed: bool = True
    """Whether nothing of the guest can be frozen by us any more."""
    written: bool = False
    read_bytes: int = 0
    """Of the guest's disk."""
    size_bytes: int | None = None
    checksum_algorithm: str | None = None
    checksum: str | None = None


class Last(msgspec.Struct, frozen=True, kw_only=True):
    """``snapshots.json``: the last image that was made of the root disk, and what the next can build on. ``token``:
    the checkpoint that the disk keeps for it; ``validator``: of the image when it was published."""

    image: str
    origin: str
    store: str
    disk_format: str
    token: str = ""
    validator: str = ""
    size_bytes: int | None = None
    checksum_algorithm: str | None = None
    checksum: str | None = None


def held(directory: Path) -> Held | None:
    """The point in time of the instance in ``directory``; ``None``: none that can be believed."""
    return _read(directory / DIRECTORY / _HELD, Held)


def keep(directory: Path, one: Held) -> None:
    """Write it, durably."""
    files.write_atomic(directory / DIRECTORY / _HELD, msgspec.json.encode(one))


def last(directory: Path) -> Last | None:
    """The last image; ``None``: none, or nothing that can be believed: the next one is full."""
    return _read(directory / _LAST, Last)


def keep_last(directory: Path, one: Last) -> None:
    """Write it, durably."""
    files.write_atomic(directory / _LAST, msgspec.json.encode(one))


def forget_last(directory: Path) -> None:
    """There is none to build on."""
    path = directory / _LAST
    with files.disk_errors(path):
        path.unlink(missing_ok=True)


def _read(path: Path, type_: type[T]) -> T | None:
    try:
        with files.disk_errors(path):
            data = path.read_bytes() if path.is_file() else b""
        return msgspec.json.decode(data, type=type_)
    except (msgspec.DecodeError, errors.Broken):
        return None
