"""The destination's side: makes room for disks, listens for them, says what arrived, gives them their names.

Every request may come twice and late, is answered within seconds, and touches only a directory that is marked as this
migration's. If the worker dies, its ``qemu-nbd`` die with it; what was recorded as arrived is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from compute_worker import errors, objects
from compute_worker.config import Settings
from compute_worker.images import files
from compute_worker.objects import Instance, Migration
from compute_worker.virt.driver import NullJob
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.libvirt.disks.qemu_img import QemuImg
from compute_worker.virt.libvirt.transfer import extents, requests, tls, windows
from compute_worker.virt.libvirt.transfer.arrivals import Arrival, Arrivals
from compute_worker.virt.libvirt.transfer.export import Export, Listening
from compute_worker.virt.libvirt.transfer.windows import Arrived

LOG = logging.getLogger(__name__)
Answer = Mapping[str, Any]
_WRITERS = ("qemu-nbd", "rsync")


class Receiver:
    """Answers the sources of all migrations to this host. Thread-safe.

    :raises compute_worker.errors.Broken: an option of ``[transfer]`` makes no sense.
    """

    def __init__(self, settings: Settings, directory: InstancesDirectory) -> None:
        self._options = settings.transfer
        self._group = settings.libvirt.disk_owner_group
        self._tls = Path(settings.compute.state_path, "tls")
        self._listening = Listening.parse(self._options.listen_address, self._options.ports)
        self._arrivals = Arrivals(directory)
        self._qemu_img = QemuImg(settings.images.qemu_img_cpu_seconds, settings.images.qemu_img_memory_mb)
        self._exports: dict[tuple[str, str], Export] = {}
        self._locks: dict[str, list[Any]] = {}
        self._guard = threading.Lock()
        self._answers: dict[str, Callable[[Instance, Migration, Any], Answer]] = {
            "facts": self._facts,
            "begin": self._begin,
            "probe": self._probe,
            "place": self._place,
            "open": self._open,
            "overlay": self._overlay,
            "windows": self._windows,
            "stop": self._stop,
            "map": self._map,
            "zeros": self._zeros,
            "digest": self._digest,
            "finish": self._finish,
            "remove": self._remove,
            "close": self._close,
        }

    def answer(self, instance: Instance, migration: Migration, request: Mapping[str, Any]) -> Answer:
        """What the source asks; ``request["ask"]`` is one of :data:`requests.KINDS`.

        :raises InvalidCommand: no such request, or a field of it is wrong.
        :raises DestinationDiskExists: the instance has a directory here that is not this migration's.
        :raises MigrationFailed: nothing of this migration is here.
        """
        ask = str(request.get("ask"))[:64]
        if ask not in requests.KINDS:
            raise errors.InvalidCommand(method="answer_peer", problem=f"no request {ask!r}")
        asked: requests.Request = objects.decode(dict(request), requests.KINDS[ask], f"answer_peer {ask}")
        return self._answers[ask](instance, migration, asked)

    def stop_all(self, uuid: str | None = None) -> None:
        """End every process that listens (for one instance, or at all). The files stay."""
        with self._guard:
            doomed = [key for key in self._exports if uuid in (None, key[0])]
            ending = [self._exports.pop(key) for key in doomed]
        for export in ending:
            export.stop()

    def abandon(self, uuid: str) -> None:
        """Nobody writes to anything of the instance any more, here or from another host: it is being deleted. The
        files stay."""
        self.stop_all(uuid)
        with self._locked(uuid):
            for part in self._arrivals.directory.path(uuid).glob("*.part"):
                _end_writers(part)

    def settle(self, instance: Instance) -> None:
        """The disks are the instance's from now on: nobody sends any more, the mark goes, and with it every right of
        the migration to remove them by a request. Ends well when it was done before."""
        self.stop_all(instance.uuid)
        with self._locked(instance.uuid):
            self._arrivals.settle(instance)

    # --- about the instance -------------------------------------------------------------------------------------

    def _facts(self, instance: Instance, migration: Migration, asked: requests.Request) -> Answer:
        problem = tls.problem(self._options.tls_dir, "server")
        return {
            "address": self._options.address,
            "tls": problem is None,
            "tls_problem": problem or "",
            "nbd": process.find_program("qemu-nbd") is not None,
            "rsync": process.find_program("rsync") is not None,
        }

    def _begin(self, instance: Instance, migration: Migration, asked: requests.Request) -> Answer:
        with self._locked(instance.uuid):
            path = self._arrivals.begin(instance, migration)
        return {"path": str(path), **self._facts(instance, migration, asked)}

    def _probe(self, instance: Instance, migration: Migration, asked: requests.ProbeRequest) -> Answer:
        try:
            with open(self._arrivals.directory.root / asked.name, "rb") as file:
                return {"seen": file.read(65) == asked.content.encode()}
        except OSError:
            return {"seen": False}

    def _remove(self, instance: Instance, migration: Migration, asked: requests.RemoveRequest) -> Answer:
        with self._locked(instance.uuid):
            if self._arrivals.owner(instance.uuid) != migration.uuid:
                return {}
            path = self._arrivals.directory.path(instance.uuid)
            if asked.name is not None:
                self._end(instance.uuid, asked.name, Arrival(path, asked.name, migration.uuid).part)
                self._arrivals.remove_file(instance, migration, asked.name)
                return {}
            self.stop_all(instance.uuid)
            for part in path.glob("*.part"):
                _end_writers(part)
            self._arrivals.remove_all(instance, migration)
        return {}

    def _close(self, instance: Instance, migration: Migration, asked: requests.Request) -> Answer:
        self.stop_all(instance.uuid)
        return {}

    # --- one file -----------------------------------------------------------------------------------------------

    def _place(self, instance: Instance, migration: Migration, asked: requests.NameRequest) -> Answer:
        with self._locked(instance.uuid):
            arrival = self._arrival(instance, migration, asked.name)
            if arrival.final.exists():
                return {"complete": True, "path": str(arrival.final)}
            self._end(instance.uuid, asked.name, arrival.part)
            arrival.journal.unlink(missing_ok=True)
            arrival.make_part(None)
            return {"complete": False, "path": str(arrival.part)}

    def _open(self, instance: Instance, migration: Migration, asked: requests.OpenRequest) -> Answer:
        return self._listen(instance, migration, asked, lambda arrival: arrival.make_part(asked.size), _as_raw)

    def _overlay(self, instance: Instance, migration: Migration, asked: requests.OverlayRequest) -> Answer:
        def make(arrival: Arrival) -> None:
            base = self._arrivals.directory.base
            backing = os.path.relpath(base / asked.backing, arrival.part.parent) if asked.backing else None
            if not arrival.part.exists():
                arrival.make_part(None)
                size, cluster = asked.size, asked.cluster
                self._qemu_img.create_blind(arrival.part, size, cluster, backing, asked.backing_format, NullJob())

        return self._listen(instance, migration, asked, make, _as_overlay, asked.token)

    def _listen(
        self,
        instance: Instance,
        migration: Migration,
        asked: requests.OpenRequest,
        make: Callable[[Arrival], None],
        export: Callable[[Path], list[str]],
        token: str = "",
    ) -> Answer:
        with self._locked(instance.uuid):
            arrival = self._arrival(instance, migration, asked.name)
            if arrival.final.exists():
                return {"complete": True}
            arrived = self._resume(instance, asked, arrival, make, token)
            running = self._export(instance.uuid, asked.name, arrival.part, export)
        running.touch()
        return {
            "complete": False,
            "port": running.port,
            "export": asked.name,
            "tls": tls.problem(self._options.tls_dir, "server") is None,
            "windows": arrived.runs,
        }

    def _resume(
        self,
        instance: Instance,
        asked: requests.OpenRequest,
        arrival: Arrival,
        make: Callable[[Arrival], None],
        token: str,
    ) -> Arrived:
        """What of the part can be believed; it is made anew when that is nothing."""
        arrived = windows.read(arrival.journal) if arrival.part.exists() else None
        wanted = (asked.size, asked.window, token)
        if arrived is None or (arrived.size, arrived.window, arrived.token) != wanted:
            self._end(instance.uuid, asked.name, arrival.part)
            arrival.remove()
            arrived = Arrived(asked.size, asked.window, [], token)
            make(arrival)
            windows.write(arrival.journal, arrived)
        elif not self._listens(instance.uuid, asked.name):
            make(arrival)
        return arrived

    def _windows(self, instance: Instance, migration: Migration, asked: requests.WindowsRequest) -> Answer:
        with self._locked(instance.uuid):
            arrival = self._arrival(instance, migration, asked.name)
            export = self._exports.get((instance.uuid, asked.name))
            if export is not None:
                export.touch()
            arrived = windows.read(arrival.journal)
            if arrived is None:
                return {"windows": []}
            try:
                done = arrived.done | windows.numbers(asked.done)
            except ValueError as exc:
                raise errors.InvalidCommand(method="answer_peer windows", problem=str(exc)) from None
            done = {number for number in done if number < arrived.count}
            if done != arrived.done:
                arrived = Arrived(arrived.size, arrived.window, windows.runs_of(done), arrived.token)
                windows.write(arrival.journal, arrived)
            return {"windows": arrived.runs}

    def _stop(self, instance: Instance, migration: Migration, asked: requests.NameRequest) -> Answer:
        with self._locked(instance.uuid):
            arrival = self._arrival(instance, migration, asked.name)
            self._end(instance.uuid, asked.name, arrival.part)
            arrived = windows.read(arrival.journal)
            if arrived is not None and not arrived.token:
                arrival.cut(arrived.size)
        return {}

    def _map(self, instance: Instance, migration: Migration, asked: requests.MapRequest) -> Answer:
        with self._reading(instance, migration, asked.name) as fd:
            size = os.fstat(fd).st_size
            found = list(islice(extents.data_extents(fd, asked.at, size), requests.PAGE))
        return {"size": size, "extents": found, "next": found[-1][1] if len(found) == requests.PAGE else None}

    def _zeros(self, instance: Instance, migration: Migration, asked: requests.ZerosRequest) -> Answer:
        if sum(max(0, end - begin) for begin, end in asked.ranges) > requests.PIECE:
            raise errors.InvalidCommand(method="answer_peer zeros", problem=f"more than {requests.PIECE} bytes at once")
        with self._reading(instance, migration, asked.name) as fd:
            return {"zero": all(extents.is_zero(fd, begin, end) for begin, end in asked.ranges)}

    def _digest(self, instance: Instance, migration: Migration, asked: requests.DigestRequest) -> Answer:
        with self._reading(instance, migration, asked.name) as fd:
            return {"sha256": digest(fd, asked.at, asked.at + asked.length)}

    def _finish(self, instance: Instance, migration: Migration, asked: requests.FinishRequest) -> Answer:
        with self._locked(instance.uuid):
            arrival = self._arrival(instance, migration, asked.name)
            self._end(instance.uuid, asked.name, arrival.part)
            arrival.publish(asked.size, self._group)
        return {}

    # --- inside -------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, uuid: str) -> Iterator[None]:
        """One request that changes something at a time for one instance."""
        with self._guard:
            entry = self._locks.setdefault(uuid, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self._guard:
                entry[1] -= 1
                if not entry[1]:
                    self._locks.pop(uuid, None)

    def _arrival(self, instance: Instance, migration: Migration, name: str) -> Arrival:
        return Arrival(self._arrivals.ours(instance, migration), name, migration.uuid)

    @contextmanager
    def _reading(self, instance: Instance, migration: Migration, name: str) -> Iterator[int]:
        path = self._arrival(instance, migration, name).present
        with files.disk_errors(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                yield fd
            finally:
                os.close(fd)

    def _listens(self, uuid: str, name: str) -> Export | None:
        with self._guard:
            export = self._exports.get((uuid, name))
        return export if export is not None and export.alive else None

    def _export(self, uuid: str, name: str, part: Path, target: Callable[[Path], list[str]]) -> Export:
        export = self._listens(uuid, name)
        if export is None:
            _end_writers(part)
            export = self._start(uuid, name, target(part))
            with self._guard:
                self._exports[uuid, name] = export
        return export

    def _start(self, uuid: str, name: str, target: list[str]) -> Export:
        secured = tls.problem(self._options.tls_dir, "server") is None
        if not secured and not self._options.nbd_plaintext:
            raise errors.NotSupported(what="receiving disks over NBD without certificates (transfer.tls_dir)")
        options = [
            *(tls.server_options(tls.server_directory(self._options.tls_dir, self._tls)) if secured else ()),
            f"--shared={self._options.streams + 1}",
            f"--export-name={name}",
            *target,
        ]
        return Export(f"{uuid}/{name}", self._listening.bind(), options, self._options.idle_timeout)

    def _end(self, uuid: str, name: str, part: Path) -> None:
        """Nobody writes to the part any more."""
        with self._guard:
            export = self._exports.pop((uuid, name), None)
        if export is not None:
            export.stop()
        _end_writers(part)


def _as_raw(path: Path) -> list[str]:
    return ["--format=raw", "--", str(path)]


def _as_overlay(path: Path) -> list[str]:
    """Only the layer itself, also where the base is there: what is not in it reads as zeros, and nothing of the base
    is ever copied into it."""
    return ["--allocation-depth", "--", overlay_node(path)]


def overlay_node(path: Path) -> str:
    """A qcow2 file without its backing file, in QEMU's own notation: nothing of it is guessed."""
    return "json:" + json.dumps(
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
    )


def digest(fd: int, begin: int, end: int) -> str:
    """The sha256 of a piece of a file; what is past its end does not count."""
    sha = hashlib.sha256()
    for at in range(begin, end, 1 << 20):
        sha.update(os.pread(fd, min(1 << 20, end - at), at))
    return sha.hexdigest()


def _end_writers(path: Path) -> None:
    """End what another worker or a source that has gone left writing to ``path``: an rsync whose connection hangs."""
    try:
        wanted = path.lstat()
    except OSError:
        return
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() not in _WRITERS:
                continue
            for fd in os.listdir(f"/proc/{pid}/fd"):
                found = os.stat(f"/proc/{pid}/fd/{fd}")
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    LOG.warning("ending process %s, which still writes to %s", pid, path)
                    os.kill(int(pid), signal.SIGKILL)
                    break
