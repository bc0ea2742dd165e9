"""Windows: pieces of a disk that have arrived whole, recorded beside it so that a crash costs little."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from compute_worker.images import files

Runs = list[tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]]
"""Numbers as first and last of each run: ``[(0, 99), (103, 103)]``."""

_MOST = 1 << 24


class Arrived(msgspec.Struct, frozen=True):
    """The journal of one disk: its size and the size of its windows in bytes, and which are there and flushed.

    ``token``: the point in time of a running guest that they are of; empty: the file as it is.
    """

    size: int
    window: int
    runs: Runs = []
    token: str = ""

    @property
    def done(self) -> set[int]:
        """Numbers of the windows."""
        return numbers(self.runs)

    @property
    def count(self) -> int:
        """How many windows the disk has."""
        return -(-self.size // self.window)


def runs_of(some: Iterable[int]) -> Runs:
    """Numbers as runs."""
    runs: Runs = []
    for number in sorted(set(some)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def numbers(runs: Runs) -> set[int]:
    """Runs as numbers.

    :raises ValueError: more than a disk can have.
    """
    if sum(last - first + 1 for first, last in runs) > _MOST:
        raise ValueError("too many windows")
    return {number for first, last in runs for number in range(first, last + 1)}


def read(path: Path) -> Arrived | None:
    """The journal; ``None`` where there is none that can be believed."""
    with files.disk_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        return msgspec.json.decode(data, type=Arrived)
    except msgspec.DecodeError:
        return None


def write(path: Path, arrived: Arrived) -> None:
    """Replace the journal, durably. What it names must be durable before."""
    files.write_atomic(path, msgspec.json.encode(arrived))
