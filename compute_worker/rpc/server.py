"""The worker's end of the queue: takes commands and queries, answers them, and never exits because of the broker.

A call is durable once it is answered. A cast is durable once the broker has confirmed it: it is in the broker's queue,
then in the inbox, and leaves the inbox when the endpoint has accepted or refused it. What the inbox holds at start is
done first. Commands for one instance are handled in the order they came.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from oslo_messaging import _tracing

from compute_worker import errors, logcontext
from compute_worker.config import Rpc
from compute_worker.messages import Context, Inbox
from compute_worker.rpc import transport as transports
from compute_worker.rpc import wire
from compute_worker.rpc.dispatcher import Dispatcher
from compute_worker.rpc.lanes import Lanes
from compute_worker.rpc.listener import AcceptingListener
from compute_worker.rpc.replies import Replies

LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RECONNECT_SECONDS = (0.5, 1.0, 2.0, 5.0)
RETRY_SECONDS = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Pauses before a cast that could not be accepted is tried again; the last one repeats."""
INTERNAL_ATTEMPTS = 6
"""Times a cast is tried that ends in an unexpected error; then it is refused, or it would hold up its instance."""
BACKLOG_LIMIT = 512
BACKLOG_SECONDS = 5.0

OnRefused = Callable[[Context, str, Any, errors.ComputeError], None]
"""Told of every cast that ends in an error: context, method, arguments without secrets, error."""


@dataclass
class _Cast:
    """A cast on its way to its endpoint."""

    message_id: str
    raw: dict[str, Any]
    kept: bool
    attempts: int = 0
    handled: bool = False


