"""Download one image to a ``.part`` file: streamed, resumed, counted, hashed, synced.

What has arrived is kept when the store goes away, and a later call goes on from there: after an interruption while the
store still has the same validator, after our own death only where a checksum proves the result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compute_worker import errors
from compute_worker.images.files import disk_errors
from compute_worker.images.store import CHUNK_BYTES, ImageFacts, ImageStore, Opened
from compute_worker.objects import ImageMeta

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

PHASE = "downloading image"
_ZEROS = memoryview(bytes(CHUNK_BYTES))
_HOLE_BYTES = 65_536
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0


def agree(image: ImageMeta, facts: ImageFacts, max_bytes: int) -> ImageFacts:
    """What must be true of the image: the caller's word and the store's, which must not contradict each other.

    :raises compute_worker.errors.ImageUnacceptable: they do, or it is larger than ``max_bytes``.
    """

    def refuse(reason: str) -> errors.ImageUnacceptable:
        return errors.ImageUnacceptable(image=image.id, reason=reason)

    if image.size_bytes is not None and facts.size_bytes not in (None, image.size_bytes):
        raise refuse(f"it has {facts.size_bytes} bytes, {image.size_bytes} were announced")
    size = facts.size_bytes if facts.size_bytes is not None else image.size_bytes
    if size == 0:
        raise refuse("it is empty")
    if size is not None and size > max_bytes:
        raise refuse(f"it has {size} bytes, this host takes {max_bytes} (images.max_image_gb)")
    if facts.disk_format not in (None, image.disk_format):
        raise refuse(f"its store says it is {facts.disk_format!r}, the caller {image.disk_format!r}")
    algorithm, checksum = facts.checksum_algorithm, facts.checksum
    if image.checksum is not None:
        # The length tells the algorithm where the caller did not.
        said = image.checksum_algorithm or ("sha256" if len(image.checksum) == 64 else "sha512")
        if checksum is not None and said == algorithm and checksum != image.checksum:
            raise errors.ImageChecksumMismatch(
                image=image.id, algorithm=said, actual=checksum, expected=image.checksum
            )
        algorithm, checksum = said, image.checksum
    return replace(facts, size_bytes=size, checksum_algorithm=algorithm, checksum=checksum)


def fetch(
    store: ImageStore, image: ImageMeta, facts: ImageFacts, part: Path, job: Job, *, max_bytes: int, attempts: int
) -> None:
    """Bring the image's bytes to ``part``, verified against ``facts`` (from :func:`agree`) and fsynced.

    The caller holds the image's lock. If the process dies inside, ``part`` holds a beginning of the image or garbage.

    :param attempts: times an interrupted stream is taken up again before ``ImageStoreUnavailable``.
    :raises compute_worker.errors.ImageStoreUnavailable: ``part`` is kept, to go on from.
    :raises compute_worker.errors.ImageUnacceptable: too many or other bytes than announced.
    :raises compute_worker.errors.DiskFull: no room at ``part``.
    """
    with disk_errors(part):
        download = _Download(store, image, facts, part, job, max_bytes)
        inherited = download.inherit() if facts.checksum is not None else 0
        download.run(attempts)
        if inherited and not download.matches():
            job.explain(f"what an earlier download left of image {image.id} was no good: downloading it anew")
            download.restart()
            download.run(attempts)
        if not download.matches():
            raise errors.ImageChecksumMismatch(
                image=image.id,
                algorithm=facts.checksum_algorithm,
                actual=download.hash.hexdigest() if download.hash else "",
                expected=facts.checksum,
            )
        download.sync()


@dataclass
class _Download:
    store: ImageStore
    image: ImageMeta
    facts: ImageFacts
    part: Path
    job: Job
    max_bytes: int
    done: int = 0
    hash: Any = None
    _opened: Opened | None = field(default=None, repr=False)

    def inherit(self) -> int:
        """Take over what an earlier process left; returns how many bytes."""
        self.restart(keep=True)
        size = self.part.stat().st_size
        if size > (self.facts.size_bytes or self.max_bytes):
            self.restart()
            return 0
        with open(self.part, "rb", buffering=0) as source:
            while chunk := source.read(CHUNK_BYTES):
                self.job.check()
                self.hash.update(chunk)
                self.done += len(chunk)
        return self.done

    def restart(self, keep: bool = False) -> None:
        """Begin at 0."""
        self.done = 0
        self.hash = hashlib.new(self.facts.checksum_algorithm) if self.facts.checksum_algorithm else None
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if keep else os.O_TRUNC)
        os.close(os.open(self.part, flags, 0o600))

    def run(self, attempts: int) -> None:
        """Stream until everything is here, taking up the stream again when it breaks."""
        if not self.done:
            self.restart()
        delay = _FIRST_DELAY
        for attempt in range(attempts + 1):
            try:
                self._stream()
                return
            except errors.ImageStoreUnavailable as exc:
                self.job.check()
                if attempt == attempts:
                    raise
                self.job.explain(f"{exc.message}: going on at byte {self.done} in {delay:.1f} s")
                self.job.wait(lambda: False, delay)
                delay = min(delay * 2, _LONGEST_DELAY)

    def matches(self) -> bool:
        """Whether the checksum is what was announced, or none was."""
        return self.facts.checksum is None or bool(self.hash.hexdigest() == self.facts.checksum)

    def sync(self) -> None:
        """Bring it to the disk."""
        with open(self.part, "rb") as whole:
            os.fsync(whole.fileno())

    def _stream(self) -> None:
        size = self.facts.size_bytes
        if size is not None and self.done == size:
            return
        self.job.check()
        with self._open() as opened, open(self.part, "r+b", buffering=0) as out:
            if opened.offset != self.done:
                self.restart()
            out.seek(self.done)
            for chunk in opened.chunks:
                self.job.check()
                self._take(chunk, out.fileno())
                self.job.report(PHASE, self.done, size, image=self.image.id)
        self.job.check()
        if size is not None and self.done < size:
            raise errors.ImageStoreUnavailable(
                store=self.store.name, reason=f"image {self.image.id} ended at byte {self.done} of {size}"
            )
        if not self.done:
            raise errors.ImageUnacceptable(image=self.image.id, reason="it is empty")

    @contextmanager
    def _open(self) -> Iterator[Opened]:
        opened = self.store.open(self.image.id, self.done, self.facts.validator)
        with closing(opened), self.job.on_cancel(opened.abort):
            yield opened

    def _take(self, chunk: bytes, fd: int) -> None:
        limit = self.facts.size_bytes if self.facts.size_bytes is not None else self.max_bytes
        if self.done + len(chunk) > limit:
            raise errors.ImageUnacceptable(image=self.image.id, reason=f"it has more than {limit} bytes")
        if self.hash is not None:
            self.hash.update(chunk)
        view = memoryview(chunk)
        for begin in range(0, len(view), _HOLE_BYTES):
            _append(fd, self.done, view[begin : begin + _HOLE_BYTES])
            self.done += len(view[begin : begin + _HOLE_BYTES])


def _append(fd: int, at: int, data: memoryview) -> None:
    """Write at the file's end; zeros become a hole."""
    if data == _ZEROS[: len(data)]:
        os.ftruncate(fd, at + len(data))
        return
    while data:
        written = os.pwrite(fd, data, at)
        at += written
        data = data[written:]
