"""The glance store: images of an OpenStack image service, API version 2, through openstacksdk and keystoneauth."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

from compute_worker import errors
from compute_worker.images.glance_upload import GlanceUploads, facts_of
from compute_worker.images.store import CHUNK_BYTES, ImageFacts, Opened

if TYPE_CHECKING:
    from compute_worker.config import Images

TIMEOUT_SECONDS = 20.0


class GlanceStore(GlanceUploads):
    """Images of ``images.glance_cloud`` (an entry of ``clouds.yaml``) or of ``images.glance_url`` without
    authentication. The libraries are imported at the first use, so that other hosts do not pay for them."""

    name: ClassVar[str] = "glance"

    def __init__(self, settings: Images) -> None:
        if not settings.glance_cloud and not settings.glance_url:
            raise ValueError("neither images.glance_cloud nor images.glance_url is set")
        self._settings = settings
        self._local = threading.local()

    def stat(self, image_id: str) -> ImageFacts:
        """Size, hash and format of an active image.

        :raises compute_worker.errors.ImageNotFound: also when it is queued, deleted or deactivated.
        """
        with self._get(image_id, f"/images/{self.check_id(image_id)}", {}) as response:
            try:
                found = response.json()
            except ValueError:
                raise errors.ImageStoreUnavailable(store=self.name, reason="an answer that is not JSON") from None
        if not isinstance(found, dict):
            raise errors.ImageStoreUnavailable(store=self.name, reason="an answer that is not an image")
        if found.get("status") != "active":
            raise errors.ImageNotFound(
                f"image {image_id} in store {self.name} is {str(found.get('status'))[:32]}, not active",
                image=image_id,
                store=self.name,
            )
        return facts_of(found)

    def open(self, image_id: str, offset: int = 0, validator: str | None = None) -> Opened:
        """The image's bytes. A published image never changes, so ``validator`` is its hash and not sent."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._get(image_id, f"/images/{self.check_id(image_id)}/file", headers)
        if response.status_code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            response.close()
            return self.open(image_id)
        partial = response.status_code == http.client.PARTIAL_CONTENT
        if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            response.close()
            raise errors.ImageStoreUnavailable(store=self.name, reason="a range was answered that nobody asked for")
        return Opened(
            offset=offset if partial else 0,
            chunks=self._chunks(response),
            abort=lambda: _abort(response),
            close=response.close,
        )

    def _chunks(self, response: Any) -> Iterator[bytes]:
        import requests

        try:
            yield from response.iter_content(CHUNK_BYTES)
        except (requests.RequestException, OSError, ValueError, AttributeError) as exc:
            # AttributeError: urllib3 reading a response that abort() closed under it.
            raise errors.ImageStoreUnavailable(store=self.name, reason=type(exc).__name__) from None

    def _get(self, image_id: str, path: str, headers: dict[str, str]) -> Any:
        """A streamed answer with a good status; everything else as :meth:`ImageStore.stat` says."""
        from keystoneauth1 import exceptions
        from openstack import exceptions as sdk

        try:
            response = self._image_api().get(
                path, headers={"Accept-Encoding": "identity", **headers}, stream=True, raise_exc=False
            )
        except (exceptions.ClientException, sdk.SDKException) as exc:
            # The library's text may quote addresses and bodies; its class says enough.
            raise errors.ImageStoreUnavailable(store=self.name, reason=type(exc).__name__) from None
        status = response.status_code
        if status in (200, 206, 416):
            return response
        response.close()
        if status in (204, 404, 410):
            raise errors.ImageNotFound(image=image_id, store=self.name)
        if status in (408, 425, 429) or status >= 500:
            raise errors.ImageStoreUnavailable(store=self.name, reason=f"HTTP status {status}")
        raise errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} answers HTTP status {status}")

    def _image_api(self) -> Any:
        """The library's adapter, one a thread: its session is not made for several."""
        if not hasattr(self._local, "api"):
            self._local.api = self._cloud_api() if self._settings.glance_cloud else self._plain_api()
        return self._local.api

    def _cloud_api(self) -> Any:
        import openstack

        connection = openstack.connect(
            cloud=self._settings.glance_cloud, app_name="compute-worker", api_timeout=TIMEOUT_SECONDS
        )
        return connection.image

    def _plain_api(self) -> Any:
        """Without authentication: the address is known, so nothing is discovered."""
        from keystoneauth1 import adapter, noauth, session

        url = self._settings.glance_url.rstrip("/") + "/v2"
        plain = session.Session(auth=noauth.NoAuth(endpoint=url), timeout=TIMEOUT_SECONDS, app_name="compute-worker")
        return adapter.Adapter(plain, endpoint_override=url)


def _abort(response: Any) -> None:
    """Shut the socket down under a reader that waits; it then sees the stream end."""
    import socket

    with suppress(AttributeError, OSError):
        connection = response.raw._connection or response.raw._original_response.fp.raw
        sock = getattr(connection, "sock", None) or connection._sock
        sock.shutdown(socket.SHUT_RDWR)
