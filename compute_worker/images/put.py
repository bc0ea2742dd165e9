"""One PUT of a body of any size: streamed, summed, cancellable, and never begun anew by a library."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compute_worker import errors
from compute_worker.images.store import Piece, flat
from compute_worker.images.summing import Sum

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

_BROKEN = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Goal:
    """Where it goes. ``refused`` makes an error of a status and the image's id."""

    connection: http.client.HTTPConnection
    target: str
    headers: Mapping[str, str]
    store: str
    image_id: str
    refused: Callable[[int, str], errors.ComputeError]


def put(goal: Goal, pieces: Iterable[Piece], size_bytes: int | None, job: Job | None) -> tuple[int, str]:
    """Send with ``Content-Length`` where the size is known, else in chunks; return size and sha256 of what went. The
    connection is closed in each case; a body that did not come whole is never ended as if it had.

    :raises compute_worker.errors.ImageStoreUnavailable: the connection broke, or the server was silent too long.
    :raises compute_worker.errors.ImageUnacceptable: other bytes came than ``size_bytes``.
    :raises compute_worker.errors.Cancelled: by ``job``.
    """
    connection = goal.connection
    try:
        with job.on_cancel(lambda: shut_down(connection)) if job is not None else nullcontext():
            return _put(goal, pieces, size_bytes, job)
    except _BROKEN as exc:
        if job is not None:
            job.check()  # it was we who shut it down
        raise errors.ImageStoreUnavailable(store=goal.store, reason=reason_of(exc)) from None
    finally:
        connection.close()


def shut_down(connection: http.client.HTTPConnection) -> None:
    """End a connection under whoever reads or writes it, from any thread."""
    sock = connection.sock
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def reason_of(exc: BaseException) -> str:
    """What broke, in few words."""
    return (str(exc) or type(exc).__name__)[:200]


def _put(goal: Goal, pieces: Iterable[Piece], size_bytes: int | None, job: Job | None) -> tuple[int, str]:
    connection, done = goal.connection, 0
    connection.putrequest("PUT", goal.target, skip_accept_encoding=True)
    length = ("Transfer-Encoding", "chunked") if size_bytes is None else ("Content-Length", str(size_bytes))
    for name, value in {"Content-Type": "application/octet-stream", **goal.headers, length[0]: length[1]}.items():
        connection.putheader(name, value)
    connection.endheaders()
    with Sum() as total:
        for data in flat(pieces):
            if job is not None:
                job.check()
            done += len(data)
            if size_bytes is not None and done > size_bytes:
                raise errors.ImageUnacceptable(
                    image=goal.image_id, reason=f"more than the {size_bytes} bytes announced came"
                )
            if len(data):  # an empty chunk would end the body
                with total.beside(data):
                    _send(goal, data, chunked=size_bytes is None)
    if size_bytes not in (None, done):
        raise errors.ImageUnacceptable(
            image=goal.image_id, reason=f"{done} bytes came, {size_bytes} were announced"
        )
    if size_bytes is None:
        _send(goal, b"", chunked=True)
    status = connection.getresponse().status
    if not 200 <= status < 300:
        raise goal.refused(status, goal.image_id)
    return done, total.hexdigest()


def _send(goal: Goal, data: bytes | bytearray | memoryview, *, chunked: bool) -> None:
    connection = goal.connection
    try:
        if chunked:
            connection.send(f"{len(data):x}\r\n".encode())
        connection.send(data)
        if chunked:
            connection.send(b"\r\n")
    except OSError:
        # A server that refuses the rest may have said why before it hung up.
        with suppress(*_BROKEN):
            status = connection.getresponse().status
            if status >= 300:
                raise goal.refused(status, goal.image_id) from None
        raise
