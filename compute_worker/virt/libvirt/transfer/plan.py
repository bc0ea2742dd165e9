"""What is sent of a disk before its guest is shut down, written down before the first byte goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from compute_worker.images import files
from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.extents import Extent

DIRECTORY = "precopy.part"
"""In the instance's directory, and with it where it is set aside."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """``token``: the checkpoint; ``data`` and ``blank`` (reads as zeros): what the layer held then, as far as the file
    showed it. ``size``, ``cluster`` and ``window`` in bytes."""

    token: str
    size: int
    cluster: int
    window: int
    data: list[Extent]
    blank: list[Extent]

    @property
    def planned(self) -> list[Extent]:
        """Both."""
        return list(extents.merge(sorted([*self.data, *self.blank])))

    def windows(self, some: Iterable[Extent]) -> list[int]:
        """The windows that ``some`` lie in."""
        found = (range(begin // self.window, -(-end // self.window)) for begin, end in some)
        return sorted({number for numbers in found for number in numbers})


def from_layers(layers: Iterable[Mapping[str, Any]]) -> tuple[list[Extent], list[Extent]]:
    """Data and zeros of the top layer, from what ``qemu-img map`` says."""
    data: list[Extent] = []
    blank: list[Extent] = []
    for piece in layers:
        if piece.get("depth") == 0 and piece.get("present", True):
            begin = int(piece["start"])
            (blank if piece.get("zero") else data).append((begin, begin + int(piece["length"])))
    return list(extents.merge(data)), list(extents.merge(blank))


def path_of(directory: Path, name: str) -> Path:
    """Where the plan of a disk is kept."""
    return directory / DIRECTORY / f"{name}.json"


def read(directory: Path, name: str) -> Plan | None:
    """The plan of a disk of the instance in ``directory``; ``None`` where there is none that can be believed."""
    try:
        return msgspec.json.decode(path_of(directory, name).read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError):
        return None


def write(directory: Path, name: str, plan: Plan) -> None:
    """Keep it, durably."""
    files.write_atomic(path_of(directory, name), msgspec.json.encode(plan))
