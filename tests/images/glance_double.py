"""An image service that behaves as Glance does: records that are queued until their bytes came whole, upload and
import, properties, filters, pages, JSON patches, tokens that end."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.images.uploads import Behaviour, UploadHandler

_NOT_PROPERTIES = {"limit", "sort", "marker", "status", "sort_key", "sort_dir"}
_READ_ONLY = {"status", "owner", "size", "created_at", "updated_at", "checksum", "self", "file", "schema"}


@dataclass
class Glance:
    """What the service has. ``tokens``: those it takes; ``None``: it asks for none."""

    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    staged: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] | None = None
    page: int = 25
    import_looks: int = 2
    """How often an image that is imported is seen as such before it is active."""
    import_fails: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)
    clock: Any = field(default_factory=lambda: itertools.count(1_700_000_000))

    def now(self) -> str:
        return datetime.datetime.fromtimestamp(next(self.clock), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def new(self, record: dict[str, Any]) -> dict[str, Any]:
        made = {
            "status": "queued",
            "size": None,
            "checksum": None,
            "os_hash_algo": None,
            "os_hash_value": None,
            "owner": "project",
            "protected": False,
            "tags": [],
            "created_at": self.now(),
            "schema": "/v2/schemas/image",
            **record,
        }
        self.images[made["id"]] = made
        return made

    def activate(self, image_id: str, data: bytes) -> None:
        self.data[image_id] = data
        self.images[image_id] |= {
            "status": "active",
            "size": len(data),
            "checksum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(data).hexdigest(),
        }


class GlanceHandler(UploadHandler):
    """Version 2 of the image API, as far as a host uses it."""

    glance: Glance
    behaviour: Behaviour

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        if not self.begin():
            return
        tokens = self.glance.tokens
        if tokens is not None and self.headers.get("X-Auth-Token") not in tokens:
            self.answer(401, close=True)
            return
        parts = urlsplit(self.path)
        words = parts.path.strip("/").split("/")
        if words[:2] != ["v2", "images"]:
            self.say(300, {"versions": []})
        elif len(words) == 2:
            self._collection(dict(parse_qsl(parts.query)))
        else:
            self._image(words[2], words[3] if len(words) > 3 else "")

    def say(self, status: int, body: Any) -> None:
        self.answer(status, json.dumps(body).encode(), Content_Type="application/json")

    def _collection(self, query: dict[str, str]) -> None:
        glance = self.glance
        if self.command == "POST":
            record = json.loads(self.body() or b"{}")
            with glance.lock:
                if _READ_ONLY & record.keys():
                    self.say(403, {"message": "read-only"})
                elif record["id"] in glance.images:
                    self.say(409, {"message": "Image ID already exists"})
                else:
                    self.say(201, glance.new(record))
            return
        wanted = {name: value for name, value in query.items() if name not in _NOT_PROPERTIES}
        if "status" in query:
            wanted["status"] = query["status"]
        found = sorted(glance.images.values(), key=lambda image: str(image["created_at"]), reverse=True)
        found = [image for image in found if wanted.items() <= image.items()]
        begin = next((n + 1 for n, image in enumerate(found) if image["id"] == query.get("marker")), 0)
        page = found[begin : begin + min(glance.page, int(query.get("limit", "25")))]
        body: dict[str, Any] = {"images": page, "schema": "/v2/schemas/images"}
        if begin + len(page) < len(found):
            rest = "&".join(f"{k}={v}" for k, v in query.items() if k != "marker")
            body["next"] = f"/v2/images?{rest}&marker={page[-1]['id']}"
        self.say(200, body)

    def _image(self, image_id: str, what: str) -> None:
        glance = self.glance
        record = glance.images.get(image_id)
        if record is None:
            self.answer(404, close=self.command == "PUT")
        elif what in ("file", "stage") and self.command == "PUT":
            self._take(record, what)
        elif what == "file":
            self.answer(200, glance.data[image_id]) if image_id in glance.data else self.answer(204)
        elif what == "import":
            self._import(record)
        elif self.command == "DELETE":
            self._delete(record)
        elif self.command == "PATCH":
            for change in json.loads(self.body() or b"[]"):
                record[change["path"][1:]] = change["value"]
            self.say(200, record)
        else:
            self._look(record)
            self.say(200, record)

    def _take(self, record: dict[str, Any], what: str) -> None:
        if record["status"] != "queued":
            self.answer(409, close=True)
            return
        record["status"] = "saving" if what == "file" else "uploading"
        data = self.body()
        if data is None:
            record["status"] = "queued"
        elif what == "file":
            self.glance.activate(record["id"], data)
            self.answer(204)
        else:
            self.glance.staged[record["id"]] = data
            self.answer(204)

    def _import(self, record: dict[str, Any]) -> None:
        asked = json.loads(self.body() or b"{}")
        if record["status"] != "uploading" or asked["method"]["name"] != "glance-direct":
            self.answer(409)
            return
        record["status"], record["looks"] = "importing", self.glance.import_looks
        self.answer(202)

    def _look(self, record: dict[str, Any]) -> None:
        if record["status"] != "importing":
            return
        record["looks"] -= 1
        if record["looks"] <= 0:
            del record["looks"]
            data = self.glance.staged.pop(record["id"])
            if self.glance.import_fails:
                record |= {"status": "queued", "os_glance_failed_import": "file"}
            else:
                self.glance.activate(record["id"], data)

    def _delete(self, record: dict[str, Any]) -> None:
        if record["protected"]:
            self.answer(403)
            return
        for kept in (self.glance.images, self.glance.data, self.glance.staged):
            kept.pop(record["id"], None)
        self.answer(204)


class KeystoneHandler(UploadHandler):
    """Version 3 of the identity API: a password for a token, and where the image service is."""

    glance: Glance
    issued: list[str]
    image_url: str
    lifetime: list[float]

    def do_GET(self) -> None:
        if self.begin():
            url = f"{self.behaviour.url}/v3/"
            version = {"id": "v3.14", "status": "stable", "links": [{"rel": "self", "href": url}], "media-types": []}
            body = {"version": version} if self.path.startswith("/v3") else {"versions": {"values": [version]}}
            self.answer(200, json.dumps(body).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        if not self.begin():
            return
        asked = json.loads(self.body() or b"{}")
        if asked["auth"]["identity"]["password"]["user"]["password"] != "secret-of-the-test":
            self.answer(401)
            return
        token = f"token-{len(self.issued)}"
        self.issued.append(token)
        assert self.glance.tokens is not None
        self.glance.tokens.add(token)
        now = datetime.datetime.now(datetime.UTC)
        stamp = "%Y-%m-%dT%H:%M:%S.%fZ"
        endpoint = {"id": "e", "interface": "public", "region": "r", "region_id": "r", "url": self.image_url}
        body = {
            "token": {
                "methods": ["password"],
                "user": {"id": "u", "name": "u", "domain": {"id": "default", "name": "Default"}},
                "project": {"id": "project", "name": "p", "domain": {"id": "default", "name": "Default"}},
                "issued_at": now.strftime(stamp),
                "expires_at": (now + datetime.timedelta(seconds=self.lifetime[0])).strftime(stamp),
                "roles": [],
                "catalog": [{"type": "image", "name": "glance", "id": "i", "endpoints": [endpoint]}],
            }
        }
        self.answer(201, json.dumps(body).encode(), Content_Type="application/json", X_Subject_Token=token)
