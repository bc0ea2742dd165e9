"""``/metrics`` and ``/healthz`` over HTTP, on a port of their own: for Prometheus and for whoever asks how it is.

Reads only, knows no secret, and holds at most a few connections: a scraper that hangs cannot take the worker's threads.
"""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from compute_worker.errors import Broken

LOG = logging.getLogger(__name__)

MOST_CONNECTIONS = 8
PATIENCE = 10.0
"""Seconds a client may be silent."""

Check = Callable[[], str | None]
"""Why something is wrong, or ``None``. Answers at once: what it tells was found out before."""
Redact = Callable[[str], str]


class Health:
    """What ``/healthz`` says.

    :param checks: by name, e.g. ``broker``, ``hypervisor``, ``journal``. One that raises is wrong, with the exception
        as reason.
    :param redact: applied to every reason.
    """

    def __init__(self, host: str, checks: Mapping[str, Check], redact: Redact) -> None:
        self._host = host
        self._checks = checks
        self._redact = redact

    def report(self) -> tuple[bool, dict[str, Any]]:
        """Whether all is well, and the JSON body: ``status``, ``host``, ``checks`` (``ok`` and ``reason`` each)."""
        found = {name: self._ask(check) for name, check in self._checks.items()}
        well = all(reason is None for reason in found.values())
        checks = {
            name: {"ok": True} if reason is None else {"ok": False, "reason": reason}
            for name, reason in found.items()
        }
        return well, {"status": "ok" if well else "failing", "host": self._host, "time": time.time(), "checks": checks}

    def _ask(self, check: Check) -> str | None:
        try:
            reason = check()
        except Exception as exc:
            reason = f"{type(exc).__name__}: {exc}"
        return None if reason is None else self._redact(reason)


class Endpoint:
    """The server.

    :param address: name or address to listen on, IPv4 or IPv6.
    :param port: 0: any free one, see :attr:`port`.
    :param metrics: the body of ``/metrics`` and its content type; ``None``: there is no such page.
    """

    def __init__(
        self, address: str, port: int, health: Health, metrics: Callable[[], tuple[bytes, str]] | None
    ) -> None:
        pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {"/healthz": lambda: _health_page(health)}
        if metrics is not None:
            read = metrics
            pages["/metrics"] = lambda: _metrics_page(read)
        try:
            self._server = _Server(address, port, pages)
        except OSError as exc:
            raise Broken(
                f"cannot listen on {address} port {port} for metrics ({exc}): change [telemetry] listen or port"
            ) from exc
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.5,), name="metrics", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer. Until then clients wait."""
        self._thread.start()

    def stop(self) -> None:
        """End within a second."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join(5)
        self._server.server_close()


def _health_page(health: Health) -> tuple[int, str, bytes]:
    well, body = health.report()
    return 200 if well else 503, "application/json", json.dumps(body).encode() + b"\n"


def _metrics_page(metrics: Callable[[], tuple[bytes, str]]) -> tuple[int, str, bytes]:
    body, content_type = metrics()
    return 200, content_type, body


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, port: int, pages: Mapping[str, Callable[[], tuple[int, str, bytes]]]) -> None:
        self.pages = pages
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        super().__init__((str(where[0]), port), _Handler)

    def server_bind(self) -> None:
        """Without the look-up of the host's name that http.server does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, if there is one left."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Give the place back afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's concern."""
        LOG.debug("metrics client %s", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: _Server
    server_version = "compute-worker"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one of the pages."""
        page = self.server.pages.get(self.path.split("?", 1)[0])
        if page is None:
            status, content_type, body = 404, "text/plain", b"there is /healthz, and /metrics where metrics are on\n"
        else:
            try:
                status, content_type, body = page()
            except Exception:
                LOG.exception("cannot answer %s", self.path)
                status, content_type, body = 500, "text/plain", b"see the worker's log\n"
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's word
        """One line at debug level."""
        LOG.debug("metrics: " + format, *args)
