"""The connection that comes back: lost, refused, hanging. A connection that fails on command stands for libvirtd."""

import subprocess
import sys
import threading
import time

import libvirt
import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.connection import Connection
from compute_worker.virt.libvirt.events import BUILDERS, ConnectionLost, ConnectionRestored, RebootEvent
from tests.virt.libvirt.test_faults import error
from tests.waiting import wait_for

REFUSED = error(libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC, "Failed to connect socket")


class Daemon:
    """Opens connections, or does not; ``up`` may be changed at any time."""

    def __init__(self):
        self.up = True
        self.opened = []
        self.attempts = []
        self.hang = None

    def __call__(self, uri):
        self.attempts.append(time.monotonic())
        if self.hang is not None:
            self.hang.wait(10)
        if not self.up:
            raise REFUSED
        self.opened.append(DaemonConnection())
        return self.opened[-1]


class DaemonConnection:
    def __init__(self):
        self.alive = True
        self.keepalive = None
        self.on_close = None
        self.callbacks = {}

    def setKeepAlive(self, interval, count):
        self.keepalive = (interval, count)

    def registerCloseCallback(self, callback, opaque):
        self.on_close = callback

    def unregisterCloseCallback(self):
        self.on_close = None

    def domainEventRegisterAny(self, dom, event_id, callback, opaque):
        assert dom is None
        number = len(self.callbacks)
        self.callbacks[number] = (event_id, callback)
        return number

    def domainEventDeregisterAny(self, number):
        del self.callbacks[number]
        if not self.alive:
            raise error(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, "client socket is closed")

    def isAlive(self):
        return int(self.alive)

    def die(self, reason=libvirt.VIR_CONNECT_CLOSE_REASON_EOF):
        self.alive = False
        self.on_close(self, reason, None)

    def fire(self, event_id, *args):
        for registered, callback in list(self.callbacks.values()):
            if registered == event_id:
                callback(self, Dom(), *args, None)


class Dom:
    def UUIDString(self):
        return "u-1"


@pytest.fixture
def daemon():
    return Daemon()


@pytest.fixture
def connection(daemon):
    connection = Connection(
        "qemu:///x", keepalive=(1, 3), connect_timeout=0.2, backoff=(0.01, 0.04), open_function=daemon
    )
    yield connection
    connection.close()


@pytest.fixture
def received(connection):
    events = []
    connection.subscribe(events.append)
    return events


def test_nothing_happens_before_the_first_use(connection, daemon):
    assert not connection.is_connected
    assert daemon.attempts == []
    assert connection.get() is daemon.opened[0]
    assert connection.is_connected


