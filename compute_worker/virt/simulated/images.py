"""The image store of a simulated cell: bytes by image id, in memory and, where there is one, a directory."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 1 << 20
"""Of a larger file only the beginning becomes the content of a simulated disk; its size is kept."""

QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True)
class Image:
    """An image: its (beginning of) bytes, its size, and where the rest of it is."""

    data: bytes
    size: int
    path: Path | None = None

    @property
    def disk_format(self) -> str:
        """``qcow2`` or ``raw``, by the bytes."""
        return "qcow2" if self.data.startswith(QCOW2_MAGIC) else "raw"

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk in it."""
        if self.disk_format == "qcow2" and len(self.data) >= 32:
            return int.from_bytes(self.data[24:32], "big")
        return self.size

    def digest(self, algorithm: str) -> str:
        """Checksum of the whole image."""
        if self.path is None:
            return hashlib.new(algorithm, self.data).hexdigest()
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, algorithm).hexdigest()


class ImageShelf:
    """Images by id. ``put`` publishes at once; ``stage``, ``publish`` and ``withdraw`` are a snapshot's steps.

    :param directory: images are looked for there too, and published there, by rename, so that they outlive the
        process.
    :param below: a shelf to look on next.
    """

    def __init__(
        self,
        images: dict[str, bytes] | None = None,
        directory: Path | None = None,
        below: ImageShelf | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._images: dict[str, bytes] = dict(images or {})
        self._origins: dict[str, str] = {}
        self._staged: dict[str, bytes] = {}
        self.directory = directory
        self._below = below

    def put(self, image_id: str, data: bytes) -> None:
        """An image that was always there."""
        with self._lock:
            self._images[image_id] = data

    def get(self, image_id: str) -> Image | None:
        """The image, or ``None``."""
        with self._lock:
            data = self._images.get(image_id)
        if data is not None:
            return Image(data, len(data))
        path = self.directory / image_id if self.directory else None
        if path is None or not path.is_file():
            return self._below.get(image_id) if self._below is not None else None
        with path.open("rb") as stream:
            return Image(stream.read(HEAD_BYTES), path.stat().st_size, path)

    def stage(self, image_id: str, data: bytes) -> None:
        """Bytes on their way in: nobody can get them yet."""
        with self._lock:
            self._staged[image_id] = data

    def staged(self, image_id: str) -> bytes | None:
        """What :meth:`stage` left."""
        with self._lock:
            return self._staged.get(image_id)

    def publish(self, image_id: str, origin: str) -> bool:
        """Staged bytes become the image. True when it is there, made by ``origin``; false where another made it."""
        with self._lock:
            data = self._staged.get(image_id)
            if self._exists(image_id):
                self._staged.pop(image_id, None)
                return self._origin(image_id) == origin
            if data is None:
                raise KeyError(image_id)
            self._keep(image_id, data, origin)
            del self._staged[image_id]
            return True

    def withdraw(self, image_id: str, origin: str) -> None:
        """Remove what ``origin`` staged or published; nothing else."""
        with self._lock:
            self._staged.pop(image_id, None)
            if self._origin(image_id) != origin:
                return
            self._images.pop(image_id, None)
            self._origins.pop(image_id, None)
            if self.directory is not None:
                (self.directory / image_id).unlink(missing_ok=True)
                self._note(image_id).unlink(missing_ok=True)

    def origin(self, image_id: str) -> str | None:
        """Who published it by :meth:`publish`; ``None`` for any other image."""
        with self._lock:
            return self._origin(image_id) if self._exists(image_id) else None

    def names(self) -> set[str]:
        """Ids of all published images that this shelf keeps in memory, and of all staged ones."""
        with self._lock:
            return set(self._images) | {f"{name}.part" for name in self._staged}

    def _exists(self, image_id: str) -> bool:
        return image_id in self._images or (self.directory is not None and (self.directory / image_id).exists())

    def _origin(self, image_id: str) -> str | None:
        if image_id in self._origins:
            return self._origins[image_id]
        note = self._note(image_id) if self.directory is not None else None
        return note.read_text() if note is not None and note.exists() else None

    def _note(self, image_id: str) -> Path:
        assert self.directory is not None
        return self.directory / f".{image_id}.origin"

    def _keep(self, image_id: str, data: bytes, origin: str) -> None:
        if self.directory is None:
            self._images[image_id], self._origins[image_id] = data, origin
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._note(image_id).write_text(origin)
        part = self.directory / f".{image_id}.part"
        part.write_bytes(data)
        os.replace(part, self.directory / image_id)
