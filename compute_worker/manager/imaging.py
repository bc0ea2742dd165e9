"""The messages about images: made of instances, listed in stores and caches."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from compute_worker import errors, objects
from compute_worker.manager import snapshot, snapshot_image
from compute_worker.manager.core import Core, Wish, accept
from compute_worker.manager.lifecycle import Expiry
from compute_worker.messages import Context, command, query
from compute_worker.objects import Accepted, CachedImage, Device, ImageId, Key, Name, SnapshotOptions, StoredImage, Uuid
from compute_worker.operations.service import Operations

BackupType = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", description="daily, weekly, ...")]
Rotation = Annotated[int, Meta(ge=1, le=1000, description="backups of this kind to keep, this one among them")]
_DEFAULTS = SnapshotOptions()


class SnapshotEndpoint:
    """Snapshots of instances of this host."""

    def __init__(self, core: Core, operations: Operations) -> None:
        self._core = core
        self._operations = operations

    @command
    def snapshot_instance(
        self,
        context: Context,
        instance: Uuid,
        image: ImageId,
        live: bool = True,
        image_options: SnapshotOptions = _DEFAULTS,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Make image ``image`` of the instance's root disk; the guest runs on. Ends with the image whole and visible in
        the store, or with none of it there.

        :raises NotSupported: this host makes no such snapshots, or has no such store.
        """
        args = {"image": image, "live": live, "image_options": objects.encode(image_options)}
        return self._accept(
            context, snapshot.SNAPSHOT, Wish(operation, expires_at, check_only), instance, image_options, args
        )

    @command
    def snapshot(
        self,
        context: Context,
        instance: Uuid,
        image: ImageId,
        live: bool = True,
        image_options: SnapshotOptions = _DEFAULTS,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Another name of ``snapshot_instance``."""
        return self.snapshot_instance(context, instance, image, live, image_options, operation, expires_at, check_only)

    @command
    def backup_instance(
        self,
        context: Context,
        instance: Uuid,
        image: ImageId,
        backup_type: BackupType,
        rotation: Rotation,
        image_options: SnapshotOptions = _DEFAULTS,
        operation: Uuid | None = None,
        expires_at: Expiry | None = None,
        check_only: bool = False,
    ) -> Accepted:
        """Make image ``image`` as ``snapshot_instance`` does; once it is there, the instance's oldest backups of this
        type beyond ``rotation`` are deleted from the store. Their end does not change how this ends: what could not be
        deleted is in the result (``rotation_error``) and goes with the next backup.

        :raises NotSupported: this host makes no such snapshots, or has no such store.
        """
        if not self._core.driver.image_store(image_options.store).lists:
            name = image_options.store or self._core.settings.images.store
            raise errors.NotSupported(what=f"backup_instance to image store {name!r}, which does not list its images,")
        args = {
            "image": image,
            "backup_type": backup_type,
            "rotation": rotation,
            "image_options": objects.encode(image_options),
        }
        wish = Wish(operation, expires_at, check_only)
        return self._accept(context, snapshot.BACKUP, wish, instance, image_options, args)

    @query
    def list_images(
        self,
        context: Context,
        store: Device | None = None,
        properties: dict[Key, Name] = {},  # noqa: B006
        limit: Annotated[int, Meta(ge=1, le=1000)] = 100,
    ) -> list[StoredImage]:
        """Published images of a store (the host's default where none is named) that have all these properties, the
        newest first.

        :raises NotSupported: no such store, or one that does not tell.
        """
        return self._core.driver.image_store(store).list_images(properties, limit)

    @query
    def list_cached_images(self, context: Context) -> list[CachedImage]:
        """The base images that this host keeps."""
        return self._core.driver.list_cached_images()

    def _accept(
        self, context: Context, kind: str, wish: Wish, uuid: str, options: SnapshotOptions, args: dict[str, Any]
    ) -> Accepted:
        core = self._core
        snapshot_image.check(options, kind)
        record = core.store.get(uuid)
        # Its parts are only made, not run: a driver or a store that cannot refuses before anything is written.
        core.driver.snapshot(record, snapshot.plan(core, record, args, wish.operation or ""))
        return accept(
            self._operations,
            context,
            kind,
            wish,
            lambda tx: snapshot.admit(core, tx, uuid, kind),
            instance=uuid,
            args=args,
        )
