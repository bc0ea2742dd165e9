"""A guest without a hypervisor for snapshots: its disk is a real file, qemu-io writes to it, qemu-nbd serves backups.

Any call of it can be made the last one of the worker: :class:`Died` is no error that anybody handles.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

from compute_worker import errors
from compute_worker.states import PowerState
from compute_worker.virt.libvirt.backup_xml import BITMAP
from compute_worker.virt.libvirt.transfer.nbd import Connection, NbdError
from tests.waiting import wait_for


class Died(BaseException):
    """The worker was killed here."""


def qemu(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class FakeGuest:
    """What a snapshot asks of :class:`compute_worker.virt.libvirt.guest.Guest`. ``fmt``: of its root disk ``vda``."""

    def __init__(self, uuid: str, disk: Path, fmt: str) -> None:
        self.uuid = uuid
        self.disk = disk
        self.fmt = fmt
        self.power = PowerState.RUNNING
        self.backup: str | None = None
        self.marks: list[str] = []
        self.frozen = False
        self.agent = True
        self.job = ""
        self.refuse: dict[str, Exception] = {}
        """By name of a call, what it raises."""
        self.calls: list[str] = []
        self.die_at: int | None = None
        """Number of the call after which the worker is dead."""
        self._server: subprocess.Popen[bytes] | None = None
        self._frozen_disk = disk.with_name("disk-frozen")

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.refuse:
            raise self.refuse[name]

    def _returns(self) -> None:
        if self.die_at is not None and len(self.calls) >= self.die_at:
            self.die_at = None
            raise Died

    def writes(self, *commands: str) -> None:
        words = [word for one in commands for word in ("-c", one)]
        assert "error" not in qemu("qemu-io", "-f", self.fmt, *words, self.disk)

    # --- what it is ---------------------------------------------------------------------------------------------

    def power_state(self) -> PowerState:
        return self.power

    def domain(self) -> Any:
        found = [SimpleNamespace(source_file=str(self.disk), target_dev="vda"),
                 SimpleNamespace(source_file=None, target_dev="sda")]  # fmt: skip
        return SimpleNamespace(devices=SimpleNamespace(disks=found))

    def job_operation(self) -> str:
        return self.job

    def backup_xml(self) -> str | None:
        return self.backup

    def checkpoints(self) -> list[str]:
        return list(self.marks)

    # --- what is done to it -------------------------------------------------------------------------------------

    def backup_begin(self, backup_xml: str, checkpoint_xml: str | None = None, *, reuse_external: bool = False) -> None:
        self._called("backup_begin")
        assert self.power in (PowerState.RUNNING, PowerState.PAUSED) and reuse_external
        backup = ET.fromstring(backup_xml)
        since = backup.findtext("incremental")
        disk = next(one for one in backup.iter("disk") if one.get("backup") == "yes")
        assert all(Path(one.get("file") or "").is_file() for one in backup.iter("scratch"))
        if since is not None and since not in self._bitmaps():
            raise errors.GuestFailed(instance=self.uuid, reason="missing or broken bitmap")
        qemu("cp", "--sparse=always", self.disk, self._frozen_disk)
        extra: list[str] = []
        if since is not None:
            qemu("qemu-img", "bitmap", "--add", "--merge", since, "-f", "qcow2", self._frozen_disk, BITMAP)
            assert disk.get("exportbitmap") == BITMAP
            extra = [f"--bitmap={BITMAP}"]
        if checkpoint_xml is not None:
            token = ET.fromstring(checkpoint_xml).findtext("name") or ""
            qemu("qemu-img", "bitmap", "--add", "-f", "qcow2", self.disk, token)
            self.marks.append(token)
        server = backup.find("server")
        assert server is not None
        address = Path(server.get("socket") or "")
        words = ["qemu-nbd", "-r", "-t", "-e", "20", "-f", self.fmt, "-x", disk.get("exportname") or "", *extra]
        self._server = subprocess.Popen([*words, "-k", str(address), str(self._frozen_disk)])
        wait_for(lambda: _listens(address), what="the backup's socket")
        self.backup = backup_xml
        self._returns()

    def abort_job(self) -> bool:
        self._called("abort_job")
        running, self.backup = self.backup, None
        self.end()
        self._returns()
        return running is not None

    def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> bool:
        self._called("delete_checkpoint")
        if name not in self.marks:
            return False
        on = self.power in (PowerState.RUNNING, PowerState.PAUSED)
        assert metadata_only or on, "libvirt touches no bitmap of a guest that is off"
        if not metadata_only:
            if name not in self._bitmaps():
                raise errors.GuestFailed(instance=self.uuid, reason="its bitmap is missing")
            qemu("qemu-img", "bitmap", "--remove", "-f", "qcow2", self.disk, name)
        self.marks.remove(name)
        self._returns()
        return True

    def forget_bitmaps(self) -> None:
        """As after a crash of its hypervisor."""
        for name in self._bitmaps():
            qemu("qemu-img", "bitmap", "--remove", "-f", "qcow2", self.disk, name)

    def set_agent_patience(self, seconds: int) -> None:
        assert seconds >= 1

    def fs_freeze(self) -> int:
        self._called("fs_freeze")
        if not self.agent:
            raise errors.NotSupported(message="its guest agent does not answer: QEMU guest agent is not connected")
        assert not self.frozen
        self.frozen = True
        self._returns()
        return 2

    def fs_thaw(self) -> int:
        self._called("fs_thaw")
        if not self.agent:
            raise errors.NotSupported(message="its guest agent does not answer: QEMU guest agent is not connected")
        frozen, self.frozen = self.frozen, False
        self._returns()
        return 2 if frozen else 0

    def managed_save(self) -> bool:
        self._called("managed_save")
        self._was = self.power
        self.power = PowerState.SUSPENDED
        self._returns()
        return True

    def launch(self) -> bool:
        self._called("launch")
        self.power = self._was
        self._returns()
        return True

    def dies(self) -> None:
        self.power, self.backup = PowerState.SHUTDOWN, None
        self.end()

    def end(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None
        self._frozen_disk.unlink(missing_ok=True)

    def _bitmaps(self) -> list[str]:
        if self.fmt != "qcow2":
            return []
        found = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow2", self.disk))
        return [one["name"] for one in found["format-specific"]["data"].get("bitmaps", ())]


def _listens(address: Path) -> bool:
    connection = Connection(address, "vda")
    try:
        connection.open()
    except NbdError:
        return False
    connection.close()
    return True
