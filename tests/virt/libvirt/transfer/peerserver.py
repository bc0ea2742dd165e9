"""The destination's answers over a unix socket: for a source that is a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import msgspec

from compute_worker import errors
from compute_worker.errors import ComputeError
from compute_worker.virt.driver import Peer


class PeerServer:
    def __init__(self, path: Path, peer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        self.path = path
        self._peer = peer
        self._listener = Listener(str(path), "AF_UNIX")

    def __enter__(self) -> PeerServer:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                with self._listener.accept() as connection:
                    connection.send_bytes(self._answer(connection.recv_bytes()))
            except EOFError:
                continue
            except OSError:
                return

    def _answer(self, data: bytes) -> bytes:
        try:
            return msgspec.json.encode({"answer": self._peer(msgspec.json.decode(data))})
        except ComputeError as exc:
            return msgspec.json.encode({"error": exc.to_dict()})


def peer_at(path: str) -> Peer:
    def ask(request: Mapping[str, Any]) -> Mapping[str, Any]:
        with Client(path, "AF_UNIX") as connection:
            connection.send_bytes(msgspec.json.encode(request))
            said = msgspec.json.decode(connection.recv_bytes())
        if "error" in said:
            raise errors.from_dict(said["error"])
        return said["answer"]

    return ask
