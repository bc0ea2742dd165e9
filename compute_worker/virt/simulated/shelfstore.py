"""The shelf of a simulated cell as an image store: what it has is looked at and removed like a real one's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from compute_worker.errors import ImageNotFound
from compute_worker.images.store import CHUNK_BYTES, ImageFacts, ImageStore, Opened
from compute_worker.objects import ImageMeta, StoredImage
from compute_worker.virt.simulated.connection import Connection
from compute_worker.virt.simulated.images import Image


class ShelfStore(ImageStore):
    """Each method is one call of the simulated host, with its faults: ``store_stat``, ``store_list``..."""

    name: ClassVar[str] = "simulated"
    lists: ClassVar[bool] = True

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def stat(self, image_id: str) -> ImageFacts:
        """Size, sum and format, by its bytes."""
        image = self._get("store_stat", image_id)
        return ImageFacts(
            size_bytes=image.size,
            checksum_algorithm="sha256",
            checksum=image.digest("sha256"),
            disk_format=image.disk_format,
        )

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        """What a simulated host sees of it: its beginning."""
        data = self._get("store_open", image_id).data
        begin = min(offset, len(data))
        chunks = (data[at : at + CHUNK_BYTES] for at in range(begin, len(data), CHUNK_BYTES))
        return Opened(offset=begin, chunks=chunks, abort=lambda: None, close=lambda: None)

    def withdraw(self, image: ImageMeta) -> None:
        """Gone, where it is of that operation."""
        with self._connection.call("withdraw", files=True) as host:
            host.images.withdraw(image)

    def list_images(self, properties: Mapping[str, str], limit: int = 1000) -> list[StoredImage]:
        """By what is noted of them; others have no properties."""
        with self._connection.call("store_list", files=True) as host:
            found = [self._stored(host.images.note(name), name) for name in host.images.published()]
        matching = [entry for entry in found if entry and properties.items() <= entry.image.properties.items()]
        return sorted(matching, key=lambda entry: (entry.created_at, entry.image.id), reverse=True)[:limit]

    def delete(self, image_id: str) -> None:
        """Gone."""
        with self._connection.call("store_delete", files=True) as host:
            host.images.delete(self.check_id(image_id))

    def _stored(self, note: StoredImage | None, name: str) -> StoredImage | None:
        if note is not None:
            return note
        image = self._connection.host.images.get(name)
        if image is None:
            return None
        return StoredImage(image=ImageMeta(id=name, disk_format=image.disk_format, size_bytes=image.size))

    def _get(self, call: str, image_id: str) -> Image:
        with self._connection.call(call, files=True) as host:
            image = host.images.get(self.check_id(image_id))
        if image is None:
            raise ImageNotFound(image=image_id, store=self.name)
        return image
