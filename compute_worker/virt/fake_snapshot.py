"""Snapshots on the fake driver: create the image, freeze, upload, publish."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compute_worker.errors import GuestFailed, ImageUnacceptable, NotSupported
from compute_worker.images.store import ImageStore
from compute_worker.objects import CachedImage, ImageMeta, Instance, encode
from compute_worker.virt.driver import Job, Part, SnapshotRequest
from compute_worker.virt.fake_base import FakeBase
from compute_worker.virt.simulated.files import PART
from compute_worker.virt.simulated.images import from_qcow2, to_qcow2
from compute_worker.virt.simulated.model import File
from compute_worker.virt.simulated.shelfstore import ShelfStore

STORES = (None, "file", "http", "glance")
"""Names of stores that a simulated host takes for its one shelf."""


class Snapshots(FakeBase):
    """``snapshot``, and where its images go."""

    def snapshot(self, instance: Instance, request: SnapshotRequest) -> list[Part]:
        """``create_image, freeze, upload, publish``. The guest never stops: freezing takes no time here."""
        self.image_store(request.image.store)
        image = request.image
        return [
            Part(
                "create_image", lambda j: self._create(instance, image, j), lambda j: self._withdraw(instance, image, j)
            ),
            Part("freeze", lambda j: self._freeze(instance, image), lambda j: self._thaw(instance, image)),
            Part("upload", lambda j: self._upload(instance, request, j), lambda j: None),
            Part("publish", lambda j: self._publish(instance, request), lambda j: None),
        ]

    def image_store(self, name: str | None) -> ImageStore:
        """The cell's shelf, by any store's name."""
        if name not in STORES:
            raise NotSupported(what=f"image store {name!r}")
        return ShelfStore(self._connection)

    def list_cached_images(self) -> list[CachedImage]:
        """``_base``."""
        with self._connection.call("list_cached_images", files=True) as host:
            used = {
                file.backing
                for slot in host.slots.values()
                for directory in slot.directories.values()
                for file in directory.values()
            }
            return [
                CachedImage(
                    name=name,
                    size_bytes=file.size,
                    allocated_bytes=len(file.data),
                    used_at=file.used_at,
                    in_use=name in used,
                )
                for name, file in sorted(host.base.items())
                if not name.endswith(PART)
            ]

    def _create(self, instance: Instance, image: ImageMeta, job: Job) -> None:
        with self._connection.call("create_image", instance.uuid, job, files=True) as host:
            if not host.images.made_by(image) and not host.images.create(image):
                raise ImageUnacceptable(
                    image=image.id, reason="the store has an image of this id already", instance=instance.uuid
                )

    def _withdraw(self, instance: Instance, image: ImageMeta, job: Job) -> None:
        with self._connection.call("withdraw", instance.uuid, job, files=True) as host:
            host.images.withdraw(image)

    def _freeze(self, instance: Instance, image: ImageMeta) -> None:
        uuid, name = instance.uuid, _frozen(image.id)
        with self._connection.call("freeze", uuid) as host:
            directory = host.directory(uuid)
            if directory is None or "disk" not in directory:
                raise GuestFailed(instance=uuid, reason=f"it has no root disk in {host.path(uuid)}")
            if name not in directory and not host.images.made_by(image):
                disk = directory["disk"]
                host.write(uuid, {name: File(from_qcow2(host.content(disk)), "raw", disk.size)})

    def _thaw(self, instance: Instance, image: ImageMeta) -> None:
        with self._connection.call("thaw", instance.uuid, files=True) as host:
            host.remove(instance.uuid, _frozen(image.id))

    def _upload(self, instance: Instance, request: SnapshotRequest, job: Job) -> Mapping[str, Any] | None:
        image = request.image
        with self._connection.call("upload", instance.uuid, job, files=True) as host:
            if host.images.made_by(image):
                return None
            data = self._frozen_data(instance, request)
        for sent in self.stream(data, job, "upload"):
            host.images.stage(image.id, sent)
        return {"method": "simulated", "size_bytes": len(data), "read_bytes": len(data)}

    def _frozen_data(self, instance: Instance, request: SnapshotRequest) -> bytes:
        """What was frozen, in the image's format."""
        image = request.image
        file = (self.simulated.directory(instance.uuid) or {}).get(_frozen(image.id))
        if file is None:
            raise GuestFailed(instance=instance.uuid, reason=f"what was frozen for image {image.id} is gone")
        if image.disk_format == "qcow2":
            return to_qcow2(file.data, file.size, request.compression)
        return file.data

    def _publish(self, instance: Instance, request: SnapshotRequest) -> Mapping[str, Any]:
        uuid, image = instance.uuid, request.image
        with self._connection.call("publish", uuid, files=True) as host:
            if not host.images.made_by(image):
                # The shelf's staging does not outlive its process.
                host.images.stage(image.id, self._frozen_data(instance, request))
                if not host.images.publish(image.id):
                    raise ImageUnacceptable(
                        image=image.id, reason="the store has an image of this id already", instance=uuid
                    )
                host.effect(image.id, "publish")
            host.remove(uuid, _frozen(image.id))
            note = host.images.note(image.id)
            assert note is not None
            return {"image": encode(note.image)}


def _frozen(image_id: str) -> str:
    return f"snapshot-{image_id}{PART}"
