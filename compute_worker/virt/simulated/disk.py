"""Where a simulated host keeps itself, so that a restarted process finds its guests again: a directory of JSON files,
one for each instance, each replaced by rename. A host without a directory lives in memory only."""

from __future__ import annotations

import errno
import os
import uuid
from collections import Counter
from pathlib import Path

import msgspec

from compute_worker.virt.simulated.model import File, Slot

_BASE = "_base.json"
_EFFECTS = "effects.log"

_encode = msgspec.json.Encoder().encode
_slot_decoder = msgspec.json.Decoder(Slot)
_base_decoder = msgspec.json.Decoder(dict[str, File])


class Persistence:
    """Reads and writes ``<directory>/<uuid>.json``, the base images and the log of effects.

    A process may be killed at any point: each file is the old or the new one. (A simulated host is not kept over a
    crash of the real one: nothing is fsynced.)
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._prefix = f"{directory}/"
        self._effects = os.open(directory / _EFFECTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def load(self) -> tuple[dict[str, Slot], dict[str, File], Counter[tuple[str, str]]]:
        """Slots by uuid, base images by name, effects by (uuid or image id, effect)."""
        slots: dict[str, Slot] = {}
        base: dict[str, File] = {}
        for path in self.directory.glob("*.json"):
            if path.name == _BASE:
                base = _base_decoder.decode(path.read_bytes())
            else:
                slot = _slot_decoder.decode(path.read_bytes())
                slots[slot.uuid] = slot
        effects: Counter[tuple[str, str]] = Counter()
        for line in (self.directory / _EFFECTS).read_text().splitlines():
            subject, _, effect = line.partition(" ")
            effects[subject, effect] += 1
        return slots, base, effects

    def boot_id(self, new: bool = False) -> str:
        """Which boot of the simulated host this is; ``new``: another one begins."""
        path = self.directory / "boot_id"
        if new or not path.exists():
            self._replace(str(path), str(uuid.uuid4()).encode())
        return path.read_text()

    def save_slot(self, slot: Slot) -> None:
        """The slot as it is now; an empty one goes."""
        path = f"{self._prefix}{slot.uuid}.json"
        if slot.empty:
            try:
                os.unlink(path)
            except FileNotFoundError:
                return
        else:
            self._replace(path, _encode(slot))

    def save_base(self, base: dict[str, File]) -> None:
        """All base images."""
        self._replace(f"{self._prefix}{_BASE}", _encode(base))

    def add_effect(self, subject: str, effect: str) -> None:
        """One more line."""
        os.write(self._effects, f"{subject} {effect}\n".encode())

    def close(self) -> None:
        """Give back the file descriptor."""
        os.close(self._effects)

    @staticmethod
    def _replace(path: str, data: bytes) -> None:
        part = f"{path}.part"
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            written = os.write(fd, data)
        finally:
            os.close(fd)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        os.replace(part, path)
