"""How the glance store takes images: created, sent by upload or by import, listed, deleted; image API version 2.

Small requests go through openstacksdk and keystoneauth, which renew an expired token and ask again; the bytes go in
one PUT of our own, since a library that repeats a request would repeat it with what is left of a stream.
"""

from __future__ import annotations

import abc
import datetime
import http.client
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import tenacity

from compute_worker import errors, objects
from compute_worker.images import put
from compute_worker.images.store import ORIGIN, ImageFacts, ImageStore, Piece
from compute_worker.objects import ImageMeta, StoredImage

if TYPE_CHECKING:
    from compute_worker.config import Images
    from compute_worker.virt.driver import Job

UPLOAD_TIMEOUT_SECONDS = 60.0
"""Longest silence of the service in the middle of an upload, or at its end while it writes to its own store."""
ATTEMPTS = 3
_PATCH = "application/openstack-images-v2.1-json-patch"
_ALGORITHMS = ("sha256", "sha512")
_OURS = ("os_type", "kernel_id", "ramdisk_id")
"""What we keep in fields of our own and the service among its properties."""
_BASE = frozenset(
    (
        *("id", "name", "status", "visibility", "protected", "checksum", "owner", "size", "virtual_size", "tags"),
        *("container_format", "disk_format", "created_at", "updated_at", "self", "file", "schema", "min_disk"),
        *("min_ram", "os_hash_algo", "os_hash_value", "os_hidden", "direct_url", "locations", "stores"),
    )
)