def test_one_connection_is_shared_by_all_threads(connection, daemon):
    got = []
    threads = [threading.Thread(target=lambda: got.append(connection.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one is daemon.opened[0] for one in got] == [True] * 8
    assert len(daemon.opened) == 1


def test_keepalive_and_every_event_are_asked_for(connection, daemon):
    connection.get()
    assert daemon.opened[0].keepalive == (1, 3)
    assert {event_id for event_id, _ in daemon.opened[0].callbacks.values()} == set(BUILDERS)


def test_events_come_with_their_uuid(connection, daemon, received):
    connection.get()
    daemon.opened[0].fire(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT)
    wait_for(lambda: len(received) == 2, what="the event")
    assert received == [ConnectionRestored(generation=1), RebootEvent(uuid="u-1")]


def test_after_a_loss_it_comes_back_and_listens_again(connection, daemon, received):
    first = connection.get()
    first.die()
    second = wait_for(lambda: connection.is_connected and connection.get())
    assert second is not first
    assert (len(first.callbacks), first.on_close) == (0, None)
    second.fire(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT)
    wait_for(lambda: len(received) == 4, what="the event after the loss")
    assert received == [
        ConnectionRestored(generation=1),
        ConnectionLost(reason="eof"),
        ConnectionRestored(generation=2),
        RebootEvent(uuid="u-1"),
    ]


def test_a_late_close_callback_of_an_old_connection_does_not_end_the_new_one(connection, daemon):
    first = connection.get()
    late = first.on_close
    first.die()
    wait_for(lambda: connection.is_connected and connection.generation == 2)
    late(first, libvirt.VIR_CONNECT_CLOSE_REASON_ERROR, None)
    assert connection.is_connected
    assert connection.get() is daemon.opened[1]


def test_while_it_is_down_callers_get_the_reason_within_their_time(connection, daemon):
    daemon.up = False
    began = time.monotonic()
    with pytest.raises(errors.HypervisorUnavailable, match="qemu:///x: cannot connect: Failed to connect socket"):
        connection.get()
    assert 0.2 <= time.monotonic() - began < 5
    assert not connection.wait_connected(0)
    daemon.up = True
    assert connection.wait_connected(5)


def test_attempts_back_off_up_to_the_longest(daemon):
    daemon.up = False
    connection = Connection("x", backoff=(0.02, 0.08), open_function=daemon)
    try:
        connection.start()
        wait_for(lambda: len(daemon.attempts) >= 6, what="six attempts")
    finally:
        connection.close()
    gaps = [b - a for a, b in zip(daemon.attempts, daemon.attempts[1:], strict=False)]
    for gap, least in zip(gaps[:5], (0.02, 0.04, 0.08, 0.08, 0.08), strict=True):
        assert gap >= least * 0.95
    assert max(gaps[:5]) < 2


def test_an_open_that_hangs_hangs_nobody_else(connection, daemon):
    daemon.hang = threading.Event()
    began = time.monotonic()
    with pytest.raises(errors.HypervisorUnavailable):
        connection.get()
    assert time.monotonic() - began < 5
    daemon.hang.set()
    assert connection.wait_connected(5)


def test_close_returns_while_an_open_hangs(connection, daemon):
    daemon.hang = threading.Event()
    connection.start()
    wait_for(lambda: daemon.attempts)
    began = time.monotonic()
    connection.close(timeout=0.1)
    assert time.monotonic() - began < 5
    daemon.hang.set()


def test_a_reported_dead_connection_is_given_up_and_a_live_one_is_not(connection, daemon):
    first = connection.get()
    assert connection.report_broken(first)
    assert connection.get() is first
    first.alive = False
    assert not connection.report_broken(first)
    second = wait_for(lambda: connection.is_connected and connection.get())
    assert second is not first


def test_death_between_open_and_use_is_noticed(daemon):
    def open_dead(uri):
        conn = daemon(uri)
        conn.alive = len(daemon.opened) > 1
        return conn

    connection = Connection("x", backoff=(0.01, 0.04), open_function=open_dead)
    events = []
    connection.subscribe(events.append)
    try:
        connection.start()
        assert wait_for(lambda: connection.generation == 2 and connection.is_connected)
        wait_for(lambda: ConnectionRestored(generation=2) in events)
        assert ConnectionRestored(generation=1) not in events
    finally:
        connection.close()


def test_a_connection_that_cannot_listen_is_not_used(daemon):
    def open_deaf(uri):
        conn = daemon(uri)
        if len(daemon.opened) == 1:
            conn.domainEventRegisterAny = lambda *args: (_ for _ in ()).throw(error(libvirt.VIR_ERR_RPC))
        return conn

    connection = Connection("x", backoff=(0.01, 0.04), open_function=open_deaf)
    try:
        assert connection.get(5) is daemon.opened[1]
        assert daemon.opened[0].on_close is None
    finally:
        connection.close()


def test_callbacks_may_use_the_connection_and_their_failure_harms_nobody(connection, daemon, caplog):
    seen = []

    def bad(event):
        raise RuntimeError("bad subscriber")

    connection.subscribe(bad)
    connection.subscribe(lambda event: seen.append(connection.get()))
    connection.start()
    wait_for(lambda: seen)
    assert seen == [daemon.opened[0]]
    assert "a subscriber failed" in caplog.text


def test_an_event_nobody_understands_is_logged_and_the_next_comes(connection, daemon, received, caplog):
    conn = connection.get()
    conn.fire(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT, "one argument too many")
    conn.fire(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT)
    wait_for(lambda: RebootEvent(uuid="u-1") in received)
    assert "was not understood" in caplog.text


def test_unsubscribed_means_no_more(connection, daemon):
    seen, kept = [], []
    stop = connection.subscribe(seen.append)
    connection.subscribe(kept.append)
    conn = connection.get()
    wait_for(lambda: kept)
    stop()
    conn.fire(libvirt.VIR_DOMAIN_EVENT_ID_REBOOT)
    wait_for(lambda: len(kept) == 2)
    assert len(seen) == 1


def test_after_close_there_are_no_threads_and_no_connection(daemon):
    connection = Connection("x", open_function=daemon)
    conn = connection.get()
    ours = [thread for thread in threading.enumerate() if thread.name in ("libvirt-connect", "libvirt-callbacks")]
    connection.close()
    connection.close()
    assert not any(thread.is_alive() for thread in ours)
    assert (conn.on_close, len(conn.callbacks)) == (None, 0)
    with pytest.raises(errors.HypervisorUnavailable, match="closed by us"):
        connection.get()
    connection.start()
    assert len(daemon.opened) == 1


def test_a_driver_without_keepalive_is_fine_and_another_refusal_is_not(daemon):
    def open_with(code):
        def open_function(uri):
            conn = daemon(uri)
            conn.setKeepAlive = lambda *args: (_ for _ in ()).throw(error(code))
            return conn

        return open_function

    for code, works in ((libvirt.VIR_ERR_NO_SUPPORT, True), (libvirt.VIR_ERR_INTERNAL_ERROR, False)):
        connection = Connection("x", backoff=(0.01, 0.04), open_function=open_with(code))
        try:
            assert connection.wait_connected(0.5) is works
        finally:
            connection.close()


def test_the_event_loop_is_one_a_process():
    code = """
import threading
from compute_worker.virt.libvirt.connection import start_event_loop
threads = [threading.Thread(target=start_event_loop) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print([t.daemon for t in threading.enumerate() if t.name == "libvirt-events"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[True]"
