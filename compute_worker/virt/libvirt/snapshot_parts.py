"""``snapshot``: the parts that freeze a guest's root disk, send it to the image store and publish it there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from compute_worker import errors, objects
from compute_worker.config import Settings
from compute_worker.images import files
from compute_worker.images.store import CHUNK_BYTES, ImageFacts, ImageStore, Piece
from compute_worker.objects import Disk, Instance
from compute_worker.virt.driver import Job, Part, SnapshotRequest
from compute_worker.virt.libvirt.deeds import OFF, Deeds
from compute_worker.virt.libvirt.disks.builder import ROOT
from compute_worker.virt.libvirt.snapshot import image, record
from compute_worker.virt.libvirt.snapshot.decision import Method
from compute_worker.virt.libvirt.snapshot.reading import Merged, Reader, Still, Unreadable
from compute_worker.virt.libvirt.snapshot.record import Held, Last
from compute_worker.virt.libvirt.snapshot.served import Served, node
from compute_worker.virt.libvirt.snapshot_point import Points, is_of, origin_of
from compute_worker.virt.libvirt.spawn import make_part

LOG = logging.getLogger(__name__)
_FOR_EVER = float("inf")
"""What we serve to ourselves ends with us."""
_NEWS_SECONDS = 5.0
"""libvirt knows by then that a qemu has died."""
_GIB = 1 << 30


class Snapshots:
    """Images of the instances of this host. Thread-safe for different instances."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        self._settings: Settings = deeds.settings
        self._points = Points(deeds)

    def parts(self, instance: Instance, request: SnapshotRequest) -> list[Part]:
        """``create_image, freeze, upload, publish``.

        :raises NotSupported: there is no such store.
        """
        self._points.store(request)
        return [
            make_part(
                "create_image",
                lambda job: self._create(instance, request),
                lambda job: self._withdraw(request),
            ),
            make_part(
                "freeze",
                lambda job: self._freeze(instance, request, job),
                lambda job: self._let_go(instance, request),
            ),
            make_part("upload", lambda job: self._upload(instance, request, job)),
            make_part(
                "publish",
                lambda job: self._publish(instance, request),
                lambda job: self._forget(instance, request),
            ),
        ]

    # --- create_image -------------------------------------------------------------------------------------------

    def _create(self, instance: Instance, request: SnapshotRequest) -> None:
        """Refused before anything happens to the guest."""
        if self._published(instance, request) is None:
            self._points.root(instance.uuid)
            self._points.store(request).create(request.image)

    def _withdraw(self, request: SnapshotRequest) -> None:
        # A store that takes no images has none of it.
        with suppress(errors.NotSupported):
            self._points.store(request).withdraw(request.image)

    # --- freeze -------------------------------------------------------------------------------------------------

    def _freeze(self, instance: Instance, request: SnapshotRequest, job: Job) -> None:
        if self._published(instance, request) is None:
            self._points.freeze(instance, request, job)

    def _let_go(self, instance: Instance, request: SnapshotRequest) -> None:
        """Nothing of it hangs on the guest. What another operation froze is not touched."""
        found = record.held(self._points.directory(instance.uuid))
        if found is None or is_of(found, request):
            self._points.abandon(instance.uuid)

    # --- upload -------------------------------------------------------------------------------------------------

    def _upload(self, instance: Instance, request: SnapshotRequest, job: Job) -> Mapping[str, Any] | None:
        uuid = instance.uuid
        if self._published(instance, request) is not None:
            return None
        held = self._points.freeze(instance, request, job)
        if not held.written:
            try:
                facts, read_bytes = self._write(instance, request, held, job)
            except Unreadable as exc:
                raise self._lost(uuid, held, exc, job) from None
            held = msgspec.structs.replace(
                held,
                written=True,
                size_bytes=facts.size_bytes,
                checksum_algorithm=facts.checksum_algorithm,
                checksum=facts.checksum,
                read_bytes=read_bytes,
            )
            record.keep(self._points.directory(uuid), held)
        self._points.finish(uuid, held)
        return {"method": held.method.value, "size_bytes": held.size_bytes, "read_bytes": held.read_bytes}

    def _lost(self, uuid: str, held: Held, exc: Unreadable, job: Job) -> errors.ComputeError:
        """Tried again where the point in time went with its qemu: then the disk is what the guest left."""
        if held.method is Method.BACKUP and job.wait(lambda: not self._points.stands(uuid, held), _NEWS_SECONDS):
            return errors.HypervisorBusy(reason=f"what it kept of the disk of instance {uuid} is gone: {exc}")
        return errors.GuestFailed(instance=uuid, reason=f"its disk cannot be read: {exc}")

    def _write(self, instance: Instance, request: SnapshotRequest, held: Held, job: Job) -> tuple[ImageFacts, int]:
        """What the store has, and how many bytes were read from the guest's disk."""
        uuid, store = instance.uuid, self._points.store(request)
        root = self._points.root(uuid)
        with ExitStack() as open_:
            if request.compression != "none" and request.image.disk_format == "qcow2":
                return self._write_compressed(uuid, root, request, held, store, job), root.virtual_size_bytes
            if held.method is Method.BACKUP:
                still, connect, guard = self._live(uuid, request, held, open_)
            else:
                still, connect, guard = self._cold(uuid, root, open_)
            made = image.stream(still, request.image.disk_format, connect, job)
            pieces = _guarded(made.pieces, guard)
            # Closed here and not when somebody gets to it: its readers end before what they read does.
            open_.callback(pieces.close)
            facts = store.write(request.image.id, pieces, made.size_bytes, job)
        self._check_untouched(uuid, held)
        return facts, made.read_bytes

    def _check_untouched(self, uuid: str, held: Held) -> None:
        if held.method is not Method.BACKUP and self._deeds.power(uuid) not in OFF:
            raise errors.GuestFailed(instance=uuid, reason="it was started while its disk was read")

    def _live(
        self, uuid: str, request: SnapshotRequest, held: Held, open_: ExitStack
    ) -> tuple[Still, Callable[[], Reader], Callable[[], None]]:
        disk = self._points.live_disk(uuid, held)
        below = self._parent(uuid, request, held, open_)
        still = disk.look(held.since if below is not None else "")
        if below is None or still.dirty is None:
            return still, disk.connect, disk.check_room
        parent, size = below
        if size != still.size:
            return replace(still, dirty=None), disk.connect, disk.check_room
        dirty = still.dirty
        return still, lambda: Merged(disk.connect(), parent.connect(), dirty), disk.check_room

    def _parent(
        self, uuid: str, request: SnapshotRequest, held: Held, open_: ExitStack
    ) -> tuple[Served, int] | None:
        """The image that this one builds on, and the size of its disk; ``None``: none, or it went away meanwhile."""
        last = record.last(self._points.directory(uuid))
        if not held.since or last is None or last.image != held.parent:
            return None
        path = self._points.published_path(last, request)
        if path is None:
            return None
        served = open_.enter_context(self._serve("parent", node(path, last.disk_format), uuid))
        try:
            return served, served.look().size
        except Unreadable as exc:
            LOG.warning("instance %s: image %s, which the next one was to build on: %s", uuid, last.image, exc)
            return None

    def _cold(
        self, uuid: str, root: Disk, open_: ExitStack
    ) -> tuple[Still, Callable[[], Reader], Callable[[], None]]:
        served = open_.enter_context(self._serve(ROOT, self._node(uuid, root), uuid))
        return served.look(), served.connect, served.touch

    def _serve(self, name: str, source: str, uuid: str) -> Served:
        return Served(name, source, self._points.place(uuid), _FOR_EVER)

    def _node(self, uuid: str, root: Disk) -> str:
        path = self._points.directory(uuid) / ROOT
        base = self._deeds.disks.directory.base / root.backing if root.backing else None
        return node(path, root.format, base, root.backing_format or "raw")

    def _write_compressed(
        self, uuid: str, root: Disk, request: SnapshotRequest, held: Held, store: ImageStore, job: Job
    ) -> ImageFacts:
        """By way of one file, at most as large as the image."""
        path = self._points.place(uuid) / "compressed"
        disk = self._points.live_disk(uuid, held)
        source = _nbd_node(disk.address, held.target) if held.method is Method.BACKUP else self._node(uuid, root)
        with files.disk_errors(path):
            files.create_private(path)
        size = root.virtual_size_bytes
        self._deeds.disks.qemu_img.compress(source, path, request.compression, size, job, "compress")
        facts = store.write(request.image.id, _content(path, job), path.stat().st_size, job)
        with files.disk_errors(path):
            path.unlink()
        return facts

    # --- publish ------------------------------------------------------------------------------------------------

    def _publish(self, instance: Instance, request: SnapshotRequest) -> Mapping[str, Any]:
        uuid, store = instance.uuid, self._points.store(request)
        made = self._published(instance, request)
        if made is None:
            held = self._points.held(instance, request)
            if held is None or not held.written:
                reason = f"what was frozen for image {request.image.id} is gone"
                raise errors.GuestFailed(instance=uuid, reason=reason)
            facts = store.publish(request.image.id)
            if None not in (facts.size_bytes, held.size_bytes) and facts.size_bytes != held.size_bytes:
                reason = f"store {store.name} has {facts.size_bytes} bytes of it, {held.size_bytes} were written"
                raise errors.ImageUnacceptable(image=request.image.id, reason=reason)
            made = _last(request, store.name, held, facts)
            record.keep_last(self._points.directory(uuid), made)
        if self._points.place(uuid).is_dir():
            self._points.drop_checkpoints(uuid, keep=made.token)
            self._points.remove_place(uuid)
        return {"image": objects.encode(_described(request, made, self._points.root(uuid)))}

    def _published(self, instance: Instance, request: SnapshotRequest) -> Last | None:
        """This image, when it was published and nobody undid it."""
        found = record.last(self._points.directory(instance.uuid))
        return found if found is not None and is_of(found, request) else None

    def _forget(self, instance: Instance, request: SnapshotRequest) -> None:
        """Nothing builds on it."""
        if self._published(instance, request) is not None:
            record.forget_last(self._points.directory(instance.uuid))
            self._points.drop_checkpoints(instance.uuid)


