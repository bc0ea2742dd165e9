"""A server that takes uploads, and can refuse, be slow, be full, hang up or stall; what it got is whole or nothing."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Behaviour:
    """How badly it serves. Bodies are read in pieces of ``step`` bytes."""

    refuse: dict[str, int] = field(default_factory=dict)
    """Status by method, answered before the body is read."""
    refuse_once: dict[str, list[int]] = field(default_factory=dict)
    """Statuses by method, each for one request."""
    hang_up_after: int | None = None
    """Bytes of a body after which the connection is closed."""
    full_after: int | None = None
    """Bytes of a body after which there is no room (status ``full_status``)."""
    full_status: int = 507
    stall_after: int | None = None
    """Bytes of a body after which nothing more is read until ``go_on``."""
    discard: bool = False
    """Whether bodies are read and forgotten."""
    step: int = 65_536
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.requests]


class HungUp(Exception):
    """The connection is gone: no answer."""


class Full(Exception):
    """No room for the rest."""


class UploadHandler(http.server.BaseHTTPRequestHandler):
    """Reads bodies as ``behaviour`` says; subclasses answer."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing on the console."""

    def begin(self) -> bool:
        """Note the request; false when it was refused."""
        behaviour = self.behaviour
        behaviour.requests.append((self.command, self.path, dict(self.headers)))
        once = behaviour.refuse_once.get(self.command)
        status = once.pop(0) if once else behaviour.refuse.get(self.command)
        if status is None:
            return True
        self.answer(status, close=True)
        return False

    def answer(self, status: int, body: bytes = b"", close: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes | None:
        """The whole body; ``None`` when it did not come whole, and then the request has been dealt with."""
        got, count = bytearray(), 0
        try:
            for piece in self._pieces():
                got += b"" if self.behaviour.discard else piece
                count += len(piece)
                self._misbehave(count)
        except HungUp:
            self.close_connection = True
            return None
        except Full:
            self.answer(self.behaviour.full_status, close=True)
            return None
        return bytes(got)

    def _misbehave(self, count: int) -> None:
        behaviour = self.behaviour
        if behaviour.hang_up_after is not None and count >= behaviour.hang_up_after:
            raise HungUp
        if behaviour.full_after is not None and count > behaviour.full_after:
            raise Full
        if behaviour.stall_after is not None and count >= behaviour.stall_after:
            behaviour.stalled.set()
            behaviour.go_on.wait(30)

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            while size := int(self._line() or b"0", 16):
                yield from self._exactly(size)
                self._line()
            self._line()
        else:
            yield from self._exactly(int(self.headers.get("Content-Length", "0")))

    def _line(self) -> bytes:
        line = self.rfile.readline(1000)
        if not line.endswith(b"\n"):
            raise HungUp
        return line.strip()

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read(min(size, self.behaviour.step))
            if not piece:
                raise HungUp
            size -= len(piece)
            yield piece


@contextmanager
def serving(handler: type[UploadHandler], behaviour: Behaviour, **attributes: Any) -> Iterator[str]:
    """Its address while the context is open."""
    made = type("Handler", (handler,), {"behaviour": behaviour, **attributes})
    server = Server(("127.0.0.1", 0), made)
    behaviour.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield behaviour.url
    finally:
        behaviour.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Server(http.server.ThreadingHTTPServer):
    """Whose clients may leave without a word."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what is tested."""


class ShelfHandler(UploadHandler):
    """A plain web server with PUT and DELETE: a file appears with its last byte."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def _read(self) -> None:
        if self.begin():
            data = self.files.get(self.path)
            self.answer(404) if data is None else self.answer(200, data)

    def do_PUT(self) -> None:
        if self.begin():
            data = self.body()
            if data is not None:
                self.files[self.path] = data
                self.answer(201)

    def do_DELETE(self) -> None:
        if self.begin():
            self.answer(404 if self.files.pop(self.path, None) is None else 204)


def counted(pieces: list[Any], seen: Callable[[], None]) -> Iterator[Any]:
    """The pieces, with a call before each."""
    for piece in pieces:
        seen()
        yield piece
