"""A qcow2 image written front to back, as a stream that nobody can seek in.

Where the data of the disk is must be known before the first byte goes: then every table is, and the data clusters
follow in order. The image has no backing file, so a cluster that is not there reads as zeros.

The format: https://github.com/qemu/qemu/blob/master/docs/interop/qcow2.txt
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from compute_worker.virt.libvirt.transfer import extents
from compute_worker.virt.libvirt.transfer.extents import Extent

CLUSTER = 1 << 16
_ENTRIES = CLUSTER // 8
"""Of a table of one cluster."""
_REFCOUNTS = CLUSTER // 2
"""16-bit counters in a cluster."""
_COPIED = 1 << 63
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_MAGIC = 0x514649FB
_VERSION, _HEADER_BYTES, _REFCOUNT_ORDER = 3, 104, 4
_MOST_L1 = 4 << 20
"""Entries that QEMU accepts (32 MiB of them)."""
_CLUSTER_BITS = CLUSTER.bit_length() - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in the image of a disk of ``disk_bytes``, counted in clusters of 64 KiB.

    ``runs``: first cluster of the disk that is stored, and the one after the last, of each run; in order.
    """

    disk_bytes: int
    runs: tuple[Extent, ...]
    tables: tuple[int, ...]
    """Indices into L1 of the L2 tables that there are."""
    table_clusters: int
    block_clusters: int

    @property
    def l1_entries(self) -> int:
        """Of the L1 table: one for each 512 MiB of the disk."""
        return _up(self.disk_bytes, CLUSTER * _ENTRIES)

    @property
    def l1_clusters(self) -> int:
        """Clusters of the L1 table."""
        return _up(self.l1_entries, _ENTRIES)

    @property
    def l1_at(self) -> int:
        """First cluster of the L1 table: behind the header, the refcount table and its blocks."""
        return 1 + self.table_clusters + self.block_clusters

    @property
    def data_at(self) -> int:
        """First cluster of the data."""
        return self.l1_at + self.l1_clusters + len(self.tables)

    @property
    def clusters(self) -> int:
        """All of them."""
        return self.data_at + extents.length(self.runs)

    @property
    def size_bytes(self) -> int:
        """Of the image file."""
        return self.clusters * CLUSTER

    @property
    def data(self) -> Iterator[Extent]:
        """What of the disk follows the tables, in order: whole clusters, the last one cut where the disk ends."""
        return ((begin * CLUSTER, min(end * CLUSTER, self.disk_bytes)) for begin, end in self.runs)

    @property
    def padding(self) -> int:
        """Zeros that end the image where the disk's end is not a cluster's."""
        cut = bool(self.runs) and self.runs[-1][1] * CLUSTER > self.disk_bytes
        return -self.disk_bytes % CLUSTER if cut else 0


def plan(disk_bytes: int, data: Iterable[Extent]) -> Layout:
    """The layout for a disk whose bytes outside ``data`` (sorted) are zeros.

    :raises ValueError: the disk has no size, or more than QEMU can address so (256 TiB).
    """
    if disk_bytes <= 0 or _up(disk_bytes, CLUSTER * _ENTRIES) > _MOST_L1:
        raise ValueError(f"a qcow2 of {disk_bytes} bytes cannot be made")
    runs = tuple(extents.merge((begin // CLUSTER, _up(end, CLUSTER)) for begin, end in data if begin < end))
    tables = tuple(sorted({at for begin, end in runs for at in range(begin // _ENTRIES, _up(end, _ENTRIES))}))
    bare = Layout(disk_bytes, runs, tables, 0, 0)
    blocks = table = 0
    # The counters count themselves: again until they fit.
    while (blocks, table) != (found := _counters(bare.clusters + blocks + table)):
        blocks, table = found
    return Layout(disk_bytes, runs, tables, table, blocks)


def head(layout: Layout) -> Iterator[bytes]:
    """Everything before the data: header, refcounts, L1, L2; a cluster or so at a time."""
    yield _header(layout).ljust(CLUSTER, b"\0")
    blocks = range(1 + layout.table_clusters, layout.l1_at)
    yield from _table((at * CLUSTER for at in blocks), layout.table_clusters)
    for at in range(layout.block_clusters):
        used = min(_REFCOUNTS, layout.clusters - at * _REFCOUNTS)
        yield (b"\0\1" * used).ljust(CLUSTER, b"\0")
    first = layout.l1_at + layout.l1_clusters
    yield from _table(_l1(layout, first), layout.l1_clusters)
    yield from _l2(layout)


def _header(layout: Layout) -> bytes:
    return _HEADER.pack(
        _MAGIC,
        _VERSION,
        0,  # backing file: none, and its name has no bytes
        0,
        _CLUSTER_BITS,
        layout.disk_bytes,
        0,  # not encrypted
        layout.l1_entries,
        layout.l1_at * CLUSTER,
        CLUSTER,
        layout.table_clusters,
        0,  # no snapshots
        0,
        0,  # features: none
        0,
        0,
        _REFCOUNT_ORDER,
        _HEADER_BYTES,
    )


def _l1(layout: Layout, first: int) -> Iterator[int]:
    index = 0
    for number, table in enumerate(layout.tables):
        for _ in range(table - index):
            yield 0
        yield (first + number) * CLUSTER | _COPIED
        index = table + 1


def _l2(layout: Layout) -> Iterator[bytes]:
    runs, at, place = iter(layout.runs), 0, layout.data_at
    run = next(runs, None)
    for table in layout.tables:
        entries = array("Q", bytes(CLUSTER))
        end = (table + 1) * _ENTRIES
        while run is not None and run[0] < end:
            begin, last = max(run[0], at), min(run[1], end)
            for cluster in range(begin, last):
                entries[cluster % _ENTRIES] = place * CLUSTER | _COPIED
                place += 1
            at = last
            if last < run[1]:
                break
            run = next(runs, None)
        yield _big_endian(entries)


def _table(entries: Iterable[int], clusters: int) -> Iterator[bytes]:
    """Offsets as whole clusters, the rest of the last one empty."""
    source = iter(entries)
    for _ in range(clusters):
        piece = array("Q", bytes(CLUSTER))
        for index in range(_ENTRIES):
            entry = next(source, None)
            if entry is None:
                break
            piece[index] = entry
        yield _big_endian(piece)


def _big_endian(numbers: array[int]) -> bytes:
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _counters(clusters: int) -> tuple[int, int]:
    """Clusters of refcount blocks, and of the table of these, for so many clusters."""
    blocks = _up(clusters, _REFCOUNTS)
    return blocks, _up(blocks, _ENTRIES)


def _up(number: int, unit: int) -> int:
    return -(-number // unit)
