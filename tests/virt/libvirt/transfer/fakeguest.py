"""A guest without a hypervisor: its disks are real qcow2 files, qemu-io writes to them, qemu-nbd serves its backup."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

from compute_worker.states import PowerState
from tests.waiting import wait_for


def qemu_io(path: Path, *commands: str, crash: bool = False) -> None:
    if crash:
        # Opened and written, and never closed.
        child = subprocess.Popen(["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write("".join(f"{one}\n" for one in (*commands, "flush")).encode())
        child.stdin.flush()
        wait_for(lambda: b"wrote" in child.stdout.readline(), what="the write")  # type: ignore[union-attr]
        child.kill()
        child.communicate()
        return
    words = ["qemu-io", "-f", "qcow2", *(word for one in commands for word in ("-c", one)), str(path)]
    done = subprocess.run(words, check=True, capture_output=True, timeout=30)
    assert b"error" not in done.stdout + done.stderr, done


class FakeGuest:
    """What a precopy asks of :class:`compute_worker.virt.libvirt.guest.Guest`. ``disks``: target name to file."""

    def __init__(self, uuid: str, disks: dict[str, Path]) -> None:
        self.uuid = uuid
        self.files = disks
        self.power = PowerState.RUNNING
        self.backup: str | None = None
        self.checkpoint: list[str] = []
        self.refuse: Exception | None = None
        self._servers: list[subprocess.Popen[bytes]] = []
        self._frozen: list[Path] = []

    def power_state(self) -> PowerState:
        return self.power

    def domain(self) -> Any:
        found = [SimpleNamespace(source_file=str(path), target_dev=name) for name, path in self.files.items()]
        found.append(SimpleNamespace(source_file=None, target_dev="sda"))
        return SimpleNamespace(devices=SimpleNamespace(disks=found))

    def backup_xml(self) -> str | None:
        return self.backup

    def checkpoints(self) -> list[str]:
        return list(self.checkpoint)

    def backup_begin(self, backup_xml: str, checkpoint_xml: str, *, reuse_external: bool = False) -> None:
        if self.refuse is not None:
            raise self.refuse
        backup, checkpoint = ET.fromstring(backup_xml), ET.fromstring(checkpoint_xml)
        token = checkpoint.findtext("name") or ""
        server = backup.find("server")
        assert server is not None and backup.get("mode") == "pull"
        chosen = [disk for disk in backup.iter("disk") if disk.get("backup") == "yes"]
        assert reuse_external and all(Path(one.get("file") or "").is_file() for one in backup.iter("scratch"))
        assert len(chosen) == 1, "one server serves one disk here"
        name = chosen[0].get("name") or ""
        path = self.files[name]
        # The point in time: a copy that nobody writes to, over the same base.
        frozen = path.with_name(f"{path.name}-frozen")
        shutil.copyfile(path, frozen)
        self._frozen.append(frozen)
        subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(path), token], check=True, timeout=20)
        words = ["qemu-nbd", "-r", "-t", "-e", "20", "-f", "qcow2", "-x", name, "-k", server.get("socket") or ""]
        self._servers.append(subprocess.Popen([*words, str(frozen)]))
        wait_for(lambda: Path(server.get("socket") or "").exists(), what="the backup's socket")
        self.backup, self.checkpoint = backup_xml, [token]

    def abort_job(self) -> bool:
        running, self.backup = self.backup, None
        for server in self._servers:
            server.kill()
            server.wait()
        for path in self._frozen:
            path.unlink(missing_ok=True)
        self._servers, self._frozen = [], []
        return running is not None

    def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> bool:
        if name not in self.checkpoint:
            return False
        self.checkpoint.remove(name)
        if not metadata_only:
            for path in self.files.values():
                words = ["qemu-img", "bitmap", "--remove", "-f", "qcow2", str(path), name]
                subprocess.run(words, check=True, timeout=20)
        return True

    def writes(self, *commands: str, target: str = "vda") -> None:
        """The guest writes: ``write -P 7 0 64k``, ``write -z ...``, ``discard ...``."""
        qemu_io(self.files[target], *commands)
