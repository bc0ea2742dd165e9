"""The image store of a simulated cell: bytes by image id, in memory and, where there is one, a directory."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from compute_worker.images.store import ORIGIN
from compute_worker.objects import ImageMeta, StoredImage

HEAD_BYTES = 1 << 20
"""Of a larger file only the beginning becomes the content of a simulated disk; its size is kept."""

QCOW2_MAGIC = b"QFI\xfb"
_HEADER_BYTES = 112
_MARK = b"simulated"


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
    """Images by id. ``put`` publishes at once; ``create``, ``stage`` and ``publish`` are a snapshot's steps, which
    ``withdraw`` undoes.

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
        self._notes: dict[str, StoredImage] = {}
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

    def create(self, image: ImageMeta) -> bool:
        """Begin an image. False where one of this id is published, or being made by another operation."""
        with self._lock:
            if self._exists(image.id) or (image.id in self._staged and not self._is_of(image)):
                return False
            self._staged[image.id] = b""
            self._write_note(StoredImage(image=image, created_at=time.time()))
            return True

    def stage(self, image_id: str, data: bytes) -> None:
        """Bytes on their way in: nobody can get them yet."""
        with self._lock:
            self._staged[image_id] = data

    def staged(self, image_id: str) -> bytes | None:
        """What :meth:`stage` left."""
        with self._lock:
            return self._staged.get(image_id)

    def publish(self, image_id: str) -> bool:
        """Staged bytes become the image. False where there is one already."""
        with self._lock:
            if self._exists(image_id):
                return False
            data, note = self._staged.pop(image_id), self._note(image_id)
            if note is not None:
                image = msgspec.structs.replace(
                    note.image,
                    size_bytes=len(data),
                    checksum_algorithm="sha256",
                    checksum=hashlib.sha256(data).hexdigest(),
                )
                self._write_note(msgspec.structs.replace(note, image=image))
            self._keep(image_id, data)
            return True

    def withdraw(self, image: ImageMeta) -> None:
        """Remove what :meth:`create` of this image began, published or not; nothing of another operation's."""
        if self._is_of(image):
            self.delete(image.id)

    def delete(self, image_id: str) -> None:
        """It is not there any more."""
        with self._lock:
            self._staged.pop(image_id, None)
            self._images.pop(image_id, None)
            if self.directory is not None:
                (self.directory / image_id).unlink(missing_ok=True)
                self._note_path(image_id).unlink(missing_ok=True)
            self._notes.pop(image_id, None)

    def made_by(self, image: ImageMeta) -> bool:
        """Whether the image is published, by the operation that ``image`` names."""
        with self._lock:
            return self._exists(image.id) and self._is_of(image)

    def note(self, image_id: str) -> StoredImage | None:
        """What is known of an image that :meth:`create` began."""
        with self._lock:
            return self._note(image_id)

    def names(self) -> set[str]:
        """Ids of all published images that this shelf keeps in memory, and of all staged ones."""
        with self._lock:
            return set(self._images) | {f"{name}.part" for name in self._staged}

    def published(self) -> set[str]:
        """Ids of all published images, this shelf's and those below."""
        with self._lock:
            found = set(self._images)
        if self.directory is not None and self.directory.is_dir():
            found |= {path.name for path in self.directory.iterdir() if not path.name.startswith(".")}
        return found | (self._below.published() if self._below is not None else set())

    def _exists(self, image_id: str) -> bool:
        return image_id in self._images or (self.directory is not None and (self.directory / image_id).exists())

    def _is_of(self, image: ImageMeta) -> bool:
        note = self._note(image.id)
        return note is not None and note.image.properties.get(ORIGIN) == image.properties.get(ORIGIN)

    def _note(self, image_id: str) -> StoredImage | None:
        if self.directory is None:
            return self._notes.get(image_id)
        path = self._note_path(image_id)
        return msgspec.json.decode(path.read_bytes(), type=StoredImage) if path.exists() else None

    def _note_path(self, image_id: str) -> Path:
        assert self.directory is not None
        return self.directory / f".{image_id}.json"

    def _write_note(self, note: StoredImage) -> None:
        if self.directory is None:
            self._notes[note.image.id] = note
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        _replace(self._note_path(note.image.id), msgspec.json.encode(note))

    def _keep(self, image_id: str, data: bytes) -> None:
        if self.directory is None:
            self._images[image_id] = data
        else:
            _replace(self.directory / image_id, data)


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name.lstrip('.')}.part")
    part.write_bytes(data)
    os.replace(part, path)


def to_qcow2(content: bytes, size: int, compression: str) -> bytes:
    """What a simulated host sends as a qcow2 image: a header with the disk's size, our mark, and the content."""
    body = zlib.compress(content) if compression != "none" else content
    header = QCOW2_MAGIC + (3).to_bytes(4, "big") + bytes(16) + size.to_bytes(8, "big")
    return header.ljust(_HEADER_BYTES - len(_MARK) - 1, b"\0") + _MARK + (b"z" if body is not content else b"-") + body


def from_qcow2(data: bytes) -> bytes:
    """The content of an image that :func:`to_qcow2` made; any other data as they are."""
    if not data.startswith(QCOW2_MAGIC) or data[_HEADER_BYTES - len(_MARK) - 1 : _HEADER_BYTES - 1] != _MARK:
        return data
    body = data[_HEADER_BYTES:]
    return zlib.decompress(body) if data[_HEADER_BYTES - 1 : _HEADER_BYTES] == b"z" else body
