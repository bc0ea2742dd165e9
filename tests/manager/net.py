"""Messages between machines under test: JSON as on the wire, in the caller's thread, and what can befall them."""

from __future__ import annotations

import dataclasses
import json
import threading
import uuid
from collections.abc import Callable
from typing import Any

from compute_worker import errors, objects
from compute_worker.messages import Context, MessageKind, messages_of
from compute_worker.operations.database import Closed
from compute_worker.virt.simulated.connection import Died


class Death(BaseException):
    """The simulated end of a worker."""


@dataclasses.dataclass
class Mishap:
    """What befalls the next ``times`` messages of one name.

    ``lose``: it never arrives. ``mute``: it is served, its answer is lost. ``twice``: it is served twice. ``late``: it
    is lost, and served all the same when :meth:`Net.deliver_late` is called.
    """

    what: str
    times: int = 1


class Net:
    """Machines by name. ``cut``: names that nobody reaches."""

    def __init__(self) -> None:
        self.machines: dict[str, Any] = {}
        self.cut: set[str] = set()
        self.mishaps: dict[str, Mishap] = {}
        self.sent: list[tuple[str, str, str]] = []
        self.before: Callable[[str, str, str], None] | None = None
        self._late: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def peers_of(self, name: str) -> Any:
        """What the worker of a machine is given."""
        return _Peers(self, name)

    def deliver_late(self) -> None:
        """Serve what was held up; refusals are what may be expected of it."""
        late, self._late = self._late, []
        for serve in late:
            try:
                serve()
            except errors.ComputeError:
                continue

    def send(self, source: str, host: str, method: str, args: tuple, options: dict[str, Any]) -> Any:
        """One message and its answer."""
        with self._lock:
            self.sent.append((source, host, method))
            mishap = self.mishaps.get(method)
            what = ""
            if mishap is not None and mishap.times:
                mishap.times -= 1
                what = mishap.what
        if host not in self.machines:
            raise errors.MessageUndeliverable(host=host)
        context = Context(request_id="req-net", message_id=str(uuid.uuid4()))
        if what == "late":
            self._late.append(lambda: self._serve(host, method, context, args, options))
        if what in ("lose", "late") or {source, host} & self.cut:
            raise errors.PeerUnavailable(host=host)
        answer = self._serve(host, method, context, args, options)
        if what == "twice":
            answer = self._serve(host, method, context, args, options)
        if what == "mute" or {source, host} & self.cut:
            raise errors.PeerUnavailable(host=host)
        return answer

    def _serve(self, host: str, method: str, context: Context, args: tuple, options: dict[str, Any]) -> Any:
        machine = self.machines[host]
        if machine.dead.is_set():
            raise errors.PeerUnavailable(host=host)
        try:
            for endpoint in machine.worker.endpoints:
                for message, serve in messages_of(endpoint):
                    if message.name == method:
                        return self._call(message, serve, context, args, options)
        except (Closed, Death, Died) as exc:
            # It is the other worker that died: for the caller it does not answer.
            raise errors.PeerUnavailable(host=host) from exc
        raise errors.UnknownMethod(method=method)

    @staticmethod
    def _call(message: Any, serve: Callable[..., Any], context: Context, args: tuple, options: dict[str, Any]) -> Any:
        given = dict(zip(message.arguments, args, strict=False)) | options
        if message.kind is MessageKind.COMMAND:
            given.setdefault("operation", str(uuid.uuid4()))
        wire = json.loads(json.dumps({name: objects.encode(value) for name, value in given.items()}))
        decoded = {name: objects.decode(value, message.arguments[name], name) for name, value in wire.items()}
        answer = serve(context, **decoded)
        if message.returns in (None, type(None)):
            return None
        return objects.decode(json.loads(json.dumps(objects.encode(answer))), message.returns, message.name)


class _Peers:
    def __init__(self, net: Net, name: str) -> None:
        self._net = net
        self._name = name

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def send(*args: Any, host: str, **options: Any) -> Any:
            return self._net.send(self._name, host, method, args, options)

        return send
