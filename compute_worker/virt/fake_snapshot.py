"""Snapshots on the fake driver: freeze, upload, publish."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from compute_worker.errors import GuestFailed, ImageUnacceptable
from compute_worker.objects import ImageMeta, Instance, encode
from compute_worker.virt.driver import Job, Part
from compute_worker.virt.fake_base import FakeBase
from compute_worker.virt.simulated.files import PART
from compute_worker.virt.simulated.images import Image
from compute_worker.virt.simulated.model import File


class Snapshots(FakeBase):
    """``snapshot``."""

    def snapshot(self, instance: Instance, image_id: str, live: bool) -> list[Part]:
        """``freeze, upload, publish``. The guest never stops: freezing takes no time here, ``live`` or not."""
        return [
            Part("freeze", lambda j: self._freeze(instance, image_id), lambda j: self._thaw(instance, image_id)),
            Part(
                "upload",
                lambda j: self._upload(instance, image_id, j),
                lambda j: self._withdraw(instance, image_id),
            ),
            Part(
                "publish",
                lambda j: self._publish(instance, image_id),
                lambda j: self._withdraw(instance, image_id),
            ),
        ]

    def _freeze(self, instance: Instance, image_id: str) -> None:
        uuid, name = instance.uuid, _frozen(image_id)
        with self._connection.call("freeze", uuid) as host:
            directory = host.directory(uuid)
            if directory is None or "disk" not in directory:
                raise GuestFailed(instance=uuid, reason=f"it has no root disk in {host.path(uuid)}")
            if name not in directory and not self._is_published(instance, image_id):
                disk = directory["disk"]
                host.write(uuid, {name: File(host.content(disk), "raw", disk.size)})

    def _thaw(self, instance: Instance, image_id: str) -> None:
        with self._connection.call("thaw", instance.uuid, files=True) as host:
            host.remove(instance.uuid, _frozen(image_id))

    def _upload(self, instance: Instance, image_id: str, job: Job) -> None:
        uuid = instance.uuid
        with self._connection.call("upload", uuid, job, files=True) as host:
            if self._is_published(instance, image_id):
                return
            data = self._frozen_data(instance, image_id)
        for sent in self.stream(data, job, "upload"):
            host.images.stage(image_id, sent)

    def _publish(self, instance: Instance, image_id: str) -> Mapping[str, Any]:
        uuid = instance.uuid
        with self._connection.call("publish", uuid, files=True) as host:
            if not self._is_published(instance, image_id):
                host.images.stage(image_id, self._frozen_data(instance, image_id))
                if not host.images.publish(image_id, self._origin(instance, image_id)):
                    raise ImageUnacceptable(
                        image=image_id, reason="the store has an image of this id already", instance=uuid
                    )
                host.effect(image_id, "publish")
            host.remove(uuid, _frozen(image_id))
            image = host.images.get(image_id)
            assert image is not None
            return {"image": encode(_described(instance.image, image_id, image))}

    def _withdraw(self, instance: Instance, image_id: str) -> None:
        with self._connection.call("withdraw", instance.uuid, files=True) as host:
            host.images.withdraw(image_id, self._origin(instance, image_id))

    def _is_published(self, instance: Instance, image_id: str) -> bool:
        return self.simulated.images.origin(image_id) == self._origin(instance, image_id)

    def _origin(self, instance: Instance, image_id: str) -> str:
        return f"{instance.uuid}/{image_id}"

    def _frozen_data(self, instance: Instance, image_id: str) -> bytes:
        file = (self.simulated.directory(instance.uuid) or {}).get(_frozen(image_id))
        if file is None:
            raise GuestFailed(instance=instance.uuid, reason=f"what was frozen for image {image_id} is gone")
        return file.data


def _frozen(image_id: str) -> str:
    return f"snapshot-{image_id}{PART}"


def _described(parent: ImageMeta, image_id: str, image: Image) -> ImageMeta:
    return msgspec.structs.replace(
        parent,
        id=image_id,
        name=f"{parent.name} snapshot".strip(),
        disk_format=image.disk_format,
        size_bytes=image.size,
        checksum_algorithm="sha256",
        checksum=hashlib.sha256(image.data).hexdigest(),
    )