class GlanceUploads(ImageStore):
    """The writing half of the store."""

    lists: ClassVar[bool] = True
    _settings: Images

    @abc.abstractmethod
    def _image_api(self) -> Any: ...

    def create(self, image: ImageMeta) -> None:
        """Create the record. One that waits for its bytes already, made by whoever asked for the snapshot, is taken."""
        status, _ = self._call("POST", "/images", image.id, json=_record(image), allow=(409,))
        if status != http.client.CONFLICT:
            return
        found = self._find(image.id)
        if found is None or found.get(ORIGIN) == image.properties.get(ORIGIN):
            return
        if found.get("status") != "queued" or found.get(ORIGIN) is not None:
            raise errors.ImageUnacceptable(image=image.id, reason=f"store {self.name} has one of this id already")
        self._describe(image, found)

    def write(
        self, image_id: str, pieces: Iterable[Piece], size_bytes: int | None = None, job: Job | None = None
    ) -> ImageFacts:
        """Upload, which makes the image active (it is private), or stage for an import (``images.glance_import``)."""
        found = self._find(image_id)
        if found is None:
            raise errors.ImageNotFound(image=image_id, store=self.name)
        if found.get("status") == "active":
            # The answer to an upload was lost; the service activates nothing that did not come whole.
            return facts_of(found)
        what = "stage" if self._settings.glance_import else "file"
        connection, target = self._connect(f"/images/{self.check_id(image_id)}/{what}")
        goal = put.Goal(connection, target, self._token(), self.name, image_id, self._put_refused)
        size, checksum = put.put(goal, pieces, size_bytes, job)
        return ImageFacts(size_bytes=size, checksum_algorithm="sha256", checksum=checksum)

    def publish(self, image_id: str) -> ImageFacts:
        """See that it is active; begin the import where it was staged.

        :raises compute_worker.errors.ImageImporting: the service is still at it.
        """
        found = self._find(image_id)
        if found is None:
            raise errors.ImageNotFound(image=image_id, store=self.name)
        status = found.get("status")
        if status == "active":
            return facts_of(found)
        if failed := found.get("os_glance_failed_import"):
            raise errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} could not import it: {failed}")
        if status == "uploading":
            method = {"method": {"name": "glance-direct"}}
            self._call("POST", f"/images/{image_id}/import", image_id, json=method, allow=(409,))
        elif status not in ("importing", "saving"):
            raise errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} says it is {str(status)[:32]}")
        raise errors.ImageImporting(image=image_id, store=self.name)

    def withdraw(self, image: ImageMeta) -> None:
        """Delete it, whatever it has become, where it is this operation's."""
        found = self._find(image.id)
        if found is not None and found.get(ORIGIN) == image.properties.get(ORIGIN):
            self.delete(image.id)

    def delete(self, image_id: str) -> None:
        """Delete it. Of an image that is protected the service says no, and so do we."""
        with suppress(errors.ImageNotFound):
            self._call("DELETE", f"/images/{self.check_id(image_id)}", image_id)

    def list_images(self, properties: Mapping[str, str], limit: int = 1000) -> list[StoredImage]:
        """Active images, by the service's own order; those that no :class:`ImageMeta` can describe are left out."""
        query = {"limit": str(limit), "sort": "created_at:desc", "status": "active", **properties}
        path: str | None = "/images"
        found: list[StoredImage] = []
        while path and len(found) < limit:
            _, page = self._call("GET", path, "", params=query)
            found += _listed(page.get("images") or [], properties)
            path, query = str(page.get("next") or "").removeprefix("/v2") or None, {}
        return found[:limit]

    # --- requests -----------------------------------------------------------------------------------------------

    def _describe(self, image: ImageMeta, found: Mapping[str, Any]) -> None:
        wanted = {name: value for name, value in _record(image).items() if name not in ("id", "visibility", "name")}
        patch = [
            {"op": "replace" if name in found else "add", "path": "/" + _pointer(name), "value": value}
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        self._call("PATCH", f"/images/{image.id}", image.id, json=patch, headers={"Content-Type": _PATCH})

    def _find(self, image_id: str) -> dict[str, Any] | None:
        try:
            return self._call("GET", f"/images/{self.check_id(image_id)}", image_id)[1]
        except errors.ImageNotFound:
            return None

    def _facts_of(self, found: Mapping[str, Any]) -> ImageFacts:
            return facts_of(found)

    def _call(
        self,
        method: str,
        path: str,
        image_id: str,
        *,
        allow: tuple[int, ...] = (),
        headers: Mapping[str, str] | None = None,
        **request: Any,
    ) -> tuple[int, dict[str, Any]]:
        """One small request, asked again where the service does not answer; status and decoded body."""
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(errors.ImageStoreUnavailable),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=2),
            reraise=True,
        )
        return again(self._call_once, method, path, image_id, allow, dict(headers or {}), request)

    def _call_once(
        self,
        method: str,
        path: str,
        image_id: str,
        allow: tuple[int, ...],
        headers: dict[str, str],
        request: dict[str, Any],
    ) -> tuple[int, dict[str, Any]]:
        from keystoneauth1 import exceptions
        from openstack import exceptions as sdk

        try:
            response = self._image_api().request(path, method, headers=headers, raise_exc=False, **request)
        except (exceptions.ClientException, sdk.SDKException) as exc:
            # The library's text may quote addresses and bodies; its class says enough.
            raise errors.ImageStoreUnavailable(store=self.name, reason=type(exc).__name__) from None
        status = int(response.status_code)
        if not (200 <= status < 300 or status in allow):
            raise self._refused(status, image_id)
        try:
            found = response.json() if response.content and status != http.client.CONFLICT else {}
        except ValueError:
            raise errors.ImageStoreUnavailable(store=self.name, reason="an answer that is not JSON") from None
        if not isinstance(found, dict):
            raise errors.ImageStoreUnavailable(store=self.name, reason="an answer that is not an object")
        return status, found

    def _put_refused(self, status: int, image_id: str) -> errors.ComputeError:
        if status == http.client.UNAUTHORIZED:
            # It was good a moment ago: the next attempt gets another.
            api = self._image_api()
            api.session.invalidate(api.auth)
            return errors.ImageStoreUnavailable(store=self.name, reason="the token is not valid any more")
        if status == http.client.CONFLICT:
            return errors.ImageStoreUnavailable(store=self.name, reason="an earlier upload has not ended yet")
        return self._refused(status, image_id)

    def _refused(self, status: int, image_id: str) -> errors.ComputeError:
        if status in (404, 410):
            return errors.ImageNotFound(image=image_id, store=self.name)
        if status in (413, 507):
            return errors.DiskFull(path=f"image store {self.name}", image=image_id)
        if status in (401, 408, 425, 429) or status >= 500:
            return errors.ImageStoreUnavailable(store=self.name, reason=f"HTTP status {status}")
        return errors.ImageUnacceptable(image=image_id, reason=f"store {self.name} answers HTTP status {status}")

    def _token(self) -> dict[str, str]:
        api = self._image_api()
        return dict(api.session.get_auth_headers(api.auth or api.session.auth) or {})

    def _connect(self, path: str) -> tuple[http.client.HTTPConnection, str]:
        api = self._image_api()
        base = str(api.get_endpoint() or "").rstrip("/")
        parts = urlsplit((base if base.endswith("/v2") else base + "/v2") + path)
        host = parts.hostname or ""
        if parts.scheme == "https":
            secure = http.client.HTTPSConnection(
                host, parts.port, timeout=UPLOAD_TIMEOUT_SECONDS, context=_tls(api.session)
            )
            return secure, parts.path
        return http.client.HTTPConnection(host, parts.port, timeout=UPLOAD_TIMEOUT_SECONDS), parts.path


