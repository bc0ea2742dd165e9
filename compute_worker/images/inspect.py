"""Look at an image before any program opens it: is it what it was declared to be, and does it point outside itself?

oslo.utils' :mod:`format_inspector` reads the bytes; it runs no program and follows nothing. Beyond it we refuse what it
lets through and we need not have: encrypted qcow2, VMDK whose extents are in a descriptor, disks of no size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from compute_worker import errors
from compute_worker.images.files import disk_errors

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

CHUNK_BYTES = 65_536
HEADER_BYTES = 1 << 20
SECTOR_BYTES = 512

ACCEPTED: dict[str, tuple[frozenset[str], ...]] = {
    "raw": (frozenset({"raw"}), frozenset({"gpt"})),
    "aki": (frozenset({"raw"}), frozenset({"gpt"})),
    "ari": (frozenset({"raw"}), frozenset({"gpt"})),
    "iso": (frozenset({"iso"}), frozenset({"iso", "gpt"})),
    **{name: (frozenset({name}),) for name in ("qcow2", "vmdk", "vhd", "vhdx", "vdi")},
}
"""Declared format: what may be detected. Whole disks are raw with a partition table (``gpt`` stands for MBR too), and
so are bzImage kernels; bootable CDs carry a partition table beside their file system."""

PLAIN = frozenset({"raw", "aki", "ari", "iso"})
"""Formats whose bytes are the disk: given to the guest as raw, parsed by nobody here."""

QEMU_NAMES = {"vhd": "vpc", **dict.fromkeys(PLAIN, "raw")}
"""qemu's name of a format, where it differs."""

_STRUCTURED = frozenset({"qcow2", "qed", "vmdk", "vhd", "vhdx", "vdi"})


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an image is: ``disk_format`` as declared and found; bytes the guest would see."""

    disk_format: str
    virtual_size_bytes: int


def inspect(path: Path, image_id: str, declared: str, job: Job) -> Inspection:
    """Read the image and say what it is. Reads up to all of it, in little memory.

    :raises compute_worker.errors.ImageUnacceptable: it is not what was declared, or not safe to open.
    """
    if declared not in ACCEPTED:
        raise errors.ImageUnacceptable(image=image_id, reason=f"disk format {declared!r} is not supported")
    with disk_errors(path), open(path, "rb") as source:
        size = source.seek(0, 2)
        source.seek(0)
        found = _detect(source, job, image_id)
        if frozenset(found) not in ACCEPTED[declared]:
            names = " and ".join(sorted(found))
            raise errors.ImageUnacceptable(image=image_id, reason=f"it is declared {declared}, its bytes are {names}")
        if declared in PLAIN:
            return Inspection(declared, -(-size // SECTOR_BYTES) * SECTOR_BYTES)
        return _check(found[declared], source, image_id, declared)


def check_base(path: Path, image_id: str) -> int:
    """Look at the beginning of a cached base (always raw) and return its size in bytes.

    Cheap: at most 1 MiB is read. A base that begins like a disk image was made by an attacker from an image inside an
    image, or put there by somebody else; it would be dangerous to whatever guesses formats.

    :raises compute_worker.errors.ImageUnacceptable: it is one.
    """
    with disk_errors(path), open(path, "rb") as source:
        size = source.seek(0, 2)
        source.seek(0)
        found = _detect(source, None, image_id, HEADER_BYTES)
    structured = sorted(_STRUCTURED & found.keys())
    if structured:
        raise errors.ImageUnacceptable(
            image=image_id, reason=f"{path.name} in the cache must be raw, its bytes are {' and '.join(structured)}"
        )
    if size == 0:
        raise errors.ImageUnacceptable(image=image_id, reason=f"{path.name} in the cache is empty")
    return size


def _detect(source: BinaryIO, job: Job | None, image_id: str, limit: int | None = None) -> dict[str, Any]:
    """Name and inspector of every format that the bytes match; ``raw`` where none does."""
    from oslo_utils.imageutils import format_inspector

    wrapper = format_inspector.InspectWrapper(source)
    formats = None
    try:
        while formats is None and (limit is None or source.tell() < limit):
            if job is not None:
                job.check()
            if not wrapper.read(CHUNK_BYTES):
                break
            formats = wrapper.formats
        # Told that the stream ended, inspectors that still waited for more give up; its own close() shuts our file.
        wrapper._finish()
        return {str(found): found for found in wrapper.formats or []}
    except errors.ComputeError:
        raise
    except Exception as exc:  # a parser fed by an attacker may fail in any way
        raise _unreadable(image_id, exc) from None


def _check(found: Any, source: BinaryIO, image_id: str, declared: str) -> Inspection:
    from oslo_utils.imageutils import format_inspector

    try:
        found.safety_check()
        size = int(found.virtual_size)
    except format_inspector.SafetyCheckFailed as exc:
        reasons = ", ".join(f"{name} ({failure})" for name, failure in sorted(exc.failures.items()))
        raise errors.ImageUnacceptable(image=image_id, reason=f"it fails the safety check of {reasons}") from None
    except Exception as exc:
        raise _unreadable(image_id, exc) from None
    source.seek(0)
    head = source.read(SECTOR_BYTES)
    if declared == "qcow2" and struct.unpack(">I", head[32:36])[0]:
        raise errors.ImageUnacceptable(image=image_id, reason="it is encrypted")
    if declared == "qcow2" and not _tables_are_there(head, source.seek(0, 2)):
        raise errors.ImageUnacceptable(image=image_id, reason="it is cut short: its tables are missing")
    if declared == "vmdk" and not head.startswith(b"KDMV"):
        raise errors.ImageUnacceptable(image=image_id, reason="it is a VMDK descriptor that names other files")
    if size <= 0:
        # Of a VMDK this also means that qemu would look for its extents in the descriptor.
        raise errors.ImageUnacceptable(image=image_id, reason="its header says that the disk has no size")
    return Inspection(declared, size)


def _tables_are_there(head: bytes, size: int) -> bool:
    """Whether the L1 and refcount tables of a qcow2 lie within the file. Beyond its end qemu would read zeros: a disk
    with nothing on it."""
    cluster_bits, _, _, l1_size, l1_offset, refcounts_offset, clusters = struct.unpack(">IQIIQQI", head[20:60])
    if not 9 <= cluster_bits <= 21:
        return False
    return bool(l1_offset + 8 * l1_size <= size and refcounts_offset + clusters * (1 << cluster_bits) <= size)


def _unreadable(image_id: str, exc: Exception) -> errors.ImageUnacceptable:
    return errors.ImageUnacceptable(image=image_id, reason=f"its header makes no sense ({type(exc).__name__})")
