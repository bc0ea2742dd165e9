"""Where a simulated host keeps itself, so that a restarted process finds its guests again: one log of changes,
written anew, by rename, when it is opened and when it has grown. A host without a directory lives in memory only."""

from __future__ import annotations

import errno
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from compute_worker.virt.simulated.model import File, Slot

MAX_LOG_BYTES = 64 << 20
END = b"."

_encode = msgspec.json.Encoder().encode
_slot_decoder = msgspec.json.Decoder(Slot)
_base_decoder = msgspec.json.Decoder(dict[str, File])


class Persistence:
    """What a host has of instances, base images and effects, and each change of it as a line of ``<directory>/log``.

    A process may be killed at any point: what was changed :meth:`together` is there or it is not (lines count once a
    line ``.`` follows them). A simulated host is not kept over a crash of the real one: nothing is fsynced. One process
    at a time owns a directory.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.slots: dict[str, Slot] = {}
        self.base: dict[str, File] = {}
        self.effects: Counter[tuple[str, str]] = Counter()
        self.boot_id = ""
        self._path = directory / "log"
        self._fd = -1
        self._size = 0
        self._depth = 0
        self._lines_together: list[bytes] = []
        if self._path.exists():
            self._load()
        if not self.boot_id:
            self.boot_id = str(uuid.uuid4())
        self._compact()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Keep all changes made within, or none; nested ones go with the outermost. Under the cell's lock."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._flush()

    def save_slot(self, slot: Slot) -> None:
        """The slot as it is now; an empty one goes."""
        self._append(b"D" + slot.uuid.encode() if slot.empty else b"S" + _encode(slot))

    def save_base(self, base: dict[str, File]) -> None:
        """All base images."""
        self._append(b"B" + _encode(base))

    def add_effect(self, subject: str, effect: str) -> None:
        """One more of it."""
        self._append(f"E{subject} {effect} 1".encode())

    def new_boot(self) -> str:
        """Another boot of the host begins; returns its id."""
        self.boot_id = str(uuid.uuid4())
        self._append(b"H" + self.boot_id.encode())
        return self.boot_id

    def close(self) -> None:
        """Give back the file descriptor."""
        os.close(self._fd)
        self._fd = -1

    def _append(self, line: bytes) -> None:
        self._lines_together.append(line)
        if not self._depth:
            self._flush()

    def _flush(self) -> None:
        lines, self._lines_together = self._lines_together, []
        if self._size > MAX_LOG_BYTES:
            self._compact()  # what the lines would say is in it
        elif lines:
            self._size += _write(self._fd, _whole(lines))

    def _load(self) -> None:
        waiting: list[bytes] = []
        for line in self._path.read_bytes().split(b"\n"):
            if line != END:
                waiting.append(line)
                continue
            for change in waiting:
                self._apply(change[:1], change[1:])
            waiting.clear()

    def _apply(self, kind: bytes, rest: bytes) -> None:
        if kind == b"S":
            slot = _slot_decoder.decode(rest)
            self.slots[slot.uuid] = slot
        elif kind == b"D":
            self.slots.pop(rest.decode(), None)
        elif kind == b"B":
            self.base = _base_decoder.decode(rest)
        elif kind == b"E":
            subject, effect, count = rest.decode().rsplit(" ", 2)
            self.effects[subject, effect] += int(count)
        else:
            self.boot_id = rest.decode()

    def _compact(self) -> None:
        part = self._path.with_suffix(".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = sum(_write(fd, _whole([line])) for line in self._lines())
        os.replace(part, self._path)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def _lines(self) -> Iterator[bytes]:
        yield b"H" + self.boot_id.encode()
        yield b"B" + _encode(self.base)
        for slot in self.slots.values():
            yield b"S" + _encode(slot)
        for (subject, effect), count in self.effects.items():
            yield f"E{subject} {effect} {count}".encode()


def _whole(lines: list[bytes]) -> bytes:
    return b"\n".join([*lines, END, b""])


def _write(fd: int, data: bytes) -> int:
    if os.write(fd, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return len(data)
