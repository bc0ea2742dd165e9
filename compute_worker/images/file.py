"""The file store: a directory whose files are the images, named by their ids."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec

from compute_worker import errors
from compute_worker.images import files, sparse
from compute_worker.images.store import CHUNK_BYTES, ORIGIN, Hole, ImageFacts, ImageStore, Opened, Piece, flat
from compute_worker.images.summing import Sum
from compute_worker.objects import ID_PATTERN, ImageMeta, StoredImage

if TYPE_CHECKING:
    from compute_worker.config import Images
    from compute_worker.virt.driver import Job

PUBLISHED_MODE = 0o640
_OUT_BYTES = 8 << 20
_ID = re.compile(ID_PATTERN)


class Note(StoredImage, frozen=True, kw_only=True):
    """What ``.<id>.json`` says; ``validator``: of which file it says it."""

    validator: str = ""


class FileStore(ImageStore):
    """Images in ``images.file_path``. A symbolic link is followed only to a file inside that directory.

    An image that is being written is ``.<id>.part``, which is no image id; publishing is a link. Beside an image that
    a snapshot made lies ``.<id>.json``: what it is, its sum, its properties. It counts as long as the image is the file
    it was written for.
    """

    name: ClassVar[str] = "file"
    takes_deltas: ClassVar[bool] = True
    lists: ClassVar[bool] = True

    def __init__(self, settings: Images) -> None:
        if not settings.file_path:
            raise ValueError("images.file_path is empty")
        self._root = Path(settings.file_path)

    def stat(self, image_id: str) -> ImageFacts:
        """Size and modification time; of what a snapshot made also its sum and format."""
        fd = self._open(image_id)
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        note = self._valid_note(image_id, found)
        return ImageFacts(
            size_bytes=found.st_size,
            checksum_algorithm=note.image.checksum_algorithm if note is not None else None,
            checksum=note.image.checksum if note is not None else None,
            disk_format=note.image.disk_format if note is not None else None,
            validator=_validator(found),
        )

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        """From ``offset``, unless the file changed since ``validator`` was seen."""
        fd = self._open(image_id)
        if offset and validator is not None and _validator(os.fstat(fd)) != validator:
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
        """Begin an image: what it is goes into ``.<id>.json`` first."""
        part, note = self._part(image.id), self._read_note(image.id)
        mine = note is not None and note.image.properties.get(ORIGIN) == image.properties.get(ORIGIN)
        with files.disk_errors(part):
            if os.path.lexists(self._root / image.id) or (part.exists() and not mine):
                raise errors.ImageUnacceptable(image=image.id, reason=f"store {self.name} has one of this id already")
            self._write_note(Note(image=image, created_at=time.time()))
            files.create_private(part)

    def write(
        self, image_id: str, pieces: Iterable[Piece], size_bytes: int | None = None, job: Job | None = None
    ) -> ImageFacts:
        """Write the image; holes stay holes."""
        part, done, out = self._part(image_id), 0, 0
        with self._writing(part, os.O_TRUNC) as fd, Sum() as total:
            for piece in pieces:
                if job is not None:
                    job.check()
                for data in flat([piece]):
                    with total.beside(data), files.disk_errors(part):
                        if not isinstance(piece, Hole):
                            sparse.put(fd, data, done)
                    done += len(data)
                if done - out >= _OUT_BYTES:
                    with files.disk_errors(part):
                        sparse.write_out(fd, out, done)
                    out = done
            with files.disk_errors(part):
                os.ftruncate(fd, done)
        if size_bytes is not None and done != size_bytes:
            raise errors.ImageUnacceptable(image=image_id, reason=f"{done} bytes were written, {size_bytes} announced")
        return self._note_written(image_id, done, total.hexdigest())

    def write_delta(
        self,
        image_id: str,
        parent_id: str,
        patches: Iterable[tuple[int, Piece]],
        size_bytes: int,
        job: Job | None = None,
    ) -> ImageFacts:
        """A copy of the parent (sharing its blocks where the file system can), patched, and read once for its sum."""
        part, parent = self._part(image_id), self._open(parent_id)
        try:
            with self._writing(part, os.O_TRUNC) as fd:
                with files.disk_errors(part):
                    sparse.clone(parent, fd, job)
                for offset, piece in patches:
                    if job is not None:
                        job.check()
                    with files.disk_errors(part):
                        sparse.put_over(fd, piece, offset)
                with files.disk_errors(part):
                    os.ftruncate(fd, size_bytes)
                    checksum = sparse.sha256(fd, job)
        finally:
            os.close(parent)
        return self._note_written(image_id, size_bytes, checksum)

    def local_path(self, image_id: str) -> Path | None:
        """The image's file."""
        os.close(self._open(image_id))
        return self._root / image_id

    def publish(self, image_id: str) -> ImageFacts:
        """Link it into place, durably; what is there is never replaced."""
        part, final = self._part(image_id), self._root / image_id
        with files.disk_errors(part):
            if part.exists():
                files.fsync(part)
                try:
                    os.link(part, final)
                except FileExistsError:
                    if not os.path.samefile(part, final):
                        raise errors.ImageUnacceptable(
                            image=image_id, reason=f"store {self.name} has one of this id already"
                        ) from None
                final.chmod(PUBLISHED_MODE)
                part.unlink()
                files.fsync(self._root)
        return self.stat(image_id)

    def withdraw(self, image: ImageMeta) -> None:
        """Remove what :meth:`create` began, if it was this operation's."""
        note = self._read_note(image.id)
        if note is not None and note.image.properties.get(ORIGIN) == image.properties.get(ORIGIN):
            self.delete(image.id)

    def list_images(self, properties: Mapping[str, str], limit: int = 1000) -> list[StoredImage]:
        """By their notes; images that somebody put there without one have no properties."""
        with files.disk_errors(self._root):
            names = [name for name in os.listdir(self._root) if _ID.match(name)]
        found = [image for name in names if (image := self._listed(name)) is not None]
        wanted = properties.items()
        matching = [entry for entry in found if wanted <= entry.image.properties.items()]
        return sorted(matching, key=lambda entry: (entry.created_at, entry.image.id), reverse=True)[:limit]

    def delete(self, image_id: str) -> None:
        """The image first, what describes it last."""
        part = self._part(image_id)
        with files.disk_errors(self._root):
            for path in (self._root / image_id, part, self._note(image_id)):
                path.unlink(missing_ok=True)
            files.fsync(self._root)

    def _listed(self, image_id: str) -> StoredImage | None:
        try:
            fd = self._open(image_id)
        except errors.ComputeError:
            return None  # gone meanwhile, or nothing that this store would give
        try:
            found = os.fstat(fd)
            note = self._valid_note(image_id, found)
            if note is not None:
                return StoredImage(image=note.image, created_at=note.created_at)
            kind = "qcow2" if os.pread(fd, 4, 0) == b"QFI\xfb" else "raw"
        except OSError as exc:
            raise errors.ImageStoreUnavailable(store=self.name, reason=f"{image_id}: {exc.strerror}") from None
        finally:
            os.close(fd)
        return StoredImage(
            image=ImageMeta(id=image_id, disk_format=kind, size_bytes=found.st_size), created_at=found.st_mtime
        )

    @contextmanager
    def _writing(self, part: Path, flags: int) -> Iterator[int]:
        """A descriptor of the part; what is written is on the disk when it ends well."""
        with files.disk_errors(part):
            fd = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
        try:
            yield fd
            with files.disk_errors(part):
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def _note(self, image_id: str) -> Path:
        return self._root / f".{self.check_id(image_id)}.json"

    def _read_note(self, image_id: str) -> Note | None:
        path = self._note(image_id)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Note)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise errors.ImageStoreUnavailable(store=self.name, reason=f"{path}: {exc.strerror}") from None
        except msgspec.DecodeError:
            return None  # not ours

    def _write_note(self, note: Note) -> None:
        files.write_atomic(self._note(note.image.id), msgspec.json.encode(note))

    def _note_written(self, image_id: str, size: int, checksum: str) -> ImageFacts:
        note, found = self._read_note(image_id), self._part(image_id).stat()
        if note is None:
            raise errors.ImageUnacceptable(image=image_id, reason=f"what store {self.name} noted of it is gone")
        image = msgspec.structs.replace(
            note.image, size_bytes=size, checksum_algorithm="sha256", checksum=checksum
        )
        self._write_note(msgspec.structs.replace(note, image=image, validator=_stamp(found)))
        return ImageFacts(size_bytes=size, checksum_algorithm="sha256", checksum=checksum)

    def _valid_note(self, image_id: str, found: os.stat_result) -> Note | None:
        """The note, unless the file was replaced since."""
        note = self._read_note(image_id)
        return note if note is not None and note.validator == _stamp(found) else None

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


def _validator(found: os.stat_result) -> str:
    return f"{found.st_ino}-{_stamp(found)}"


def _stamp(found: os.stat_result) -> str:
    # Without the inode: a store that was copied keeps its notes.
    return f"{found.st_size}-{found.st_mtime_ns}"
