"""The one connection to libvirt: kept up by a thread of its own, lost and found again.

Three kinds of threads, none of which holds a lock while another's code runs:

- ``libvirt-events`` (one a process) runs libvirt's event loop, which also sends and answers keepalives; in it we only
  append to queues.
- ``libvirt-connect`` (one a connection) opens, waits for the connection's end, and opens again with backoff. Opening
  may hang for ever on a libvirtd that is stopped but not dead; only this thread hangs with it.
- ``libvirt-callbacks`` (one a connection) hands events to the subscribers, in order, one at a time. Subscribers may
  call libvirt.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import libvirt

from compute_worker import errors
from compute_worker.virt.libvirt import events
from compute_worker.virt.libvirt.events import ConnectionLost, ConnectionRestored, Event

LOG = logging.getLogger(__name__)

Subscriber = Callable[[Event], None]
OpenFunction = Callable[[str], Any]

_loop_lock = threading.Lock()
_loop_thread: threading.Thread | None = None


def start_event_loop() -> None:
    """Register libvirt's default event implementation and run it in a daemon thread, once a process.

    Must come before the first connection: keepalive and events of a connection opened earlier would never work.
    """
    global _loop_thread  # noqa: PLW0603 - libvirt's event implementation is one a process, too
    with _loop_lock:
        if _loop_thread is None:
            libvirt.registerErrorHandler(_log_library_error, None)
            libvirt.virEventRegisterDefaultImpl()
            _loop_thread = threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True)
            _loop_thread.start()


def _run_event_loop() -> None:
    pause = threading.Event()
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            LOG.exception("libvirt's event loop failed; trying again")
            pause.wait(0.5)


def _log_library_error(_: Any, error: Sequence[Any]) -> None:
    # Every such error is also raised where it happened; libvirt would print it to stderr.
    LOG.debug("libvirt: %s", error[2] if len(error) > 2 else error)


class Connection:
    """A connection that comes back. Nothing happens before :meth:`start` (or the first :meth:`get`).

    :param uri: libvirt's connection URI.
    :param keepalive: (seconds of silence before libvirtd is asked whether it lives, unanswered questions that end the
        connection). After at most ``interval * (count + 1)`` seconds of silence every hanging call fails.
    :param connect_timeout: seconds :meth:`get` waits for a connection.
    :param backoff: (first, longest) seconds between two attempts to open.
    :param open_function: opens a connection; for tests.
    """

    def __init__(
        self,
        uri: str,
        *,
        keepalive: tuple[int, int] = (2, 3),
        connect_timeout: float = 5.0,
        backoff: tuple[float, float] = (0.1, 5.0),
        open_function: OpenFunction = libvirt.open,
    ) -> None:
        self.uri = uri
        self._keepalive = keepalive
        self._connect_timeout = connect_timeout
        self._backoff = backoff
        self._open_function = open_function
        self._changed = threading.Condition()
        self._conn: Any = None
        self._lost_reason: str | None = None
        self._generation = 0
        self._problem = "not connected yet"
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._subscribers: tuple[Subscriber, ...] = ()
        self._callback_ids: list[int] = []

    def start(self) -> None:
        """Begin to connect; returns at once. Again: nothing."""
        with self._changed:
            if self._threads or self._closing:
                return
            start_event_loop()
            for target, name in ((self._keep_connected, "libvirt-connect"), (self._dispatch, "libvirt-callbacks")):
                thread = threading.Thread(target=target, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Disconnect for good and end the threads; waits up to ``timeout`` seconds for them (an open may hang)."""
        with self._changed:
            self._closing = True
            self._problem = "the connection was closed by us"
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        deadline = time.monotonic() + timeout
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Have ``callback`` called with every event from now on; returns what ends that. Its exceptions are logged."""
        with self._changed:
            self._subscribers = (*self._subscribers, callback)

        def unsubscribe() -> None:
            with self._changed:
                self._subscribers = tuple(one for one in self._subscribers if one is not callback)

        return unsubscribe

    @property
    def is_connected(self) -> bool:
        """Whether libvirt answered when we last heard of it; does not ask it."""
        with self._changed:
            return self._usable()

    @property
    def generation(self) -> int:
        """How many connections there were."""
        with self._changed:
            return self._generation

    def wait_connected(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a connection; begins to connect where nobody did."""
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: self._usable() or self._closing, timeout)
            return self._usable()

    def get(self, timeout: float | None = None) -> Any:
        """The live ``virConnect``.

        :param timeout: seconds to wait for one; ``None``: ``connect_timeout``.
        :raises HypervisorUnavailable: there is none, and why.
        """
        self.wait_connected(self._connect_timeout if timeout is None else timeout)
        with self._changed:
            if self._usable():
                return self._conn
            raise errors.HypervisorUnavailable(reason=f"{self.uri}: {self._problem}")

    def report_broken(self, conn: Any) -> bool:
        """Somebody got a connection error from ``conn``: give it up if it is dead. Returns whether it lives."""
        try:
            alive = bool(conn.isAlive())
        except libvirt.libvirtError:
            alive = False
        if not alive:
            self._lost(conn, "error")
        return alive

    def _usable(self) -> bool:
        return self._conn is not None and self._lost_reason is None and not self._closing

    def _lost(self, conn: Any, reason: str) -> None:
        with self._changed:
            # A late callback of an earlier connection must not end the present one.
            if conn is self._conn and self._lost_reason is None:
                self._lost_reason = reason
                self._problem = f"the connection was lost ({reason})"
                self._changed.notify_all()

    def _keep_connected(self) -> None:
        delay, longest = self._backoff
        while not self._closing:
            try:
                conn = self._open()
            except libvirt.libvirtError as exc:
                self._cannot_open(exc)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, delay)
                delay = min(delay * 2, longest)
                continue
            delay = self._backoff[0]
            reason = self._use_until_lost(conn)
            LOG.warning("lost the connection to libvirt at %s: %s", self.uri, reason)
            self._events.put(ConnectionLost(reason=reason))
            self._discard(conn)
            del conn
        self._events.put(None)

    def _cannot_open(self, exc: Exception) -> None:
        problem = f"cannot connect: {' '.join(str(exc).split())}"
        with self._changed:
            news = problem != self._problem
            self._problem = self._problem if self._closing else problem
        if news:
            LOG.warning("libvirt at %s: %s; trying again", self.uri, problem)

    def _open(self) -> Any:
        conn = self._open_function(self.uri)
        try:
            conn.setKeepAlive(*self._keepalive)
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise
            LOG.debug("libvirt at %s has no keepalive: nothing lies between us and it", self.uri)
        self._callback_ids = []
        try:
            conn.registerCloseCallback(self._on_close, None)
            for event_id, build in events.BUILDERS.items():
                on_event = partial(self._on_event, build)
                self._callback_ids.append(conn.domainEventRegisterAny(None, event_id, on_event, None))
        except libvirt.libvirtError:
            self._discard(conn)
            raise
        return conn

    def _use_until_lost(self, conn: Any) -> str:
        with self._changed:
            self._generation += 1
            self._conn, self._lost_reason = conn, None
            generation = self._generation
            self._changed.notify_all()
        if not self.report_broken(conn):
            LOG.info("libvirt at %s went away while we connected", self.uri)
        else:
            LOG.info("connected to libvirt at %s (for the %d. time)", self.uri, generation)
            self._events.put(ConnectionRestored(generation=generation))
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._lost_reason is not None)
            self._conn = None
            return self._lost_reason or "client"

    def _discard(self, conn: Any) -> None:
        """Take our callbacks off. The connection is not closed by hand: it closes itself with its last reference, as
        another thread may still be inside a call on it."""
        forget = [partial(conn.domainEventDeregisterAny, number) for number in self._callback_ids]
        for call in (*forget, conn.unregisterCloseCallback):
            try:
                call()
            except libvirt.libvirtError as exc:
                LOG.debug("leaving a dead connection: %s", exc)

    def _on_close(self, conn: Any, reason: int, _: Any) -> None:
        self._lost(conn, events.close_reason(reason))

    def _on_event(self, build: Callable[..., Event], _: Any, dom: Any, *args: Any) -> None:
        try:
            self._events.put(build(dom.UUIDString(), *args[:-1]))
        except Exception:
            LOG.exception("an event of libvirt was not understood: %s", args)

    def _dispatch(self) -> None:
        while (event := self._events.get()) is not None:
            for subscriber in self._subscribers:
                try:
                    subscriber(event)
                except Exception:
                    LOG.exception("a subscriber failed on %s", event)