def facts_of(found: Mapping[str, Any]) -> ImageFacts:
    """What the service's record says of an image."""
    algorithm, value, size = found.get("os_hash_algo"), found.get("os_hash_value"), found.get("size")
    known = algorithm in _ALGORITHMS and isinstance(value, str) and bool(value)
    return ImageFacts(
        size_bytes=size if isinstance(size, int) else None,
        checksum_algorithm=algorithm if known else None,
        checksum=str(value).lower() if known else None,
        disk_format=found.get("disk_format") or None,
        validator=str(value) if known else None,
    )


def _tls(session: Any) -> ssl.SSLContext:
    """As the library's session checks and shows certificates."""
    verify, cert = session.verify, session.cert
    context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
    if verify is False:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if cert:
        context.load_cert_chain(*((cert, None) if isinstance(cert, str) else cert))
    return context


def _record(image: ImageMeta) -> dict[str, Any]:
    extra = {name: getattr(image, name) for name in _OURS if getattr(image, name) is not None}
    return {
        **{name: value for name, value in image.properties.items() if name not in _BASE},
        **extra,
        "id": image.id,
        "name": image.name,
        "disk_format": image.disk_format,
        "container_format": "bare",
        "min_disk": image.min_disk_gb,
        "min_ram": image.min_ram_mb,
        "visibility": "private",
    }


def _listed(records: list[Any], properties: Mapping[str, str]) -> Iterator[StoredImage]:
    for record in records:
        with suppress(errors.InvalidCommand, ValueError, TypeError, AttributeError, KeyError):
            image = _image(record)
            if properties.items() <= image.properties.items():
                created = datetime.datetime.fromisoformat(str(record["created_at"]))
                yield StoredImage(image=image, created_at=created.timestamp())


def _image(record: Mapping[str, Any]) -> ImageMeta:
    """:raises InvalidCommand: something in it is nothing that an image here can have."""
    facts = facts_of(record)
    properties = {
        name: value
        for name, value in record.items()
        if isinstance(value, str) and name not in _BASE and name not in _OURS
    }
    raw = {
        "id": record["id"],
        "store": "glance",
        "name": record.get("name") or "",
        "disk_format": record.get("disk_format"),
        "size_bytes": facts.size_bytes,
        "checksum_algorithm": facts.checksum_algorithm,
        "checksum": facts.checksum,
        "min_disk_gb": record.get("min_disk") or 0,
        "min_ram_mb": record.get("min_ram") or 0,
        "properties": properties,
        **{name: record[name] for name in _OURS if record.get(name)},
    }
    image: ImageMeta = objects.decode(raw, ImageMeta, "an image of the service")
    return image


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
