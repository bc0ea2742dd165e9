"""The messages about images, as :class:`compute_worker.rpc.client.ComputeAPI` has them."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar, Unpack

from compute_worker.objects import Accepted, CachedImage, SnapshotOptions, StoredImage
from compute_worker.rpc.options import CommandOptions

T = TypeVar("T")
_DEFAULTS = SnapshotOptions()
_ANY: Mapping[str, str] = MappingProxyType({})


class ImagesAPI(abc.ABC):
    """Snapshots, backups, and what images there are."""

    @abc.abstractmethod
    def _command(self, host: str, method: str, options: CommandOptions, args: dict[str, Any]) -> Accepted: ...

    @abc.abstractmethod
    def _query(
        self, host: str, method: str, type_: type[T], args: dict[str, Any], *, monitored: bool = False, extra: float = 0
    ) -> T: ...

    def snapshot_instance(
        self,
        instance: str,
        image: str,
        live: bool = True,
        image_options: SnapshotOptions = _DEFAULTS,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Make image ``image`` of an instance's root disk; its guest runs on."""
        args = {"instance": instance, "image": image, "live": live, "image_options": image_options}
        return self._command(host, "snapshot_instance", options, args)

    def snapshot(
        self,
        instance: str,
        image: str,
        live: bool = True,
        image_options: SnapshotOptions = _DEFAULTS,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """The same by its other name."""
        args = {"instance": instance, "image": image, "live": live, "image_options": image_options}
        return self._command(host, "snapshot", options, args)

    def backup_instance(
        self,
        instance: str,
        image: str,
        backup_type: str,
        rotation: int,
        image_options: SnapshotOptions = _DEFAULTS,
        *,
        host: str,
        **options: Unpack[CommandOptions],
    ) -> Accepted:
        """Make image ``image``, then delete the instance's oldest backups of this type beyond ``rotation``."""
        args = {
            "instance": instance,
            "image": image,
            "backup_type": backup_type,
            "rotation": rotation,
            "image_options": image_options,
        }
        return self._command(host, "backup_instance", options, args)

    def list_images(
        self,
        store: str | None = None,
        properties: Mapping[str, str] = _ANY,
        limit: int = 100,
        *,
        host: str,
    ) -> list[StoredImage]:
        """Images of a store of ``host`` that have all these properties, the newest first."""
        args = {"store": store, "properties": dict(properties), "limit": limit}
        return self._query(host, "list_images", list[StoredImage], args, monitored=True)

    def list_cached_images(self, *, host: str) -> list[CachedImage]:
        """The base images that ``host`` keeps."""
        return self._query(host, "list_cached_images", list[CachedImage], {})
