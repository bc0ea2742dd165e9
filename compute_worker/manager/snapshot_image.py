"""What the image of a snapshot says of itself: pure decisions over the instance and what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from compute_worker import errors
from compute_worker.objects import ORIGIN, ImageMeta, Instance, SnapshotOptions, StoredImage

INSTANCE = "instance_uuid"
BASE = "base_image_ref"
TYPE = "image_type"
BACKUP_TYPE = "backup_type"
RESERVED = frozenset({ORIGIN, INSTANCE, BASE, TYPE, BACKUP_TYPE})
_NOT_INHERITED = ("img_signature", "signature_verified", "os_glance_", "owner_specified.")
"""Properties that say something of the old bytes, or that a store keeps for itself."""
_NAME_LENGTH = 255


def check(options: SnapshotOptions, method: str) -> None:
    """Refuse what contradicts itself.

    :raises InvalidCommand: naming the option.
    """
    if options.compression != "none" and options.disk_format == "raw":
        problem = "image_options.compression is of a qcow2 image, not of a raw one"
        raise errors.InvalidCommand(method=method, problem=problem)
    reserved = sorted(RESERVED & options.properties.keys())
    if reserved:
        raise errors.InvalidCommand(
            method=method, problem=f"image_options.properties: {', '.join(reserved)} are set by the worker"
        )


def describe(
    instance: Instance,
    image_id: str,
    options: SnapshotOptions,
    *,
    operation: str,
    default_format: str,
    backup_type: str | None = None,
) -> ImageMeta:
    """The image as its store is told of it. What the instance's own image says of kernel, system and hardware holds
    for it too; the smallest disk is the instance's own."""
    old = instance.image
    inherited = {
        name: value
        for name, value in old.properties.items()
        if name not in RESERVED and not name.startswith(_NOT_INHERITED)
    }
    ours = {ORIGIN: operation, INSTANCE: instance.uuid, BASE: old.id}
    ours[TYPE] = "snapshot" if backup_type is None else "backup"
    if backup_type is not None:
        ours[BACKUP_TYPE] = backup_type
    return ImageMeta(
        id=image_id,
        store=options.store,
        name=(options.name or f"{instance.name or instance.uuid} {backup_type or 'snapshot'}")[:_NAME_LENGTH],
        disk_format="qcow2" if options.compression != "none" else options.disk_format or default_format,
        min_disk_gb=instance.flavor.root_gb or old.min_disk_gb,
        min_ram_mb=old.min_ram_mb,
        os_type=old.os_type,
        kernel_id=old.kernel_id,
        ramdisk_id=old.ramdisk_id,
        properties=inherited | options.properties | ours,
    )


def beyond_rotation(found: Sequence[StoredImage], newest: str, rotation: int) -> list[str]:
    """Ids to delete so that ``rotation`` backups are kept, ``newest`` always among them; the oldest first."""
    others = sorted(
        (entry for entry in found if entry.image.id != newest), key=lambda entry: entry.created_at, reverse=True
    )
    return [entry.image.id for entry in reversed(others[max(0, rotation - 1) :])]
