"""One disk of a guest, and the block jobs on it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import libvirt

from compute_worker.virt.libvirt.events import word, words
from compute_worker.virt.libvirt.faults import code_of

_JOB_TYPES = words("VIR_DOMAIN_BLOCK_JOB_TYPE_")


class _Guest(Protocol):
    def domain_for(self, doing: str, *, through_peer: bool = False) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A running block job. ``type``: ``copy``, ``commit``, ``active_commit``, ``pull``, ``backup``; bytes.

    ``done`` equals ``total`` when a copy or an active commit is ready to pivot, but also for a moment before there is
    anything to do: believe the event, or the disk's ``<mirror ready='yes'>``.
    """

    type: str
    done: int
    total: int
    bandwidth: int


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """Sizes of a disk in bytes: as the guest sees it, as allocated, as the file is."""

    capacity: int
    allocation: int
    physical: int


class BlockDevice:
    """The disk at ``target`` (``vda``)."""

    def __init__(self, guest: _Guest, target: str) -> None:
        self._guest = guest
        self.target = target

    def info(self) -> BlockInfo:
        """Its sizes."""
        with self._guest.domain_for(f"reading the sizes of disk {self.target}") as dom:
            return BlockInfo(*dom.blockInfo(self.target, 0))

    def resize(self, size_bytes: int) -> None:
        """Make it this large while the guest runs; the guest is told."""
        with self._guest.domain_for(f"resizing disk {self.target}") as dom:
            dom.blockResize(self.target, size_bytes, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)

    def copy(
        self,
        destination_xml: str,
        *,
        shallow: bool = False,
        reuse_external: bool = False,
        synchronous: bool = False,
        bandwidth: int = 0,
    ) -> None:
        """Begin to mirror it to ``destination_xml`` (a ``<disk>``); goes on until :meth:`abort`.

        The job is transient: a persistent guest takes it, and it ends with the guest's run. It survives libvirtd.

        :param shallow: only the top layer; the copy gets the same backing chain.
        :param reuse_external: the target is there, with its format and backing file.
        :param bandwidth: bytes a second; 0: no limit.
        """
        flags = (
            libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
            | (libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW if shallow else 0)
            | (libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT if reuse_external else 0)
            | (libvirt.VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES if synchronous else 0)
        )
        params = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: bandwidth} if bandwidth else None
        with self._guest.domain_for(f"copying disk {self.target}") as dom:
            dom.blockCopy(self.target, destination_xml, params, flags)

    def commit(self, base: str, top: str, *, active: bool, bandwidth: int = 0) -> None:
        """Begin to write layer ``top`` down into layer ``base``; both must be named.

        libvirt's own default for the base is the bottom of the chain: the image that other guests share.

        :param active: ``top`` is the layer the guest writes to; end it by ``abort(pivot=True)``.
        :raises ValueError: a layer is not named.
        """
        if not base or not top:
            raise ValueError(f"disk {self.target}: a commit names its base and its top, not {base!r} and {top!r}")
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES | (
            libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if active else 0
        )
        with self._guest.domain_for(f"committing disk {self.target}") as dom:
            dom.blockCommit(self.target, base, top, bandwidth, flags)

    def job(self) -> BlockJob | None:
        """The job on it; ``None``: none (it ended, or the guest's run did)."""
        with self._guest.domain_for(f"reading the job on disk {self.target}") as dom:
            if not dom.isActive():
                return None
            info = dom.blockJobInfo(self.target, libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES)
        if not info:
            return None
        return BlockJob(word(_JOB_TYPES, info["type"]), info["cur"], info["end"], info["bandwidth"])

    def set_speed(self, bytes_per_second: int) -> None:
        """Limit the job; 0: no limit."""
        with self._guest.domain_for(f"setting the speed of the job on disk {self.target}") as dom:
            dom.blockJobSetSpeed(self.target, bytes_per_second, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)

    def abort(self, *, pivot: bool = False, wait: bool = True) -> bool:
        """End the job: drop the copy, or ``pivot`` to it. ``False``: there is none.

        :param wait: block until it ended; without, an event says so.
        """
        flags = (libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT if pivot else 0) | (
            0 if wait else libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC
        )
        if self.job() is None:
            return False
        with self._guest.domain_for(f"ending the job on disk {self.target}") as dom:
            try:
                dom.blockJobAbort(self.target, flags)
            except libvirt.libvirtError as exc:
                # Between the question and the call it may have ended; a pivot that did not happen must be said.
                gone = code_of(exc) == libvirt.VIR_ERR_INVALID_ARG or not dom.blockJobInfo(self.target, 0)
                if pivot or not gone:
                    raise
                return False
            return True
