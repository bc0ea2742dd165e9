"""The http store: ``<images.http_url>/<id>`` by GET, and by PUT where the server takes it, over http or https."""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urljoin, urlsplit

from compute_worker import errors
from compute_worker.images.http_upload import Answer, HttpUploads
from compute_worker.images.put import reason_of
from compute_worker.images.store import CHUNK_BYTES, ImageFacts, Opened

if TYPE_CHECKING:
    from compute_worker.config import Images

TIMEOUT_SECONDS = 20.0
"""Longest silence of the server that is waited for."""
MAX_REDIRECTS = 3
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)\Z")
_GOOD = frozenset({200, 201, 202, 204, 206, 416})
_BROKEN = (OSError, http.client.HTTPException)


class HttpStore(HttpUploads):
    """Images of a web server. Redirects are followed within the same scheme, host and port only: a server that we
    trust must not send us to one that it alone can reach. Proxies of the environment are not used."""

    name: ClassVar[str] = "http"

    def __init__(self, settings: Images) -> None:
        parts = urlsplit(settings.http_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("images.http_url is not an http or https address")
        if parts.username or parts.password:
            raise ValueError("images.http_url must not carry credentials")
        self._base = settings.http_url.rstrip("/") + "/"
        self._origin = (parts.scheme, parts.hostname, parts.port)
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context(cafile=settings.http_ca_file or None)

    def stat(self, image_id: str) -> ImageFacts:
        """Size and ETag, by HEAD."""
        answer = self._request("HEAD", image_id, {})
        try:
            return self._facts(image_id, answer.response)
        finally:
            answer.close()

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        """By GET, with Range (and If-Range where there is a validator) when ``offset`` is not 0."""
        headers: dict[str, str] = {}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator is not None:
                headers["If-Range"] = validator
        answer = self._request("GET", image_id, headers)
        begins = 0
        if answer.response.status == http.client.PARTIAL_CONTENT:
            match = _CONTENT_RANGE.match(answer.response.getheader("Content-Range", ""))
            if match is None or int(match[1]) != offset:
                answer.close()
                raise errors.ImageStoreUnavailable(store=self.name, reason="a range was answered that nobody asked for")
            begins = offset
        elif answer.response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            answer.close()
            return self.open(image_id)
        return Opened(offset=begins, chunks=self._chunks(answer.response.read1), abort=answer.abort, close=answer.close)

    def _chunks(self, read: Callable[[int], bytes]) -> Iterator[bytes]:
        try:
            while chunk := read(CHUNK_BYTES):
                yield chunk
        except (*_BROKEN, ValueError) as exc:
            raise errors.ImageStoreUnavailable(store=self.name, reason=reason_of(exc)) from None

    def _facts(self, image_id: str, response: http.client.HTTPResponse) -> ImageFacts:
        length = response.getheader("Content-Length", "")
        etag = response.getheader("ETag")
        # A weak ETag does not promise the same bytes: no resuming by it.
        strong = etag if etag and etag.startswith('"') else None
        return ImageFacts(size_bytes=int(length) if length.isdecimal() else None, validator=strong)

    def _request(self, method: str, image_id: str, headers: dict[str, str]) -> Answer:
        """The answer to a request, its status a good one.

        Raises as :meth:`ImageStore.stat` says.
        """
        url = self._base + self.check_id(image_id)
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._send(method, url, headers)
            status = answer.response.status
            if status in (301, 302, 303, 307, 308):
                url = urljoin(url, answer.response.getheader("Location", ""))
                answer.close()
                target = urlsplit(url)
                if (target.scheme, target.hostname, target.port) != self._origin:
                    raise errors.ImageUnacceptable(
                        image=image_id, reason=f"store {self.name} redirects to another server, which is not followed"
                    )
                continue
            if status in _GOOD:
                if answer.response.getheader("Content-Encoding", "identity") != "identity":
                    answer.close()
                    raise errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} compresses its answers")
                return answer
            answer.close()
            raise self._error(status, image_id)
        raise errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} redirects in circles")

    def _error(self, status: int, image_id: str) -> errors.ComputeError:
        if status in (413, 507):
            return errors.DiskFull(path=f"image store {self.name}", image=image_id)
        if status in (404, 410):
            return errors.ImageNotFound(image=image_id, store=self.name)
        if status in (408, 425, 429) or status >= 500:
            return errors.ImageStoreUnavailable(store=self.name, reason=f"HTTP status {status}")
        return errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} answers HTTP status {status}")

    def _connect(self, url: str) -> tuple[http.client.HTTPConnection, str]:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if self._tls is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=TIMEOUT_SECONDS, context=self._tls
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_SECONDS)
        return connection, parts.path + (f"?{parts.query}" if parts.query else "")

    def _send(self, method: str, url: str, headers: dict[str, str]) -> Answer:
        connection, target = self._connect(url)
        try:
            connection.request(method, target, headers={"Accept-Encoding": "identity", **headers})
            return Answer(connection, connection.getresponse())
        except _BROKEN as exc:
            connection.close()
            raise errors.ImageStoreUnavailable(store=self.name, reason=reason_of(exc)) from None
