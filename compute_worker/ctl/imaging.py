"""Images as an operator makes and sees them: snapshots, backups, what stores and caches have."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from compute_worker.ctl.bootargs import checked, pair
from compute_worker.ctl.connect import Client
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.queries import told_problems
from compute_worker.ctl.text import amount, span
from compute_worker.errors import ComputeError
from compute_worker.objects import Accepted, CachedImage, ImageId, SnapshotOptions, StoredImage
from compute_worker.rpc.options import CommandOptions

STORED = ("image", "name", "format", "size", "made", "what", "of instance")
CACHED = ("host", "base", "disk", "occupies", "used", "in use")
MOST = 1000


def snapshot(ctl: Ctl) -> Exit:
    """Make an image of an instance."""
    host, instance = ctl.target()
    image, options, live = _image_id(ctl), _options(ctl), not ctl.args.cold

    def send(host: str, command: CommandOptions) -> Accepted:
        return ctl.client.api.snapshot_instance(instance, image, live, options, host=host, **command)

    return _make(ctl, host, send, f"snapshot of instance {instance} as image {image}", image)


def backup(ctl: Ctl) -> Exit:
    """Make an image of an instance, after which the oldest of its kind go."""
    host, instance = ctl.target()
    image, options = _image_id(ctl), _options(ctl)

    def send(host: str, command: CommandOptions) -> Accepted:
        return ctl.client.api.backup_instance(
            instance, image, ctl.args.backup_type, ctl.args.rotation, options, host=host, **command
        )

    return _make(ctl, host, send, f"{ctl.args.backup_type} backup of instance {instance} as image {image}", image)


def images(ctl: Ctl) -> Exit:
    """Images of the stores, by whichever hosts answer, and what each host keeps of them."""
    client, names = ctl.client, ctl.client.host_names(ctl.args.host)
    wanted = dict(pair("--property", text) for text in ctl.args.property)
    cached, problems = client.everywhere(names, lambda host: client.api.list_cached_images(host=host))
    stored: dict[str, StoredImage] = {}
    unlisted: dict[str, ComputeError] = {}
    if not ctl.args.cached:
        stored, unlisted = _stored(client, names, ctl.args.store, wanted)
    if ctl.out.as_json:
        ctl.out.document(
            {
                "images": list(stored.values()),
                "cached": [{"host": host, "base": base} for host, bases in cached.items() for base in bases],
                "unreachable": sorted(problems.keys() | unlisted.keys()),
            }
        )
    else:
        if not ctl.args.cached:
            ctl.out.table(STORED, stored_rows(stored.values(), time.time()))
        ctl.out.table(CACHED, cached_rows(cached, time.time()))
    return told_problems(ctl, {**problems, **unlisted})


def _stored(
    client: Client, names: Sequence[str], store: str | None, wanted: Mapping[str, str]
) -> tuple[dict[str, StoredImage], dict[str, ComputeError]]:
    """By id, the newest first: hosts may have one store in common, or each its own."""
    answers, problems = client.everywhere(
        names, lambda host: client.api.list_images(store, wanted, MOST, host=host)
    )
    found = {entry.image.id: entry for listed in answers.values() for entry in listed}
    newest_first = sorted(found.values(), key=lambda entry: (-entry.created_at, entry.image.id))
    return {entry.image.id: entry for entry in newest_first}, problems


def stored_rows(entries: Iterable[StoredImage], now: float) -> list[Sequence[object]]:
    """One row for each image, as :data:`STORED`."""
    return [
        (
            entry.image.id,
            entry.image.name,
            entry.image.disk_format,
            amount(entry.image.size_bytes) if entry.image.size_bytes is not None else "",
            f"{span(now - entry.created_at)} ago" if entry.created_at else "",
            entry.image.properties.get("backup_type") or entry.image.properties.get("image_type", ""),
            entry.image.properties.get("instance_uuid", ""),
        )
        for entry in entries
    ]


def cached_rows(cached: Mapping[str, Iterable[CachedImage]], now: float) -> list[Sequence[object]]:
    """One row for each base on each host, as :data:`CACHED`."""
    return [
        (
            host,
            base.name,
            amount(base.size_bytes),
            amount(base.allocated_bytes),
            f"{span(now - base.used_at)} ago" if base.used_at else "",
            "yes" if base.in_use else "no",
        )
        for host, bases in cached.items()
        for base in bases
    ]


def _make(ctl: Ctl, host: str, send: Callable[[str, CommandOptions], Accepted], about: str, image: str) -> Exit:
    accepted = ctl.send(host, send, ctl.options(), f" --image {image}")
    code = ctl.finish(accepted, about, partial(dict, image=image))
    if code is Exit.OK and ctl.args.wait and accepted.operation is not None and not ctl.out.as_json:
        _tell(ctl, ctl.client.api.get_operation(accepted.operation, host=accepted.host).result)
    return code


def _tell(ctl: Ctl, result: Mapping[str, Any]) -> None:
    made = result.get("image") or {}
    if made.get("size_bytes") is not None:
        ctl.out.line(f"  {made.get('disk_format')}, {amount(made['size_bytes'])}")
    for old in result.get("deleted") or ():
        ctl.out.line(f"  image {old} was beyond the rotation and is deleted")
    if result.get("rotation_error"):
        ctl.out.note(f"older backups stay until the next: {result['rotation_error']}")


def _image_id(ctl: Ctl) -> str:
    if ctl.args.image is None:
        return str(uuid.uuid4())
    made: str = checked(ctl.args.image, ImageId, "--image")
    return made


def _options(ctl: Ctl) -> SnapshotOptions:
    raw = {
        "name": ctl.args.name or "",
        "store": ctl.args.store,
        "disk_format": ctl.args.disk_format,
        "compression": ctl.args.compression,
        "properties": dict(pair("--property", text) for text in ctl.args.property),
    }
    return checked(raw, SnapshotOptions, "image")
