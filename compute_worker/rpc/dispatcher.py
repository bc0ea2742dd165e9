"""From a message to the endpoint method that answers it, with typed arguments or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from oslo_messaging import Target
from oslo_messaging.rpc.dispatcher import ExplicitRPCAccessPolicy, RPCDispatcher

from compute_worker import errors, objects
from compute_worker.messages import Context
from compute_worker.rpc import wire


@dataclass
class Request:
    """What :class:`oslo_messaging.rpc.dispatcher.RPCDispatcher` reads of an incoming message."""

    message: dict[str, Any]
    ctxt: Context
    client_timeout: int | None
    heartbeat: Callable[[], None]


def _silent() -> None:
    """Nobody waits for a cast, so nobody is told that it is still running."""


class Dispatcher(RPCDispatcher):  # type: ignore[misc]  # oslo.messaging has no annotations
    """Calls ``endpoint.method(context, **typed arguments)`` for methods that are exposed on purpose.

    A long call keeps telling its caller that it is running (oslo.messaging's call monitor).
    """

    def __init__(self, endpoints: Iterable[object], max_message_bytes: int) -> None:
        listed = list(endpoints)
        super().__init__(listed, None, ExplicitRPCAccessPolicy)
        self._default_target = Target(version=objects.RPC_VERSION)
        self._max_message_bytes = max_message_bytes
        self.catalogue = wire.Catalogue(listed)

    def perform(
        self,
        raw: Mapping[str, Any],
        context: Context,
        client_timeout: int | None = None,
        heartbeat: Callable[[], None] = _silent,
    ) -> Any:
        """Decode ``raw``, call its method, and answer the result as JSON can hold it.

        :raises compute_worker.errors.InvalidCommand: also UnknownMethod, MessageTooLarge; nothing was called.
        :raises compute_worker.errors.NotSupported: another version of the messages; nothing was called.
        :raises Exception: what the method raised.
        """
        if wire.SIZE in raw:
            raise errors.MessageTooLarge(
                method=raw.get("method"), size=raw[wire.SIZE], limit=self._max_message_bytes
            )
        # Before oslo.messaging starts the monitor of the call: it would not stop it for an unknown method.
        message = self.catalogue.find(raw)
        arguments = wire.decode_arguments(message, raw.get("args", {}))
        request = Request({**raw, "args": arguments}, context, client_timeout, heartbeat)
        return objects.encode(self.dispatch(request))

    def too_large(self, size: int) -> bool:
        """Whether a message of ``size`` bytes is refused."""
        return size > self._max_message_bytes
