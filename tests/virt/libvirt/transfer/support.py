"""Two hosts' instances directories on this machine, and what goes between them."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from compute_worker.config import Compute, Settings, Transfer
from compute_worker.errors import PeerUnavailable
from compute_worker.objects import Flavor, ImageMeta, Instance, Migration
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.libvirt.transfer.base import Shipment
from compute_worker.virt.libvirt.transfer.receiver import Receiver

UUID = "0c7e1b8c-93b6-4d55-8a0e-2a8a4f5b8f01"
MIGRATION = "4f5b8f01-93b6-4d55-8a0e-0c7e1b8c2a8a"
OTHER_MIGRATION = "4f5b8f02-93b6-4d55-8a0e-0c7e1b8c2a8a"
DESTINATION = "localhost"
"""A name that resolves to this machine: certificates are made for it."""
MIB = 1 << 20


def instance(uuid: str = UUID) -> Instance:
    return Instance(
        uuid=uuid, name="guest", image=ImageMeta(id="img"), flavor=Flavor(vcpus=1, memory_mb=64), migration=MIGRATION
    )


def migration(uuid: str = MIGRATION) -> Migration:
    return Migration(uuid=uuid, instance=UUID, source_host="here", dest_host=DESTINATION)


def settings(root: Path, **transfer: Any) -> Settings:
    options = {"address": "127.0.0.1", "listen_address": "127.0.0.1", "tls_dir": "", "window_mb": 1, **transfer}
    return Settings(compute=Compute(state_path=str(root)), transfer=Transfer(**options))


class Pair:
    """Source ``a`` and destination ``b`` below a directory; :meth:`peer` is what the source asks ``b`` by.

    ``lose``: requests that get no answer, by their name; ``seen``: every request.
    """

    def __init__(self, root: Path, *, there: Mapping[str, Any] | None = None, **transfer: Any) -> None:
        self.source = settings(root / "a", **transfer)
        self.destination = settings(root / "b", **{**transfer, **(there or {})})
        self.here = InstancesDirectory(self.source.instances_path)
        self.there = InstancesDirectory(self.destination.instances_path)
        for name, directory in (("a", self.here), ("b", self.there)):
            (root / name).mkdir()
            directory.prepare()
        self.receiver = Receiver(self.destination, self.there)
        self.instance = instance()
        self.migration = migration()
        self.lose: set[str] = set()
        self.seen: list[str] = []
        self.change: dict[str, dict[str, Any]] = {}

    def peer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        self.seen.append(request["ask"])
        if request["ask"] in self.lose:
            raise PeerUnavailable(host=DESTINATION)
        request = msgspec.json.decode(msgspec.json.encode(request))
        answer = self.receiver.answer(self.instance, self.migration, request)
        return {**msgspec.json.decode(msgspec.json.encode(answer)), **self.change.get(request["ask"], {})}

    def restart(self) -> None:
        """The destination's worker died and begins anew; its processes died with it."""
        self.receiver.stop_all()
        self.receiver = Receiver(self.destination, self.there)

    def shipment(self, name: str = "disk", data: Mapping[int, bytes] | None = None, size: int = 0) -> Shipment:
        """A file set aside at the source, with ``data`` at offsets and holes elsewhere."""
        directory = self.here.root / f"{UUID}_resize"
        directory.mkdir(exist_ok=True)
        path = directory / name
        write_sparse(path, data or {}, size)
        return Shipment(UUID, self.migration, name, path)

    def arrived(self, name: str = "disk") -> Path:
        return self.there.path(UUID) / name

    def tree(self) -> set[str]:
        """What is in the destination's instances directory."""
        root = self.there.root
        return {str(p.relative_to(root)) for p in root.rglob("*")} - {"_base", "locks"}


def write_sparse(path: Path, data: Mapping[int, bytes], size: int) -> None:
    with open(path, "wb") as file:
        for offset, piece in data.items():
            file.seek(offset)
            file.write(piece)
        file.truncate(max(size, max((at + len(piece) for at, piece in data.items()), default=0)))


def noise(count: int, seed: int = 7) -> bytes:
    """Bytes that no compression makes smaller."""
    return random.Random(seed).randbytes(count)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def assert_same(one: Path, other: Path) -> None:
    """The same bytes, and not more of the disk."""
    assert one.stat().st_size == other.stat().st_size
    with open(one, "rb") as first, open(other, "rb") as second:
        while piece := first.read(MIB):
            assert piece == second.read(MIB)
    assert allocated(other) <= allocated(one) + 64 * 1024


def processes(*words: str) -> list[int]:
    """Processes on this machine whose command line has all of ``words``."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
            stat = Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        if all(word in line for word in words) and stat[stat.rindex(")") + 2] != "Z":
            found.append(int(entry))
    return found


class Meter:
    """A TCP relay on 127.0.0.1 that counts bytes, can stop passing them on, and can cut connections."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.bytes = 0
        self.flow = threading.Event()
        self.flow.set()
        self.limit: int | None = None
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self._listener.close()
        self.flow.set()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            self._open += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := source.recv(65_536):
                with self._lock:
                    self.bytes += len(piece)
                    if self.limit is not None and self.bytes > self.limit:
                        self.limit = None
                        self.cut()
                        return
                self.flow.wait()
                target.sendall(piece)
        except OSError:
            pass
        finally:
            for sock in (source, target):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue
