"""The only place that runs ``qemu-img``: formats are always said, never guessed, and every run is limited."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compute_worker import errors
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.disks.process import Limits

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

_PROGRESS = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
_MOST_OUTPUT = 64 << 20
_SLOWEST_BYTES_PER_CPU_SECOND = 16 << 20
"""Decompressing costs most; seen: 100 to 400 MiB a second."""
_SLOWEST_COMPRESSED_PER_CPU_SECOND = 4 << 20
"""zlib costs most; seen: 26 MiB a second."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What ``qemu-img info`` says of a file whose format was given to it."""

    format: str
    virtual_size_bytes: int
    allocated_bytes: int
    backing: str | None
    encrypted: bool
    details: dict[str, Any] = field(default_factory=dict)
    """The format's own data: ``create-type`` and ``extents`` of a vmdk, ``data-file`` of a qcow2."""
    cluster_bytes: int = 0


class QemuImg:
    """qemu-img with this host's limits: ``cpu_seconds`` to look at an image (more to convert one, by its size) and
    ``memory_mb`` of address space."""

    def __init__(self, cpu_seconds: int, memory_mb: int) -> None:
        self._look = Limits(cpu_seconds=cpu_seconds, address_space_bytes=memory_mb << 20)

    def info(self, path: Path, fmt: str, job: Job, *, shared: bool = False) -> ImageInfo:
        """Look at an image as ``fmt``.

        :param shared: a running guest may have it open.
        :raises compute_worker.errors.CommandFailed: it is not one, or looking takes more than the limits.
        """
        words = ["info", "--output=json", *(["-U"] if shared else []), "-f", fmt, path]
        found = self._json(words, job)
        return ImageInfo(
            format=str(found.get("format")),
            virtual_size_bytes=int(found["virtual-size"]),
            allocated_bytes=int(found.get("actual-size", 0)),
            backing=found.get("backing-filename") or found.get("full-backing-filename"),
            encrypted=bool(found.get("encrypted")),
            details=dict((found.get("format-specific") or {}).get("data") or {}),
            cluster_bytes=int(found.get("cluster-size", 0)),
        )

    def create(self, path: Path, fmt: str, size_bytes: int, job: Job) -> None:
        """Make an empty disk."""
        self._run(["create", "-q", "-f", fmt, path, str(size_bytes)], job, writes=path)

    def create_overlay(self, path: Path, size_bytes: int, backing: str, backing_format: str, job: Job) -> None:
        """Make an empty qcow2 over ``backing`` (absolute, or relative to the directory of ``path``)."""
        words = ["create", "-q", "-f", "qcow2", "-F", backing_format, "-b", backing, path, str(size_bytes)]
        self._run(words, job, writes=path)

    def create_blind(
        self, path: Path, size_bytes: int, cluster_bytes: int, backing: str | None, backing_format: str | None, job: Job
    ) -> None:
        """Make an empty qcow2 with that cluster size, over a backing file that is not looked at and need not be there
        yet; ``None``: over nothing."""
        over = ["-u", "-F", backing_format or "raw", "-b", backing] if backing else []
        options = ["-o", f"cluster_size={cluster_bytes}"]
        self._run(["create", "-q", "-f", "qcow2", *options, *over, path, str(size_bytes)], job, writes=path)

    def layers(self, path: Path, fmt: str, job: Job) -> list[dict[str, Any]]:
        """What ``qemu-img map`` says of an image that a running guest may have open: pieces with ``start``, ``length``,
        ``depth`` (0: the image itself), ``zero``, ``data``. What the guest's qemu has not written out is not in it.

        :raises compute_worker.errors.CommandFailed: it cannot be read, or says more than 64 MiB.
        """
        output = bytearray()

        def keep(piece: bytes) -> None:
            if len(output) + len(piece) > _MOST_OUTPUT:
                raise errors.CommandFailed(command="qemu-img map", status=0, stderr="its answer is too long")
            output.extend(piece)

        self._run(["map", "-U", "--output=json", "-f", fmt, path], job, on_output=keep)
        try:
            found = json.loads(output)
        except ValueError:
            raise errors.CommandFailed(command="qemu-img map", status=0, stderr="its answer is not JSON") from None
        return list(found)

    def remove_bitmap(self, path: Path, name: str, job: Job) -> None:
        """Remove a persistent bitmap from a qcow2 that nobody has open."""
        self._run(["bitmap", "--remove", "-f", "qcow2", path, name], job, writes=path)

    def remove_bitmaps(self, path: Path, prefix: str, job: Job, keep: str = "") -> None:
        """Remove those persistent bitmaps from a qcow2 that nobody has open whose names begin so; ``keep`` stays."""
        for bitmap in self.info(path, "qcow2", job).details.get("bitmaps") or ():
            name = str(bitmap.get("name", ""))
            if name.startswith(prefix) and name != keep:
                self.remove_bitmap(path, name, job)

    def convert(
        self, source: Path, source_format: str, target: Path, target_format: str, size_bytes: int, job: Job, phase: str
    ) -> None:
        """Copy a disk into another format; holes stay holes. Reports ``phase`` in bytes of ``size_bytes``.

        If the process dies inside, ``target`` is garbage. The caller syncs it.
        """
        limits = Limits(
            cpu_seconds=(self._look.cpu_seconds or 0) + size_bytes // _SLOWEST_BYTES_PER_CPU_SECOND,
            address_space_bytes=self._look.address_space_bytes,
        )
        words = ["convert", "-p", "-f", source_format, "-O", target_format, source, target]
        self._run(words, job, limits=limits, writes=target, on_output=_progress(job, phase, size_bytes))

    def compress(self, source: str, target: Path, compression: str, size_bytes: int, job: Job, phase: str) -> None:
        """Write a disk as a compressed qcow2 without a backing file.

        :param source: the disk in QEMU's own notation (``json:``), which names its format and everything it stands on.
        :param compression: ``zlib`` or ``zstd``.

        If the process dies inside, ``target`` is garbage.
        """
        limits = Limits(
            cpu_seconds=(self._look.cpu_seconds or 0) + size_bytes // _SLOWEST_COMPRESSED_PER_CPU_SECOND,
            address_space_bytes=self._look.address_space_bytes,
        )
        options = ["-o", f"compression_type={compression}"]
        words = ["convert", "-p", "-c", "-O", "qcow2", *options, source, target]
        self._run(words, job, limits=limits, writes=target, on_output=_progress(job, phase, size_bytes))

    def resize(self, path: Path, fmt: str, size_bytes: int, job: Job) -> bool:
        """Grow a disk that nobody has open; returns whether there was something to do.

        :raises compute_worker.errors.Broken: it is larger than that: shrinking would cut the guest's data.
        """
        now = self.info(path, fmt, job).virtual_size_bytes
        if now > size_bytes:
            raise errors.Broken(f"{path} has {now} bytes and cannot shrink to {size_bytes}")
        if now == size_bytes:
            return False
        self._run(["resize", "-q", "-f", fmt, path, str(size_bytes)], job, writes=path)
        return True

    def point_to(self, path: Path, backing: str, backing_format: str, job: Job) -> None:
        """Have a qcow2 that nobody has open stand on another file with the same bytes; its own stay as they are."""
        self._run(["rebase", "-q", "-u", "-f", "qcow2", "-F", backing_format, "-b", backing, path], job, writes=path)

    def check(self, path: Path, fmt: str, job: Job) -> dict[str, Any]:
        """Check a disk's own structure, changing nothing; what qemu-img found.

        :raises compute_worker.errors.CommandFailed: it is corrupt or has leaked clusters.
        """
        return self._json(["check", "--output=json", "-f", fmt, path], job)

    def measure(self, path: Path, fmt: str, target_format: str, job: Job) -> tuple[int, int]:
        """Bytes that a conversion needs (``required``), and at most could (``fully allocated``)."""
        found = self._json(["measure", "--output=json", "-f", fmt, "-O", target_format, path], job)
        return int(found["required"]), int(found["fully-allocated"])

    def _json(self, words: list[Any], job: Job) -> dict[str, Any]:
        text = self._run(words, job)
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise errors.CommandFailed(command=f"qemu-img {words[0]}", status=0, stderr="its answer is not JSON")
        return found

    def _run(
        self,
        words: list[Any],
        job: Job,
        *,
        limits: Limits | None = None,
        writes: Path | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> str:
        for word in words:
            # An absolute path cannot be taken for an option or for a protocol ("json:", "nbd:").
            if isinstance(word, Path) and not word.is_absolute():
                raise ValueError(f"not an absolute path: {word}")
        return process.run(
            ["qemu-img", *words], job, limits=limits or self._look, writes=writes, on_output=on_output
        )


def _progress(job: Job, phase: str, size_bytes: int) -> Callable[[bytes], None]:
    def see(piece: bytes) -> None:
        found = _PROGRESS.findall(piece)
        if found:
            job.report(phase, int(float(found[-1]) / 100 * size_bytes), size_bytes)

    return see
