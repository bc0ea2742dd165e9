"""Where images come from and where snapshots go: the contract of an image store.

A store is an entry point of ``compute_worker.image_stores`` and is constructed as ``Store(settings: Images)``. It is
used by many threads at once. It says what an image is (:meth:`ImageStore.stat`) and gives its bytes from any offset
(:meth:`ImageStore.open`); deciding whether they are acceptable is not its work. A snapshot goes in by ``create``,
``write`` and ``publish``, each of which may be called again by a process that knows nothing of the first; ``withdraw``
undoes all three.
"""

from __future__ import annotations

import abc
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compute_worker import errors
from compute_worker.objects import ID_PATTERN, ORIGIN, ImageMeta, StoredImage

if TYPE_CHECKING:
    from compute_worker.config import Images
    from compute_worker.virt.driver import Job

__all__ = [
    "CHUNK_BYTES",
    "NAMESPACE",
    "ORIGIN",
    "Hole",
    "ImageFacts",
    "ImageStore",
    "ImageStores",
    "Opened",
    "Piece",
    "flat",
]
NAMESPACE = "compute_worker.image_stores"
CHUNK_BYTES = 1 << 20
_ID = re.compile(ID_PATTERN)


@dataclass(frozen=True, slots=True)
class Hole:
    """That many zeros on their way to a store, which need not occupy any place there."""

    size: int


Piece = bytes | bytearray | memoryview | Hole
"""What an image is written from: at most some MiB each, holes of any size."""
_ZEROS = bytes(CHUNK_BYTES)


def flat(pieces: Iterable[Piece]) -> Iterator[bytes | bytearray | memoryview]:
    """The same with holes as zeros, a chunk at a time."""
    for piece in pieces:
        if isinstance(piece, Hole):
            left = piece.size
            while left > 0:
                yield memoryview(_ZEROS)[: min(left, CHUNK_BYTES)]
                left -= CHUNK_BYTES
        else:
            yield piece


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a store says of an image. ``None``: it does not say."""

    size_bytes: int | None = None
    checksum_algorithm: str | None = None
    checksum: str | None = None
    disk_format: str | None = None
    validator: str | None = None
    """Changes when the bytes change (a strong ETag, a modification time): what a resumed download is held to."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Bytes on their way. ``offset`` is where they begin: 0 where the store cannot begin elsewhere.

    ``abort`` ends a ``chunks`` that waits for the other side, from any thread; ``close`` frees what it holds.
    """

    offset: int
    chunks: Iterator[bytes]
    abort: Callable[[], None]
    close: Callable[[], None]


class ImageStore(abc.ABC):
    """One place that has images. Errors name the store and the image, never an address with credentials in it."""

    name: ClassVar[str]
    takes_deltas: ClassVar[bool] = False
    """Whether :meth:`write_delta` works."""
    lists: ClassVar[bool] = False
    """Whether :meth:`list_images` works."""

    @abc.abstractmethod
    def stat(self, image_id: str) -> ImageFacts:
        """What the store knows of the image, without its bytes.

        :raises compute_worker.errors.ImageNotFound: it has no such image, or it is not there to be read (yet).
        :raises compute_worker.errors.ImageStoreUnavailable: no answer; later maybe.
        :raises compute_worker.errors.ImageUnacceptable: the store refuses us.
        """

    @abc.abstractmethod
    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        """The image's bytes from ``offset``, or from 0 where the store cannot resume or ``validator`` has changed.

        Raises as :meth:`stat`, and ``chunks`` raises ``ImageStoreUnavailable`` when the stream breaks. A stream that
        ends early without an error is possible: the caller counts.
        """

    def create(self, image: ImageMeta) -> None:
        """Begin a new image ``image.id``, which nobody sees before :meth:`publish`. Called again: the same one. Its
        property :data:`ORIGIN` says which operation makes it.

        :raises compute_worker.errors.NotSupported: this store takes no images, or none of this kind.
        :raises compute_worker.errors.ImageUnacceptable: it has one of this id, of another origin.
        """
        raise self._takes_none()

    def write(
        self, image_id: str, pieces: Iterable[Piece], size_bytes: int | None = None, job: Job | None = None
    ) -> ImageFacts:
        """Give a created image its bytes, in one pass from its beginning; called again, it starts over. ``size_bytes``,
        where known, must come out. Cancelled through ``job``, also while the other side is silent. Returns their size
        and sha256, computed as they pass.

        :raises compute_worker.errors.ImageStoreUnavailable: the store broke off or is silent; later maybe.
        :raises compute_worker.errors.DiskFull: the store has no room.
        :raises compute_worker.errors.Cancelled: by ``job``.
        """
        raise self._takes_none()

    def write_delta(
        self,
        image_id: str,
        parent_id: str,
        patches: Iterable[tuple[int, Piece]],
        size_bytes: int,
        job: Job | None = None,
    ) -> ImageFacts:
        """Give a created image the bytes of image ``parent_id``, with pieces at these offsets of the file over them.
        Only where :attr:`takes_deltas`. Called again, it starts over. Returns and raises as :meth:`write`."""
        raise errors.NotSupported(what=f"building on another image in image store {self.name!r}")

    def local_path(self, image_id: str) -> Path | None:
        """The published image as a file of this host, to be read only; ``None`` where it is not one."""
        return None

    def publish(self, image_id: str) -> ImageFacts:
        """Make the written image visible, whole and durable. Called again after success: the same facts."""
        raise self._takes_none()

    def withdraw(self, image: ImageMeta) -> None:
        """Undo :meth:`create`, :meth:`write` and :meth:`publish` of ``image``. Ends well when there is none; an image
        of this id of another :data:`ORIGIN` stays."""
        raise self._takes_none()

    def list_images(self, properties: Mapping[str, str], limit: int = 1000) -> list[StoredImage]:
        """Published images that have all these properties, the newest first. At most ``limit``."""
        raise errors.NotSupported(what=f"listing image store {self.name!r}")

    def delete(self, image_id: str) -> None:
        """Remove a published image. Ends well when there is none."""
        raise self._takes_none()

    def _takes_none(self) -> errors.NotSupported:
        return errors.NotSupported(what=f"uploading to image store {self.name!r}")

    def check_id(self, image_id: str) -> str:
        """``image_id``, if it can be one: it is never a path.

        :raises compute_worker.errors.ImageNotFound: it cannot.
        """
        if not _ID.match(image_id):
            raise errors.ImageNotFound(image=repr(image_id)[:140], store=self.name)
        return image_id


class ImageStores:
    """The stores of this host, each made when first asked for."""

    def __init__(self, settings: Images) -> None:
        self._settings = settings
        self._made: dict[str, ImageStore] = {}
        self._lock = threading.Lock()

    def get(self, name: str | None = None) -> ImageStore:
        """The store ``name``, or the host's default.

        :raises compute_worker.errors.NotSupported: no such store is installed, or it is not configured.
        """
        wanted = name or self._settings.store
        with self._lock:
            if wanted not in self._made:
                self._made[wanted] = self._load(wanted)
            return self._made[wanted]

    def _load(self, name: str) -> ImageStore:
        from stevedore import driver, exception

        try:
            loaded = driver.DriverManager(NAMESPACE, name).driver
        except exception.NoMatches:
            raise errors.NotSupported(what=f"image store {name!r} (no such entry point in {NAMESPACE})") from None
        try:
            store: ImageStore = loaded(self._settings)
        except ValueError as exc:
            raise errors.NotSupported(what=f"image store {name!r} ({exc})") from None
        return store
