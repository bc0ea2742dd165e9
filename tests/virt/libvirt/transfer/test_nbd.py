"""The NBD client against a real qemu-nbd, and against servers that are none."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker.virt.libvirt.transfer import nbd
from compute_worker.virt.libvirt.transfer.export import Export, Listening
from compute_worker.virt.libvirt.transfer.nbd import HEADER, Connection, ConnectionLost, NbdError, RequestFailed, Status
from tests.virt.jobs import in_thread
from tests.virt.libvirt.transfer.support import MIB, noise, write_sparse
from tests.waiting import wait_for

ALLOCATION = "base:allocation"


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    write_sparse(tmp_path / "disk", {MIB: noise(MIB)}, 4 * MIB)
    listener = Listening("127.0.0.1", 10900, 10999).bind()
    words = ["--format=raw", "--persistent", "--shared=4", "--export-name=disk", "--", str(tmp_path / "disk")]
    made = Export("test", listener, words, 60)
    yield made
    made.stop()


def opened(export: Export, *contexts: str) -> Connection:
    connection = Connection(("127.0.0.1", export.port), "disk", contexts=contexts)
    connection.open()
    return connection


@pytest.mark.parametrize("contexts", [(), (ALLOCATION,)])
def test_what_is_written_is_read(export: Export, contexts: tuple[str, ...]) -> None:
    connection = opened(export, *contexts)
    assert connection.size == 4 * MIB
    buffer = bytearray(HEADER.size + 3) + bytearray()
    buffer[HEADER.size :] = b"abc"
    for at in range(0, 30, 3):
        connection.write(memoryview(buffer), at)
    connection.write_zeroes(6, 3)
    connection.flush()
    found = bytearray(b"x" * 40)
    connection.read_into(memoryview(found), 0)
    assert bytes(found) == b"abcabc\0\0\0" + b"abc" * 7 + bytes(10)
    connection.close()


@pytest.mark.parametrize("contexts", [(), (ALLOCATION,)])
def test_many_parts_are_read_together(export: Export, tmp_path: Path, contexts: tuple[str, ...]) -> None:
    """More than the server works on at once; across data and holes."""
    connection = opened(export, *contexts)
    content = (tmp_path / "disk").read_bytes()
    places = [(at, min(at + 50_000, 4 * MIB)) for at in range(0, 4 * MIB, 60_000)]
    found = [bytearray(end - begin) for begin, end in reversed(places)]
    connection.read_parts([(begin, memoryview(one)) for (begin, _), one in zip(reversed(places), found, strict=True)])
    assert [bytes(one) for one in found] == [content[begin:end] for begin, end in reversed(places)]
    connection.read_parts([])
    one = bytearray(10)
    connection.read_into(memoryview(one), MIB)
    assert one == content[MIB : MIB + 10]
    connection.close()


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(6)))
def test_answers_come_in_any_order(order: list[int]) -> None:
    """Handles count from 1: the option to open it has none."""
    words = b"".join(struct.pack(">IIQ", 0x67446698, 0, 1 + at) + bytes([at] * 10) for at in order)
    connection = Connection(("127.0.0.1", Liar(GREETING + go(MIB) + words).port), "disk")
    connection.open()
    found = [bytearray(10) for _ in range(6)]
    connection.read_parts((at * 100, memoryview(one)) for at, one in enumerate(found))
    assert found == [bytearray([at] * 10) for at in range(6)]
    connection.close()


def test_an_answer_to_what_nobody_asked() -> None:
    words = struct.pack(">IIQ", 0x67446698, 0, 9) + bytes(10)
    connection = Connection(("127.0.0.1", Liar(GREETING + go(MIB) + words).port), "disk")
    connection.open()
    with pytest.raises(NbdError, match="garbled"):
        connection.read_into(memoryview(bytearray(10)), 0)
    connection.close()


def test_holes_are_told(export: Export) -> None:
    connection = opened(export, ALLOCATION)
    assert connection.block_status(ALLOCATION, 0, 4 * MIB) == [Status(MIB, 3), Status(MIB, 0), Status(2 * MIB, 3)]
    connection.close()


def test_a_write_past_the_end_is_an_error_of_that_write(export: Export) -> None:
    connection = opened(export)
    connection.write(memoryview(bytearray(HEADER.size + 10)), 4 * MIB)
    with pytest.raises(RequestFailed, match="writing 10 bytes at 4194304") as caught:
        connection.flush()
    assert caught.value.errno in (errno.EINVAL, errno.ENOSPC)
    connection.close()


def test_no_such_export_and_no_such_context(export: Export) -> None:
    with pytest.raises(NbdError, match=r"not present|no such export"):
        Connection(("127.0.0.1", export.port), "other").open()
    with pytest.raises(NbdError, match="qemu:dirty-bitmap:x"):
        opened(export, "qemu:dirty-bitmap:x")


def test_a_server_that_wants_tls_gets_no_byte(export: Export, pki: str) -> None:
    listener = Listening("127.0.0.1", 10900, 10999).bind()
    creds = ["--object", f"tls-creds-x509,id=t,dir={pki},endpoint=server,verify-peer=yes", "--tls-creds=t"]
    secured = Export("test", listener, [*creds, "--format=raw", "--export-name=disk", "--", "/dev/null"], 60)
    try:
        with pytest.raises(NbdError):
            Connection(("127.0.0.1", secured.port), "disk").open()
    finally:
        secured.stop()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionLost, match=f"127.0.0.1 port {port}: Connection refused"):
        Connection(("127.0.0.1", port), "disk").open()
    with pytest.raises(ConnectionLost, match=r"no-such-host\.invalid"):
        Connection(("no-such-host.invalid", 1), "disk").open()


class Liar:
    """A server that says what it is told to, whatever it is asked."""

    def __init__(self, words: bytes, linger: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.words = words
        self.connected = threading.Event()
        self.release = threading.Event()
        if not linger:
            self.release.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            self.connected.set()
            try:
                connection.sendall(self.words)
                self.release.wait(30)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    continue
            except OSError:
                return


GREETING = b"NBDMAGICIHAVEOPT\x00\x03"


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.booleans())
def test_garbage_is_an_error_of_ours(words: bytes, greets: bool) -> None:
    connection = Connection(("127.0.0.1", Liar((GREETING if greets else b"") + words).port), "disk")
    with pytest.raises(NbdError):
        connection.open()


def go(size: int) -> bytes:
    """The acknowledged answer to NBD_OPT_GO."""
    info = struct.pack(">HQH", 0, size, 1)
    return b"".join(
        struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(body)) + body for kind, body in ((3, info), (1, b""))
    )


@pytest.mark.parametrize("body", [b"", b"\0\0", b"\0\0\0"])
def test_a_short_answer_in_the_handshake(body: bytes) -> None:
    words = GREETING + struct.pack(">QIII", 0x3E889045565A9, 7, 3, len(body)) + body + go(0)[-20:]
    connection = Connection(("127.0.0.1", Liar(words).port), "disk")
    if len(body) > 1:
        with pytest.raises(NbdError, match="garbled"):
            connection.open()
    else:
        connection.open()
        assert connection.size == 0
        connection.close()


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=60))
def test_garbage_instead_of_replies(words: bytes) -> None:
    connection = Connection(("127.0.0.1", Liar(GREETING + go(MIB) + words).port), "disk")
    connection.open()
    with pytest.raises(NbdError):
        connection.read_into(memoryview(bytearray(100)), 0)
    connection.close()


@pytest.mark.parametrize("words", [b"", GREETING])
def test_a_silent_server_is_left_at_once_when_asked(words: bytes) -> None:
    liar = Liar(words, linger=True)
    connection = Connection(("127.0.0.1", liar.port), "disk")
    thread, raised = in_thread(connection.open)
    assert liar.connected.wait(5)
    wait_for(thread.is_alive, what="the client to wait")
    connection.abort()
    thread.join(5)
    liar.release.set()
    assert not thread.is_alive() and isinstance(raised[0], ConnectionLost)


def test_a_silent_server_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "ANSWER_SECONDS", 0.2)
    liar = Liar(GREETING, linger=True)
    with pytest.raises(ConnectionLost, match="timed out"):
        Connection(("127.0.0.1", liar.port), "disk").open()
    liar.release.set()
