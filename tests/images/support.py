"""A job that can be cancelled and remembers, a web server that can fail, and images good and bad."""

from __future__ import annotations

import hashlib
import http.server
import json
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compute_worker import errors


class Job:
    """Records what it is told; `cancel()` from any thread, or by `cancel_after(n)` reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, int | None, int | None]] = []
        self.reasons: list[str] = []
        self.cancelled = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._cancel_at = 0

    def cancel_after(self, reports: int) -> Job:
        self._cancel_at = reports
        return self

    def cancel(self) -> None:
        with self._lock:
            self.cancelled.set()
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    def report(
        self, phase: str, done_bytes: int | None = None, total_bytes: int | None = None, **detail: float | int | str
    ) -> None:
        self.reports.append((phase, done_bytes, total_bytes))
        if len(self.reports) == self._cancel_at:
            self.cancel()

    def check(self) -> None:
        if self.cancelled.is_set():
            raise errors.Cancelled

    @contextmanager
    def on_cancel(self, callback: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            self._callbacks.append(callback)
            late = self.cancelled.is_set()
        if late:
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)

    def wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        end = time.monotonic() + timeout
        while not condition():
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.cancelled.wait(min(left, 0.05))
            self.check()
        return True

    def wake(self) -> None:
        """Looks soon anyway."""

    def explain(self, reason: str) -> None:
        self.reasons.append(reason)


@dataclass
class Site:
    """What a `web_server` serves, and how badly. Requests are (method, path, headers)."""

    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    etag: str | None = None
    ranges: bool = True
    cut: list[int] = field(default_factory=list)
    """For each GET in turn: after how many bytes the connection is closed; empty: never."""
    stall: threading.Event | None = None
    """When set to an event: a GET sends half and waits for it."""
    statuses: list[int] = field(default_factory=list)
    """Statuses given to the next requests instead of an answer."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    sent: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> list[dict[str, str]]:
        return [headers for method, _, headers in self.requests if method == "GET"]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        site = self.site
        site.requests.append((self.command, self.path, dict(self.headers)))
        if site.statuses:
            self._send(site.statuses.pop(0), {}, b"")
        elif self.path in site.answers:
            self._send(*site.answers[self.path], body=body)
        elif self.path in site.files:
            self._file(site.files[self.path], body)
        else:
            self._send(404, {}, b"", body=body)

    def _file(self, data: bytes, body: bool) -> None:
        site, begin, status, headers = self.site, 0, 200, {}
        wanted = self.headers.get("Range")
        fresh = self.headers.get("If-Range") in (None, site.etag)
        if wanted and site.ranges and fresh:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(data):
                self._send(416, {}, b"")
                return
            status = 206
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if site.etag:
            headers["ETag"] = site.etag
        self._send(status, headers, data[begin:], body)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if self.command == "GET" and status < 300 and self.site.cut:
            data = data[: self.site.cut.pop(0)]
            self.close_connection = True
        if self.command == "GET" and self.site.stall is not None:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.site.sent.set()
            self.site.stall.wait(30)
            self.close_connection = True
            return
        self.wfile.write(data)


@contextmanager
def web_server(site: Site, wrap: Callable[[Any], Any] = lambda sock: sock) -> Iterator[Site]:
    handler = type("Handler", (_Handler,), {"site": site})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.socket = wrap(server.socket)
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        if site.stall is not None:
            site.stall.set()
        server.shutdown()
        server.server_close()
        thread.join()


def glance_image(site: Site, image_id: str, data: bytes, **fields: Any) -> None:
    """Put an image into a fake image service, as its version 2 shows it."""
    record = {
        "id": image_id,
        "status": "active",
        "size": len(data),
        "disk_format": "raw",
        "container_format": "bare",
        "os_hash_algo": "sha512",
        "os_hash_value": hashlib.sha512(data).hexdigest(),
        "visibility": "public",
        **fields,
    }
    site.answers[f"/v2/images/{image_id}"] = (
        200,
        {"Content-Type": "application/json"},
        json.dumps(record).encode(),
    )
    site.files[f"/v2/images/{image_id}/file"] = data


def qemu_img(*words: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def qcow2(path: Path, size_mb: int = 8, content: bytes = b"", **options: str) -> Path:
    """A qcow2 of `size_mb` MiB beginning with `content`."""
    raw = path.with_suffix(".rawsource")
    raw.write_bytes(content)
    with open(raw, "r+b") as out:
        out.truncate(size_mb << 20)
    compress = ["-c"] if options.pop("compress", "") else []
    extra = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    qemu_img("convert", *compress, "-f", "raw", "-O", "qcow2", *extra, raw, path)
    raw.unlink()
    return path


def qcow2_header(
    *, size: int, version: int = 3, backing: bytes = b"", crypt: int = 0, incompatible: int = 0, l1_size: int = 1
) -> bytes:
    """The first 512 bytes of a qcow2, whatever they claim."""
    offset = 400 if backing else 0
    head = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, offset, len(backing), 16, size, crypt, l1_size, 196_608, 65_536, 1, 0, 0
    )
    head += struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
    return head.ljust(400, b"\0") + backing.ljust(112, b"\0")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
