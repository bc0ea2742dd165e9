"""A TCP relay from 127.0.0.1 of this machine into a host's network: for the test process itself."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.lab.namespaces import Namespaces

CHUNK = 64 * 1024


class Relay:
    """Listens on a free port of 127.0.0.1 and passes each connection to address:port in `ns`.

    `cut` ends all connections there are; `close` ends everything.  Threads only.
    """

    def __init__(self, ns: Namespaces, address: str, port: int) -> None:
        self.ns = ns
        self.target = (address, port)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name=f"relay-{self.port}", daemon=True).start()

    def cut(self) -> None:
        """End every connection there is."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening and end every connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near:
            try:
                far = self.ns.socket()
            except (OSError, RuntimeError):
                return
            with far:
                with self._lock:
                    self._open |= {near, far}
                try:
                    far.connect(self.target)
                    back = threading.Thread(target=_pump, args=(far, near), daemon=True)
                    back.start()
                    _pump(near, far)
                    back.join()
                except OSError:
                    return
                finally:
                    with self._lock:
                        self._open -= {near, far}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy until end of file, then pass the end on; an error ends both."""
    try:
        while chunk := source.recv(CHUNK):
            sink.sendall(chunk)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
