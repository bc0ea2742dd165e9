"""Two hosts of libvirt's own test driver in one process, with real files, real qemu-img and a real transport."""

from __future__ import annotations

import hashlib
import subprocess
import uuid
from pathlib import Path
from typing import Any

import libvirt
import msgspec

from compute_worker.config import Compute, Images, Libvirt, Settings, Transfer
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, Flavor, ImageMeta, Instance, Vif
from compute_worker.virt.libvirt.disks.cache import base_name
from compute_worker.virt.libvirt.driver import LibvirtDriver
from compute_worker.virt.libvirt.host import Host
from tests.virt.world import RESIZE
from tests.waiting import wait_for

IMAGE = b"bootable " * 100
SECTOR = 512
WRITTEN_AT = 1 << 20
_STATES = {libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_PAUSED: "paused"}


class MoveWorld:
    """See :class:`tests.virt.world.World`. ``options``: of [libvirt], by host; ``transfer``: of [transfer];
    ``shared``: both hosts see one instances directory."""

    supports = frozenset({RESIZE})
    a, b = "node1", "node2"
    guest_writes_disk = True
    plugs_with_guest = True

    def __init__(self, root: Path, uris: dict[str, str], options: dict[str, dict[str, Any]] | None = None,
                 shared: bool = False, **transfer: Any) -> None:  # fmt: skip
        self.root = root
        self._options = options or {}
        self._instances_path = str(root / "shared") if shared else ""
        self._transfer = {"transport": "nbd", "nbd_plaintext": True, "address": "127.0.0.1", "tls_dir": "",
                          "listen_address": "127.0.0.1", "resize_precopy": "never", **transfer}  # fmt: skip
        self._hosts = {name: Host(uri, host=name, backoff=(0.01, 0.05)) for name, uri in uris.items()}
        self._drivers: dict[str, LibvirtDriver] = {}
        self._made: dict[str, Instance] = {}
        (root / "images").mkdir()
        (root / "images" / "tiny").write_bytes(IMAGE)

    def settings(self, host: str) -> Settings:
        return Settings(
            compute=Compute(host=host, state_path=str(self.root / host), instances_path=self._instances_path),
            images=Images(file_path=str(self.root / "images"), remove_unused_base_images_after=0),
            libvirt=Libvirt(**self._options.get(host, {})),
            transfer=Transfer(**self._transfer),
        )

    def driver(self, host: str) -> LibvirtDriver:
        if host not in self._drivers:
            driver = LibvirtDriver(self.settings(host), self._hosts[host])
            driver.init_host(host)
            wait_for(lambda: driver.available, what="the connection")
            self._drivers[host] = driver
        return self._drivers[host]

    def restart(self, host: str) -> LibvirtDriver:
        """libvirt's test driver forgets its guests with its connection: that stays, and what listens ends."""
        if host in self._drivers:
            self._drivers.pop(host)._receiver.stop_all()
        return self.driver(host)

    def new_instance(self, host: str, **changes: Any) -> Instance:
        instance = Instance(
            uuid=str(uuid.uuid4()),
            name="test",
            host=host,
            flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1, ephemeral_gb=1, swap_mb=16),
            image=ImageMeta(id="tiny", checksum_algorithm="sha256", checksum=hashlib.sha256(IMAGE).hexdigest()),
            vifs=[Vif(id=str(uuid.uuid4()), mac="52:54:00:00:00:01")],
            block_device_info=BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1)]),
        )
        instance = msgspec.structs.replace(instance, **changes)
        self._made[instance.uuid] = instance
        return instance

    def path(self, host: str, uuid: str, suffix: str = "") -> Path:
        return Path(self.settings(host).instances_path) / (uuid + suffix)

    def power(self, host: str, uuid: str) -> str:
        with self._hosts[host].calling("looking") as conn:
            try:
                dom = conn.lookupByUUIDString(uuid)
            except libvirt.libvirtError:
                return "nostate"
            return _STATES.get(dom.state()[0], "shutdown")

    def files(self, host: str, uuid: str) -> set[str]:
        root = Path(self.settings(host).instances_path)
        return {str(p.relative_to(root)) for p in root.rglob("*") if str(p.relative_to(root)).startswith(uuid)}

    def plugged(self, host: str, uuid: str) -> set[str]:
        on = self.power(host, uuid) in ("running", "paused")
        return {f"tap{vif.id[:11]}" for vif in self._made[uuid].vifs} if on else set()

    def write_disk(self, host: str, uuid: str, data: bytes, at: int = WRITTEN_AT) -> None:
        piece = self.root / "piece"
        piece.write_bytes(data.rjust(SECTOR, b"\0"))
        words = ["qemu-io", "-f", self.format_of(host, uuid), "-c", f"write -q -s {piece} {at} {SECTOR}"]
        subprocess.run([*words, self.path(host, uuid) / "disk"], check=True, timeout=20)

    def read_disk(self, host: str, uuid: str, at: int = WRITTEN_AT) -> bytes:
        disk, piece = self.path(host, uuid) / "disk", self.root / "piece"
        words = ["qemu-img", "dd", "-f", self.format_of(host, uuid), "-O", "raw", f"bs={SECTOR}",
                 f"skip={at // SECTOR}", f"count={at // SECTOR + 1}", f"if={disk}", f"of={piece}"]  # fmt: skip
        subprocess.run(words, check=True, timeout=20)
        return piece.read_bytes()[:SECTOR]

    def listening(self, host: str) -> bool:
        """Whether anything of the host listens for disks."""
        receiver = self._drivers[host]._receiver if host in self._drivers else None
        return any(export.alive for export in receiver._exports.values()) if receiver else False

    def format_of(self, host: str, uuid: str, name: str = "disk") -> str:
        info = self.driver(host)._deeds.disks.disk_info(uuid)
        assert info is not None
        return next(disk.format for disk in info.disks if disk.name == name)

    def images(self) -> set[str]:
        return {path.name for path in (self.root / "images").iterdir()}

    def base_image(self, instance: Instance) -> bool:
        return (Path(self.settings(self.a).instances_path) / "_base" / base_name(instance.image)).exists()

    def close(self) -> None:
        for driver in self._drivers.values():
            driver.cleanup_host()
        for host in self._hosts.values():
            host.close()