class WorkerServer:
    """Listens as ``<topic>.<host>`` and to what is sent to every host, and hands messages to ``endpoints``.

    :param transport: from :func:`compute_worker.rpc.transport.get_transport`.
    :param endpoints: objects whose methods are marked by :mod:`compute_worker.messages`.
    :param inbox: where casts are kept until they are accepted or refused.
    :param on_refused: records a cast that ended in an error, durably; called again when it raises.
    """

    def __init__(
        self, transport: Any, host: str, endpoints: Iterable[object], inbox: Inbox, on_refused: OnRefused, rpc: Rpc
    ) -> None:
        self._transport = transport
        self._host = host
        self._inbox = inbox
        self._on_refused = on_refused
        self._rpc = rpc
        self._dispatcher = Dispatcher(endpoints, rpc.max_message_bytes)
        self._commands = Lanes(rpc.threads, "rpc-command")
        self._queries = Lanes(rpc.max_waiting_queries + rpc.threads, "rpc-query")
        self._replies = Replies(transport, rpc.threads)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._listener: AcceptingListener | None = None
        self._problem: str | None = "not started"

    def start(self) -> None:
        """Take up what the inbox holds, then listen. Returns at once; a broker that is down is waited for.

        :raises RuntimeError: it was started before; a server that was stopped is not started again.
        """
        if self._thread is not None:
            raise RuntimeError("the server was started before")
        durable, reason = transports.durability(self._transport)
        LOG.log(logging.INFO if durable else logging.WARNING, "commands are %s: %s",
                "durable" if durable else "NOT durable", reason)
        if problem := transports.tls_problem(self._transport):
            LOG.warning("TLS to the broker is weak: %s", problem)
        for message_id, body in self._inbox.open():
            self._take_up(message_id, body)
        self._thread = threading.Thread(target=self._listen_until_stopped, name="rpc-listener", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the broker can reach this worker now, as far as the connection knows."""
        listener = self._listener
        return listener is not None and self._problem is None and bool(listener.conn.connection.connected)

    @property
    def problem(self) -> str | None:
        """Why :attr:`connected` is false, for health and logs."""
        return None if self.connected else self._problem or "the connection to the broker is lost"

    def stop_consuming(self, timeout: float = 10.0) -> bool:
        """Take no more messages; what the broker still holds stays there. Whether that ended in ``timeout`` seconds."""
        self._stopped.set()
        if (listener := self._listener) is not None:
            listener.interrupt()
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def stop(self, timeout: float = 10.0) -> bool:
        """Stop consuming and let what was taken end. Whether all of it ended within ``timeout`` seconds.

        What did not end is either in the inbox (casts) or was not answered (calls): nothing accepted is lost.
        """
        deadline = time.monotonic() + timeout
        ended = self.stop_consuming(timeout)
        for lanes in (self._commands, self._queries):
            ended = lanes.stop(max(0.0, deadline - time.monotonic())) and ended
        return self._replies.stop(max(0.1, deadline - time.monotonic())) and ended

    def _take_up(self, message_id: str, body: bytes) -> None:
        try:
            raw = json.loads(body)
        except ValueError:
            LOG.error("row %s of the inbox is not a message and is dropped", message_id)
            self._inbox.discard(message_id)
            return
        LOG.info("message %s (%s) was not accepted before the last stop: taking it up", message_id, wire.method_of(raw))
        self._on_cast(message_id, raw, True)

    def _listen_until_stopped(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            try:
                self._listen()
                failures = 0
            except Exception as exc:
                pause = RECONNECT_SECONDS[min(failures, len(RECONNECT_SECONDS) - 1)]
                failures += 1
                self._problem = f"{exc}" or type(exc).__name__
                LOG.warning("no connection to the broker, next try in %.1f s: %s", pause, self._problem)
                self._stopped.wait(pause)
        self._problem = "stopped"

    def _listen(self) -> None:
        connection = transports.open_listening(self._transport)
        listener = AcceptingListener(
            self._transport._driver, connection, self._inbox, self._on_cast,
            self._dispatcher.too_large, self._dispatcher.catalogue.is_query, self._stopped,
        )
        try:
            queue = f"{self._rpc.topic}.{self._host}"
            consumer = transports.topic_consumer(connection, self._rpc.exchange, queue, listener)
            transports.check_exchange(connection, consumer)
            connection.declare_consumer(consumer)
            # Named by the exchange: nova's own fanout of topic "compute" may be in the same virtual host.
            connection.declare_fanout_consumer(self._rpc.exchange, listener)
            self._listener, self._problem = listener, None
            LOG.info("listening as %s", queue)
            self._consume(listener)
        finally:
            self._listener = None
            _close(connection)

    def _consume(self, listener: AcceptingListener) -> None:
        while not self._stopped.is_set():
            for incoming in listener.poll(timeout=POLL_SECONDS):
                self._on_call(incoming)
            self._commands.wait_below(BACKLOG_LIMIT, BACKLOG_SECONDS)
        for incoming in listener.incoming:
            self._on_call(incoming)

    def _on_call(self, incoming: Any) -> None:
        raw = dict(incoming.message)
        if self._dispatcher.catalogue.is_query(raw.get("method")):
            self._queries.submit(None, lambda: self._answer(incoming, raw))
        else:
            self._commands.submit(wire.instance_of(raw.get("args")), lambda: self._answer(incoming, raw))

    def _on_cast(self, message_id: str, raw: dict[str, Any], kept: bool) -> None:
        cast = _Cast(message_id, raw, kept)
        if kept:
            self._commands.submit(wire.instance_of(raw.get("args")), lambda: self._accept(cast))
        else:
            self._queries.submit(None, lambda: self._accept(cast))

    def _answer(self, incoming: Any, raw: dict[str, Any]) -> None:
        context = wire.context_of(incoming.ctxt, incoming.unique_id or incoming.msg_id, inbox=False)
        method = wire.method_of(raw)
        with (
            _about(context, raw.get("args")),
            _tracing.trace_receive(self._transport.conf, incoming),
        ):
            try:
                result = self._dispatcher.perform(raw, context, incoming.client_timeout, incoming.heartbeat)
            except Exception as exc:
                self._log(method, exc)
                sent = wire.sendable(exc, self._host, method, context.request_id)
                self._replies.send_alone(incoming, failure=(type(sent), sent, None))
            else:
                self._replies.send(incoming, result)

    def _accept(self, cast: _Cast) -> float | None:
        envelope = {key[9:]: value for key, value in cast.raw.items() if key.startswith("_context_")}
        context = wire.context_of(envelope, cast.message_id, inbox=cast.kept)
        with (
            _about(context, cast.raw.get("args")),
            _tracing.trace_receive(self._transport.conf, SimpleNamespace(message=cast.raw, ctxt=envelope)),
        ):
            try:
                self._try_to_accept(cast, context)
            except Exception as exc:
                cast.attempts += 1
                pause = RETRY_SECONDS[min(cast.attempts, len(RETRY_SECONDS)) - 1]
                LOG.warning("%s is kept and tried again in %.1f s: %s", wire.method_of(cast.raw), pause, exc,
                            exc_info=not isinstance(exc, errors.ComputeError))
                return pause if cast.kept else None
        return None

    def _try_to_accept(self, cast: _Cast, context: Context) -> None:
        """Do it, or refuse it for good; whatever this raises is a reason to try again."""
        method = wire.method_of(cast.raw)
        if not cast.handled:
            try:
                self._dispatcher.perform(cast.raw, context)
            except errors.Retryable:
                raise
            except Exception as exc:
                if not isinstance(exc, errors.ComputeError) and cast.attempts + 1 < INTERNAL_ATTEMPTS:
                    raise
                self._log(method, exc)
                if cast.kept:
                    sent = wire.sendable(exc, self._host, method, context.request_id)
                    self._on_refused(context, method, wire.redacted(cast.raw.get("args")), sent)
            cast.handled = True
        if cast.kept:
            self._inbox.discard(cast.message_id)

    def _log(self, method: str, exc: Exception) -> None:
        if isinstance(exc, errors.Refused | errors.Cancelled):
            LOG.info("%s is refused: %s", method, exc)
        elif isinstance(exc, errors.ComputeError):
            LOG.warning("%s failed: %s", method, exc)
        else:
            LOG.error("%s ended in an unexpected error", method, exc_info=exc)


def _about(context: Context, args: Any) -> AbstractContextManager[logcontext.LogContext]:
    return logcontext.bound(
        request_id=context.request_id,
        operation=wire.operation_of(args),
        instance=wire.word(wire.instance_of(args)),
    )


def _close(connection: Any) -> None:
    try:
        connection.close()
    except Exception as exc:
        LOG.debug("closing the connection to the broker: %s", exc)
