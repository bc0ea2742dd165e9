"""A small NBD client: fixed newstyle handshake, TLS by STARTTLS, pipelined writes, reads, block status.

The protocol is described at https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. One connection belongs
to one thread; only :meth:`Connection.abort` may be called from another.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPTION = 0x49484156454F5054
_OPTION_REPLY = 0x3E889045565A9
_REQUEST = 0x25609513
_SIMPLE, _STRUCTURED = 0x67446698, 0x668E33EF
_OPT_ABORT, _OPT_STARTTLS, _OPT_GO, _OPT_STRUCTURED, _OPT_META = 2, 5, 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META = 1, 3, 4
_READ, _WRITE, _DISC, _FLUSH, _ZEROES, _STATUS = 0, 1, 2, 3, 6, 7
_FLAG_DF, _FLAG_NO_HOLE = 4, 2
_DATA, _HOLE, _BLOCK_STATUS, _ERROR = 1, 2, 5, 0x8000
_MAX_REPLY = 40 << 20
_MAX_ZEROES = 1 << 30
HEADER = struct.Struct(">IHHQQI")
"""A request; :meth:`Connection.write` wants this much room before the data."""

ANSWER_SECONDS = 30.0
"""Silence after which a server is taken for dead."""
FLUSH_SECONDS = 300.0
"""A flush may wait for a slow disk to take what has piled up."""
IN_FLIGHT = 4
"""Requests of one connection that are not answered yet; the server holds the bytes of each in memory."""
Part = tuple[int, memoryview]
"""An offset of a disk, and where its bytes go."""


class NbdError(Exception):
    """The server refused, or what it said is not NBD."""


class ConnectionLost(NbdError):
    """The connection broke, or the server fell silent."""


class WrongPeer(NbdError):
    """TLS failed: the other end is not who it should be, or does not believe that we are."""


class SourceFailed(NbdError):
    """The disk cannot be read on this host: the destination has nothing to do with it."""


class RequestFailed(NbdError):
    """The server could not do what was asked. ``errno``: why (NBD's numbers are Linux's)."""

    def __init__(self, what: str, code: int) -> None:
        self.errno = code
        super().__init__(f"{what}: {os.strerror(code)}")


@dataclass(frozen=True, slots=True)
class Tls:
    """How a connection is secured: with which certificates, and the name that the server's must carry."""

    context: ssl.SSLContext
    server_name: str


@dataclass(frozen=True, slots=True)
class Status:
    """A piece of a disk and what a metadata context says of it (``base:allocation``: 1 hole, 2 reads as zero)."""

    length: int
    flags: int


