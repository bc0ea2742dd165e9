"""The file store: a directory whose files are the images, named by their ids."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compute_worker import errors
from compute_worker.images import files
from compute_worker.images.store import CHUNK_BYTES, ImageFacts, ImageStore, Opened
from compute_worker.objects import ImageMeta

if TYPE_CHECKING:
    from compute_worker.config import Images


class FileStore(ImageStore):
    """Images in ``images.file_path``. A symbolic link is followed only to a file inside that directory.

    An image that is being written is ``.<id>.part``, which is no image id; publishing is a rename.
    """

    name: ClassVar[str] = "file"

    def __init__(self, settings: Images) -> None:
        if not settings.file_path:
            raise ValueError("images.file_path is empty")
        self._root = Path(settings.file_path)

    def stat(self, image_id: str) -> ImageFacts:
        """Size and modification time."""
        fd = self._open(image_id)
        try:
            return _facts(os.fstat(fd))
        finally:
            os.close(fd)

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        """From ``offset``, unless the file changed since ``validator`` was seen."""
        fd = self._open(image_id)
        if offset and validator is not None and _facts(os.fstat(fd)).validator != validator:
            offset = 0
        source = os.fdopen(fd, "rb", buffering=0)
        source.seek(offset)

        def chunks() -> Iterator[bytes]:
            try:
                while chunk := source.read(CHUNK_BYTES):
                    yield chunk
            except OSError as exc:
                raise errors.ImageStoreUnavailable(store=self.name, reason=str(exc.strerror)) from exc

        return Opened(offset=offset, chunks=chunks(), abort=lambda: None, close=source.close)

    def create(self, image: ImageMeta) -> None:
        """Begin an image.

        :raises compute_worker.errors.ImageUnacceptable: one of this name is published.
        """
        part = self._part(image.id)
        if (self._root / image.id).is_symlink() or (self._root / image.id).exists():
            raise errors.ImageUnacceptable(image=image.id, reason=f"store {self.name} has one of this name already")
        with files.disk_errors(part):
            files.create_private(part, 0o644)

    def write(self, image_id: str, chunks: Iterable[bytes], size_bytes: int | None = None) -> None:
        """Write the image; ``size_bytes``, where given, must come out."""
        part = self._part(image_id)
        done = 0
        with files.disk_errors(part), open(part, "wb") as out:
            for chunk in chunks:
                out.write(chunk)
                done += len(chunk)
        if size_bytes is not None and done != size_bytes:
            raise errors.ImageUnacceptable(image=image_id, reason=f"{done} bytes were written, {size_bytes} announced")

    def publish(self, image_id: str) -> ImageFacts:
        """Rename it into place, durably."""
        part = self._part(image_id)
        with files.disk_errors(part):
            if part.exists():
                files.publish(part, self._root / image_id)
        return self.stat(image_id)

    def abort(self, image_id: str) -> None:
        """Remove what was written."""
        with files.disk_errors(self._root):
            self._part(image_id).unlink(missing_ok=True)

    def _part(self, image_id: str) -> Path:
        return self._root / f".{self.check_id(image_id)}.part"

    def _open(self, image_id: str) -> int:
        """A descriptor of the image's regular file, proven to lie inside the directory."""
        path = self._root / self.check_id(image_id)
        try:
            root = os.path.realpath(self._root, strict=True)
        except OSError as exc:
            raise errors.ImageStoreUnavailable(store=self.name, reason=f"{self._root}: {exc.strerror}") from None
        try:
            # O_NONBLOCK: a FIFO of that name must not hang us.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError | NotADirectoryError) or path.is_symlink():
                raise errors.ImageNotFound(image=image_id, store=self.name) from None
            raise errors.ImageStoreUnavailable(store=self.name, reason=f"{image_id}: {exc.strerror}") from None
        # The descriptor's own path, so that nothing can be swapped between the look and the use.
        real = os.path.realpath(f"/proc/self/fd/{fd}")
        if os.path.commonpath([real, root]) != root or not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise errors.ImageNotFound(image=image_id, store=self.name)
        return fd


def _facts(found: os.stat_result) -> ImageFacts:
    return ImageFacts(size_bytes=found.st_size, validator=f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}")