def _guarded(pieces: Iterator[Piece], guard: Callable[[], None]) -> Any:
    """A generator over the same that looks after what is read, every now and then."""
    try:
        for number, piece in enumerate(pieces):
            if number % 16 == 0:
                guard()
            yield piece
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _content(path: Path, job: Job) -> Iterator[Piece]:
    with files.disk_errors(path), open(path, "rb", buffering=0) as source:
        total, done = os.fstat(source.fileno()).st_size, 0
        while piece := source.read(CHUNK_BYTES):
            yield piece
            done += len(piece)
            job.report(image.PHASE, done, total)


def _nbd_node(address: Path, export: str) -> str:
    server = {"type": "unix", "path": str(address)}
    return "json:" + json.dumps({"driver": "nbd", "server": server, "export": export})


def _last(request: SnapshotRequest, store: str, held: Held, facts: ImageFacts) -> Last:
    return Last(
        image=request.image.id,
        origin=origin_of(request),
        store=store,
        disk_format=request.image.disk_format,
        token=held.token,
        validator=facts.validator or "",
        size_bytes=held.size_bytes or facts.size_bytes,
        checksum_algorithm=held.checksum_algorithm,
        checksum=held.checksum,
    )


def _described(request: SnapshotRequest, made: Last, root: Disk) -> objects.ImageMeta:
    smallest = max(request.image.min_disk_gb, -(-root.virtual_size_bytes // _GIB))
    return msgspec.structs.replace(
        request.image,
        min_disk_gb=smallest,
        size_bytes=made.size_bytes,
        checksum_algorithm=made.checksum_algorithm,
        checksum=made.checksum,
    )
