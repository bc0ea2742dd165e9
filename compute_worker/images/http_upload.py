"""How the http store takes images: by PUT, in one pass, and by DELETE when that does not end well.

A server shows an image with its last byte (nginx, S3 and the like write aside and rename), so publishing is only a
look. Beside image ``<id>`` lies ``<id>.about.json``: what it is and which operation made it.
"""

from __future__ import annotations

import abc
import http.client
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from compute_worker import errors
from compute_worker.images import put
from compute_worker.images.store import ORIGIN, ImageFacts, ImageStore, Piece
from compute_worker.objects import ImageMeta

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

ABOUT = ".about.json"
_MOST_ABOUT = 1 << 20
_BROKEN = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and the connection it comes by."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse

    def close(self) -> None:
        """Free both."""
        self.response.close()
        self.connection.close()

    def abort(self) -> None:
        """Wake whoever waits for bytes: closing alone would not."""
        put.shut_down(self.connection)


class HttpUploads(ImageStore):
    """The writing half of the store."""

    _base: str

    @abc.abstractmethod
    def _request(self, method: str, image_id: str, headers: dict[str, str]) -> Answer: ...

    @abc.abstractmethod
    def _connect(self, url: str) -> tuple[http.client.HTTPConnection, str]: ...

    @abc.abstractmethod
    def _error(self, status: int, image_id: str) -> errors.ComputeError: ...

    def create(self, image: ImageMeta) -> None:
        """Put what is known of it: a server that takes nothing from us says so here, before anything is frozen."""
        if image.id.endswith(ABOUT):
            raise errors.ImageUnacceptable(image=image.id, reason=f"store {self.name} keeps names that end in {ABOUT}")
        note = self._about(image.id)
        if note is None or note.properties.get(ORIGIN) != image.properties.get(ORIGIN):
            if note is not None or self._exists(image.id):
                raise errors.ImageUnacceptable(image=image.id, reason=f"store {self.name} has one of this id already")
            self._put_about(image)

    def write(
        self, image_id: str, pieces: Iterable[Piece], size_bytes: int | None = None, job: Job | None = None
    ) -> ImageFacts:
        """One PUT, with ``Content-Length`` where the size is known, else in chunks. What it leaves when it fails is
        removed by :meth:`withdraw`, or replaced by the next."""
        note = self._about(image_id)
        if note is None:
            raise errors.ImageUnacceptable(image=image_id, reason=f"what store {self.name} noted of it is gone")
        size, checksum = self._put(image_id, pieces, size_bytes, job)
        self._put_about(
            msgspec.structs.replace(note, size_bytes=size, checksum_algorithm="sha256", checksum=checksum)
        )
        return ImageFacts(size_bytes=size, checksum_algorithm="sha256", checksum=checksum)

    def publish(self, image_id: str) -> ImageFacts:
        """Look whether all of it is there."""
        found, note = self.stat(image_id), self._about(image_id)
        if note is None or note.checksum is None:
            raise errors.ImageUnacceptable(image=image_id, reason=f"it was not written whole to store {self.name}")
        if found.size_bytes not in (None, note.size_bytes):
            raise errors.ImageUnacceptable(
                image=image_id,
                reason=f"store {self.name} has {found.size_bytes} bytes of it, {note.size_bytes} were sent",
            )
        return ImageFacts(
            size_bytes=note.size_bytes,
            checksum_algorithm=note.checksum_algorithm,
            checksum=note.checksum,
            disk_format=note.disk_format,
            validator=found.validator,
        )

    def withdraw(self, image: ImageMeta) -> None:
        """DELETE, where the note says that it is this operation's."""
        note = self._about(image.id)
        if note is not None and note.properties.get(ORIGIN) == image.properties.get(ORIGIN):
            self.delete(image.id)

    def delete(self, image_id: str) -> None:
        """DELETE of the image, then of what is known of it."""
        for name in (self.check_id(image_id), image_id + ABOUT):
            with suppress(errors.ImageNotFound):
                self._request("DELETE", name, {}).close()

    def _exists(self, image_id: str) -> bool:
        try:
            self.stat(image_id)
        except errors.ImageNotFound:
            return False
        return True

    def _about(self, image_id: str) -> ImageMeta | None:
        try:
            answer = self._request("GET", self.check_id(image_id) + ABOUT, {})
        except errors.ImageNotFound:
            return None
        try:
            return msgspec.json.decode(answer.response.read(_MOST_ABOUT), type=ImageMeta)
        except msgspec.DecodeError:
            raise errors.ImageUnacceptable(
                image=image_id, reason=f"what store {self.name} has under {image_id}{ABOUT} is no description"
            ) from None
        except _BROKEN as exc:
            raise errors.ImageStoreUnavailable(store=self.name, reason=put.reason_of(exc)) from None
        finally:
            answer.close()

    def _put_about(self, image: ImageMeta) -> None:
        data = msgspec.json.encode(image)
        self._put(image.id + ABOUT, [data], len(data), None)

    def _put(
        self, name: str, pieces: Iterable[Piece], size_bytes: int | None, job: Job | None
    ) -> tuple[int, str]:
        """Send; size and sha256 of what went."""
        connection, target = self._connect(self._base + name)
        goal = put.Goal(connection, target, {}, self.name, name.removesuffix(ABOUT), self._refused)
        return put.put(goal, pieces, size_bytes, job)

    def _refused(self, status: int, image_id: str) -> errors.ComputeError:
        if 300 <= status < 400 or status in (404, 410):
            return errors.ImageUnacceptable(
                image=image_id, reason=f"store {self.name} takes no images at this address (HTTP status {status})"
            )
        return self._error(status, image_id)
