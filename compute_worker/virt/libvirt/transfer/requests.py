"""What a source asks of the destination's receiver, by ``ask``."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from compute_worker.objects import Bytes, ImageId
from compute_worker.virt.libvirt.transfer.windows import Runs

PAGE = 4096
"""Extents in one answer."""
PIECE = 256 << 20
"""Most bytes that one answer is about where they have to be read: a few seconds."""

Piece = Annotated[int, Meta(ge=1, le=PIECE)]
Probe = Annotated[str, Meta(pattern=r"^probe-[0-9a-f]{32}\Z")]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """About the whole instance: ``facts``, ``begin``, ``close``."""


class ProbeRequest(Request, frozen=True, kw_only=True):
    """Whether the file ``name`` in the instances directory is seen there, with this content."""

    name: Probe
    content: Annotated[str, Meta(min_length=16, max_length=64)]


class NameRequest(Request, frozen=True, kw_only=True):
    """About one file: ``place`` (room to write it without a server), ``stop`` listening for it."""

    name: ImageId


class OpenRequest(NameRequest, frozen=True, kw_only=True):
    """Listen for the bytes of a file, in windows of so many bytes."""

    size: Bytes
    window: Annotated[int, Meta(ge=4096, le=1 << 40)]


class OverlayRequest(OpenRequest, frozen=True, kw_only=True):
    """Listen for the clusters of a qcow2 of this virtual ``size``, as they were at ``token``. ``backing``: its base."""

    token: Annotated[str, Meta(pattern=r"^[a-z0-9-]{8,64}\Z")]
    cluster: Annotated[int, Meta(ge=512, le=2 << 20)]
    backing: ImageId | None = None
    backing_format: Annotated[str, Meta(pattern=r"^(raw|qcow2)\Z")] | None = None


class WindowsRequest(NameRequest, frozen=True, kw_only=True):
    """These windows have been written and flushed."""

    done: Annotated[Runs, Meta(max_length=100_000)] = []


class MapRequest(NameRequest, frozen=True, kw_only=True):
    """Where data is, from byte ``at``; at most :data:`PAGE` extents."""

    at: Bytes = 0


class ZerosRequest(NameRequest, frozen=True, kw_only=True):
    """Whether all these ranges read as zeros."""

    ranges: Annotated[list[tuple[Bytes, Bytes]], Meta(max_length=PAGE)]


class DigestRequest(NameRequest, frozen=True, kw_only=True):
    """The sha256 of a piece."""

    at: Bytes
    length: Piece


class FinishRequest(NameRequest, frozen=True, kw_only=True):
    """Everything of the file is there: give it its name. ``size``: the file's; ``None``: of an overlay that was
    written here nobody can say it."""

    size: Bytes | None


class RemoveRequest(Request, frozen=True, kw_only=True):
    """Remove this migration's copy of a file; without a name everything of this migration."""

    name: ImageId | None = None


KINDS: dict[str, type[Request]] = {
    "facts": Request,
    "begin": Request,
    "probe": ProbeRequest,
    "place": NameRequest,
    "open": OpenRequest,
    "overlay": OverlayRequest,
    "windows": WindowsRequest,
    "stop": NameRequest,
    "map": MapRequest,
    "zeros": ZerosRequest,
    "digest": DigestRequest,
    "finish": FinishRequest,
    "remove": RemoveRequest,
    "close": Request,
}