class Connection:
    """A connection to one export, not yet made: :meth:`open` makes it. ``size``: of the disk, in bytes.

    :param address: host and port, or the path of a unix socket.
    :param contexts: metadata contexts that :meth:`block_status` is asked about.
    """

    def __init__(
        self, address: tuple[str, int] | Path, export: str, tls: Tls | None = None, contexts: Sequence[str] = ()
    ) -> None:
        self.size = 0
        self._address = address
        self._export = export
        self._tls = tls
        self._wanted = contexts
        self._contexts: dict[str, int] = {}
        self._structured = bool(contexts)
        self._handle = 0
        self._in_flight: dict[int, str] = {}
        self._aborted = False
        self._socket = socket.socket(socket.AF_UNIX)

    def open(self) -> None:
        """Connect, secure, and open the export.

        :raises ConnectionLost: nobody answers.
        :raises WrongPeer: the certificates do not fit.
        :raises NbdError: no such export, or the server wants what we do not.
        """
        try:
            self._connect()
            self._negotiate(self._export, self._tls, self._wanted)
        except ConnectionLost as exc:
            self._socket.close()
            if not isinstance(self._socket, ssl.SSLSocket):
                raise
            raise ConnectionLost(f"{exc} right after TLS began; it may not accept our certificate") from None
        except BaseException:
            self._socket.close()
            raise

    def _connect(self) -> None:
        places: list[tuple[int, Any]] = [(socket.AF_UNIX, str(self._address))]
        where = str(self._address)
        try:
            if not isinstance(self._address, Path):
                where = f"{self._address[0]} port {self._address[1]}"
                found = socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)
                places = [(family, place) for family, _, _, _, place in found]
        except OSError as exc:
            raise ConnectionLost(f"{where}: {exc.strerror or exc}") from None
        problem: OSError = OSError("it has no address")
        for family, place in places:
            self._socket.close()
            # Known to abort() before it waits for an answer that may never come.
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.settimeout(ANSWER_SECONDS)
            try:
                if self._aborted:
                    break
                self._socket.connect(place)
                if family != socket.AF_UNIX:
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return
            except OSError as exc:
                problem = exc
        raise ConnectionLost(f"{where}: {problem.strerror or problem}")

    # --- handshake ----------------------------------------------------------------------------------------------

    def _negotiate(self, export: str, tls: Tls | None, contexts: Sequence[str]) -> None:
        greeting = self._receive(18)
        if greeting[:16] != b"NBDMAGICIHAVEOPT" or not greeting[17] & 1:
            raise NbdError("the server does not speak newstyle NBD")
        no_zeroes = greeting[17] & 2
        self._send(struct.pack(">I", 1 | no_zeroes))
        if tls is not None:
            self._start_tls(tls)
        name = export.encode()
        if contexts:
            self._option(_OPT_STRUCTURED, b"")
            queries = b"".join(struct.pack(">I", len(c)) + c.encode() for c in contexts)
            asked = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts)) + queries
            for kind, data in self._option(_OPT_META, asked):
                if kind == _REP_META:
                    self._contexts[data[4:].decode()] = _unpack(">I", data[:4])[0]
            missing = [c for c in contexts if c not in self._contexts]
            if missing:
                raise NbdError(f"the server does not offer {', '.join(missing)}")
        for kind, data in self._option(_OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0)):
            if kind == _REP_INFO and data[:2] == b"\0\0":
                self.size = _unpack(">Q", data[2:10])[0]

    def _start_tls(self, tls: Tls) -> None:
        self._option(_OPT_STARTTLS, b"")
        try:
            self._socket = tls.context.wrap_socket(self._socket, server_hostname=tls.server_name)
        except ssl.SSLCertVerificationError as exc:
            raise WrongPeer(f"the certificate of {tls.server_name} is refused: {exc.verify_message}") from None
        except ssl.SSLError as exc:
            raise WrongPeer(f"no TLS with {tls.server_name}: {exc.reason or exc}") from None
        except OSError as exc:
            raise ConnectionLost(f"no TLS with {tls.server_name}: {exc}") from None

    def _option(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        """Ask for an option; every reply up to its acknowledgement."""
        self._send(struct.pack(">QII", _OPTION, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, about, kind, length = _unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or about != option or length > _MAX_REPLY:
                raise NbdError("the server's answer in the handshake is garbled")
            body = bytes(self._receive(length))
            if kind == _REP_ACK:
                return replies
            if kind & 0x80000000:
                said = body.decode(errors="replace") or _REFUSALS.get(kind & 0xFFFF, f"error {kind & 0xFFFF}")
                raise NbdError(f"the server refuses option {option}: {said}"[:300])
            replies.append((kind, body))

    # --- requests -----------------------------------------------------------------------------------------------

    def write(self, buffer: memoryview, offset: int) -> None:
        """Begin to write ``buffer`` past its first ``HEADER.size`` bytes, which are room for us; it may be reused
        when this returns. Errors come from this or a later call, at the latest from :meth:`flush`."""
        count = len(buffer) - HEADER.size
        handle = self._begin(f"writing {count} bytes at {offset}")
        HEADER.pack_into(buffer, 0, _REQUEST, 0, _WRITE, handle, offset, count)
        self._send(buffer)
        self._settle(IN_FLIGHT)

    def write_zeroes(self, offset: int, count: int, *, keep_hole: bool = True) -> None:
        """Begin to make a range read as zeros; ``keep_hole``: the server may leave a hole there."""
        while count > 0:
            piece = min(count, _MAX_ZEROES)
            self._request(_ZEROES, offset, piece, flags=0 if keep_hole else _FLAG_NO_HOLE)
            self._settle(IN_FLIGHT)
            offset, count = offset + piece, count - piece

    def settle(self) -> None:
        """Wait until the server has taken everything that was written; a :meth:`flush`, also one by another connection,
        brings it to the disk.

        :raises RequestFailed: a write failed.
        """
        self._settle(0)

    def flush(self) -> None:
        """Wait until everything that was written before is on the server's disk.

        :raises RequestFailed: a write before it failed, or the flush did.
        """
        self._settle(0)
        self._socket.settimeout(FLUSH_SECONDS)
        self._request(_FLUSH, 0, 0)
        self._settle(0)
        self._socket.settimeout(ANSWER_SECONDS)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with what is at ``offset``."""
        self.read_parts([(offset, buffer)])

    def read_parts(self, parts: Iterable[Part]) -> None:
        """Fill each buffer with what is at its offset. All are asked for at once, so that many small ones take hardly
        longer than one large one; the server holds the bytes of each in memory.

        :raises RequestFailed: one cannot be read; the connection is of no use any more.
        """
        self._settle(0)
        wanted: dict[int, Part] = {}
        requests = bytearray()
        for offset, buffer in parts:
            handle = self._begin(f"reading {len(buffer)} bytes at {offset}")
            requests += HEADER.pack(_REQUEST, 0, _READ, handle, offset, len(buffer))
            wanted[handle] = (offset, buffer)
        self._send(memoryview(requests))
        while wanted:
            self._reply(wanted)

    def block_status(self, context: str, offset: int, count: int) -> list[Status]:
        """What ``context`` says of the range, from its beginning; the server may answer for less of it, or more."""
        self._settle(0)
        what = f"status of {count} bytes at {offset}"
        handle = self._request(_STATUS, offset, count, what=what)
        found: list[Status] = []
        while True:
            flags, kind, body = self._chunk(handle, what)
            if kind == _BLOCK_STATUS and _unpack(">I", body[:4])[0] == self._contexts[context]:
                found = [Status(*_unpack(">II", body[at : at + 8])) for at in range(4, len(body), 8)]
            if flags & 1:
                del self._in_flight[handle]
                return found

    def close(self) -> None:
        """Leave; ends well on a connection that is broken already."""
        with suppress(NbdError, OSError):
            self._socket.settimeout(1)
            self._send(HEADER.pack(_REQUEST, 0, _DISC, 0, 0, 0))
        self._socket.close()

    def abort(self) -> None:
        """Break the connection, from any thread: whoever waits on it gets :class:`ConnectionLost`."""
        self._aborted = True
        with suppress(OSError):
            # Of an SSL socket this is the plain socket's: no goodbye that would have to wait for an answer.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    # --- inside -------------------------------------------------------------------------------------------------

    def _begin(self, what: str) -> int:
        self._handle += 1
        self._in_flight[self._handle] = what
        return self._handle

    def _request(self, kind: int, offset: int, count: int, *, flags: int = 0, what: str = "") -> int:
        handle = self._begin(what or f"request {kind} of {count} bytes at {offset}")
        self._send(HEADER.pack(_REQUEST, flags, kind, handle, offset, count))
        return handle

    def _settle(self, left: int) -> None:
        """Read replies until at most ``left`` requests are unanswered."""
        while len(self._in_flight) > left:
            self._one_reply()

    def _one_reply(self) -> None:
        magic = _unpack(">I", self._receive(4))[0]
        if magic == _SIMPLE:
            code, handle = _unpack(">IQ", self._receive(12))
        elif magic == _STRUCTURED:
            _, kind, handle, length = _unpack(">HHQI", self._receive(16))
            body = self._receive(length) if length <= _MAX_REPLY else b""
            code = _unpack(">I", body[:4])[0] if kind & _ERROR else 0
        else:
            raise NbdError("the server's answer is garbled")
        what = self._in_flight.pop(handle, "")
        if code:
            raise RequestFailed(what, code)

    def _chunk(self, handle: int, what: str) -> tuple[int, int, bytes]:
        """One piece of a structured reply: flags, type, content."""
        magic, flags, kind, about, length = _unpack(">IHHQI", self._receive(20))
        if magic != _STRUCTURED or about != handle or length > _MAX_REPLY:
            raise NbdError("the server's answer is garbled")
        body = bytes(self._receive(length))
        if kind & _ERROR:
            raise RequestFailed(what, _unpack(">I", body[:4])[0])
        return flags, kind, body

    def _reply(self, wanted: dict[int, Part]) -> None:
        """One piece of an answer to one of the reads, which come in any order; whoever has all of his leaves."""
        if not self._structured:
            magic, code, handle = _unpack(">IIQ", self._receive(16))
            if magic != _SIMPLE or handle not in wanted:
                raise NbdError("the server's answer is garbled")
            if code:
                raise RequestFailed(self._in_flight[handle], code)
            self._receive_into(wanted[handle][1])
            flags = 1
        else:
            magic, flags, kind, handle, length = _unpack(">IHHQI", self._receive(20))
            if magic != _STRUCTURED or handle not in wanted or length > _MAX_REPLY:
                raise NbdError("the server's answer is garbled")
            self._fill(wanted[handle], kind, length, self._in_flight[handle])
        if flags & 1:
            del wanted[handle], self._in_flight[handle]

    def _fill(self, part: Part, kind: int, length: int, what: str) -> None:
        """Take a piece of a structured answer to where it belongs."""
        offset, buffer = part
        if kind == _DATA:
            at = _unpack(">Q", self._receive(8))[0] - offset
            if at < 0 or at + length - 8 > len(buffer):
                raise NbdError("the server answers a read with other bytes")
            self._receive_into(buffer[at : at + length - 8])
            return
        body = bytes(self._receive(length))
        if kind & _ERROR:
            raise RequestFailed(what, _unpack(">I", body[:4])[0])
        if kind == _HOLE:
            first, count = _unpack(">QI", body)
            if first < offset or first - offset + count > len(buffer):
                raise NbdError("the server answers a read with other bytes")
            buffer[first - offset : first - offset + count] = bytes(count)

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.sendall(data)
        except (OSError, ValueError) as exc:
            raise self._lost(exc) from None

    def _receive(self, count: int) -> bytearray:
        data = bytearray(count)
        self._receive_into(memoryview(data))
        return data

    def _receive_into(self, buffer: memoryview) -> None:
        at = 0
        while at < len(buffer):
            try:
                got = self._socket.recv_into(buffer[at:])
            except (OSError, ValueError) as exc:
                raise self._lost(exc) from None
            if not got:
                raise ConnectionLost("the server closed the connection")
            at += got

    @staticmethod
    def _lost(exc: Exception) -> NbdError:
        if isinstance(exc, ssl.SSLError) and "ALERT" in (exc.reason or ""):
            # In TLS 1.3 a server that refuses our certificate says so only after the handshake.
            return WrongPeer(f"the server refuses our certificate: {exc.reason}")
        return ConnectionLost(str(exc) or type(exc).__name__)


_REFUSALS = {1: "unknown", 2: "forbidden", 3: "invalid", 4: "not possible", 5: "it wants TLS", 6: "no such export"}


def _unpack(layout: str, data: bytes | bytearray) -> tuple[Any, ...]:
    """:raises NbdError: the server sent less, or more, than that."""
    try:
        return struct.unpack(layout, data)
    except struct.error:
        raise NbdError("the server's answer is garbled") from None
