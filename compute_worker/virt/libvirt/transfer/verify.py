"""Is what arrived what was sent? Asked before a file gets its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compute_worker import errors
from compute_worker.images import files
from compute_worker.virt.driver import Job, Peer
from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.base import Shipment
from compute_worker.virt.libvirt.transfer.extents import Extent
from compute_worker.virt.libvirt.transfer.receiver import digest
from compute_worker.virt.libvirt.transfer.requests import PAGE, PIECE


def compare(shipment: Shipment, peer: Peer, job: Job, *, full: bool) -> None:
    """Compare the file with its copy: size, and where data is; ``full``: every byte, by sha256.

    Where only one of the two has data the other must read as zeros: a file system may keep a hole where zeros were
    written, or data of zeros around data.

    :raises MigrationFailed: they differ; says where.
    """
    fd = os.open(shipment.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with files.disk_errors(shipment.source):
        try:
            _Comparison(shipment, peer, job, fd).run(full)
        finally:
            os.close(fd)


def finish(shipment: Shipment, peer: Peer, job: Job, *, full: bool) -> None:
    """Compare what arrived, and give it its name. A copy that differs is removed: sending again begins anew.

    :raises MigrationFailed: it differs.
    """
    try:
        compare(shipment, peer, job, full=full)
    except errors.MigrationFailed:
        peer({"ask": "remove", "name": shipment.name})
        raise
    peer({"ask": "finish", "name": shipment.name, "size": shipment.source.lstat().st_size})


class _Comparison:
    def __init__(self, shipment: Shipment, peer: Peer, job: Job, fd: int) -> None:
        self._shipment = shipment
        self._peer = peer
        self._job = job
        self._fd = fd
        self._size = os.fstat(fd).st_size

    def run(self, full: bool) -> None:
        theirs = list(self._theirs())
        ours = list(extents.data_extents(self._fd, 0, self._size))
        for begin, end in extents.subtract(ours, theirs):
            if not extents.is_zero(self._fd, begin, end):
                raise self._differs(f"bytes {begin} to {end} did not arrive")
        for batch in batches(extents.subtract(theirs, ours)):
            self._job.check()
            if not self._ask("zeros", ranges=batch)["zero"]:
                raise self._differs(f"something else is where nothing was sent, from byte {batch[0][0]}")
        if full:
            self._digests()

    def _theirs(self) -> Iterator[Extent]:
        at: int | None = 0
        while at is not None:
            self._job.check()
            answer = self._ask("map", at=at)
            if answer["size"] != self._size:
                raise self._differs(f"it has {answer['size']} bytes instead of {self._size}")
            for begin, end in answer["extents"]:
                yield int(begin), int(end)
            at = answer["next"]

    def _digests(self) -> None:
        phase = f"compare_{self._shipment.name}"
        for at in range(0, self._size, PIECE):
            self._job.check()
            self._job.report(phase, at, self._size)
            count = min(PIECE, self._size - at)
            if self._ask("digest", at=at, length=count)["sha256"] != digest(self._fd, at, at + count):
                raise self._differs(f"bytes {at} to {at + count} have another sha256")
        self._job.report(phase, self._size, self._size)

    def _ask(self, ask: str, **fields: object) -> Mapping[str, Any]:
        return self._peer({"ask": ask, "name": self._shipment.name, **fields})

    def _differs(self, how: str) -> errors.MigrationFailed:
        migration = self._shipment.migration
        reason = f"{self._shipment.name} of instance {self._shipment.uuid} on host {migration.dest_host}: {how}"
        return errors.MigrationFailed(migration=migration.uuid, reason=reason)


def batches(some: Iterable[Extent]) -> Iterator[list[Extent]]:
    """``some`` in lists of at most :data:`PAGE` extents and :data:`PIECE` bytes."""
    batch: list[Extent] = []
    room = PIECE
    for begin, end in some:
        at = begin
        while at < end:
            count = min(end - at, room)
            batch.append((at, at + count))
            at, room = at + count, room - count
            if not room or len(batch) == PAGE:
                yield batch
                batch, room = [], PIECE
    if batch:
        yield batch
