"""The world of the libvirt driver, seen from inside a host of the lab, as the worker's own user."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import libvirt
import msgspec

from compute_worker.config import Compute, Images, Libvirt, LiveMigration, Settings, Transfer
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, Flavor, ImageMeta, Instance, Vif
from compute_worker.virt.driver import ComputeDriver, SpawnRequest
from compute_worker.virt.libvirt.disks.bases import content_digest
from compute_worker.virt.libvirt.disks.cache import base_name
from compute_worker.virt.libvirt.driver import LibvirtDriver
from compute_worker.virt.libvirt.events import Lifecycle, LifecycleEvent
from compute_worker.virt.libvirt.host import Host
from tests.lab import oracle
from tests.lab.guest_images import MEMORY_MIB
from tests.lab.settings import IMAGES_PATH, STATE_PATH
from tests.virt.jobs import RecordingJob
from tests.virt.world import run
from tests.waiting import wait_for

KERNEL, INITRD, DATA, BOOT = "lab-kernel", "lab-initrd", "lab-data", "lab-boot"
URI = "qemu:///system"
_STATES = {libvirt.VIR_DOMAIN_RUNNING: "running", libvirt.VIR_DOMAIN_PAUSED: "paused"}


@cache
def checksum(image: str) -> str:
    return hashlib.sha256(Path(IMAGES_PATH, image).read_bytes()).hexdigest()


def lab_image(**changes: Any) -> ImageMeta:
    """The lab's guest, booted from kernel and ramdisk."""
    image = ImageMeta(id=DATA, disk_format="raw", os_type="linux", kernel_id=KERNEL, ramdisk_id=INITRD)
    return msgspec.structs.replace(image, **changes)


def lab_instance(host: str | None, **changes: Any) -> Instance:
    """The lab's guest with two disks beside its root disk and an interface."""
    instance = Instance(
        uuid=str(uuid.uuid4()),
        name="test",
        host=host,
        flavor=Flavor(vcpus=1, memory_mb=MEMORY_MIB, root_gb=1, ephemeral_gb=1, swap_mb=16),
        image=lab_image(),
        vifs=[Vif(id=str(uuid.uuid4()), mac=f"52:54:00:{os.urandom(3).hex(':')}", bridge="br0")],
        block_device_info=BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1)]),
        kernel_cmdline="quiet",
    )
    return msgspec.structs.replace(instance, **changes)


class LibvirtWorld:
    """See :class:`tests.virt.world.World`. Both hosts are this one: what needs two is not supported."""

    supports: frozenset[str] = frozenset()
    a, b = "node1", "node2"
    guest_writes_disk = False
    plugs_with_guest = True

    def __init__(self) -> None:
        self.instances = Path(STATE_PATH, "instances")
        self._drivers: dict[str, LibvirtDriver] = {}
        self._made: dict[str, Instance] = {}
        self._told: list[LifecycleEvent] = []
        self._transfer: dict[str, Any] = {}
        self._live: dict[str, Any] = {}
        self._host = Host(URI)
        self._host.subscribe(lambda event: self._told.append(event) if isinstance(event, LifecycleEvent) else None)
        assert self._host.wait_connected(10)
        self._own = libvirt.open(URI)

    def settings(self, host: str) -> Settings:
        return Settings(
            compute=Compute(host=host, state_path=STATE_PATH),
            images=Images(file_path=IMAGES_PATH, remove_unused_base_images_after=0),
            libvirt=Libvirt(mem_stats_period=1),
            transfer=Transfer(**self._transfer),
            live_migration=LiveMigration(**self._live),
        )

    def use(self, transfer: dict[str, Any]) -> None:
        """Options of [transfer] for drivers that begin from now on."""
        self._transfer = transfer

    def use_live(self, options: dict[str, Any]) -> None:
        """Options of [live_migration] for drivers that begin from now on."""
        self._live = options

    def remember(self, instance: Instance) -> None:
        """An instance that another world made may come here."""
        self._made[instance.uuid] = instance

    def console(self, host: str, uuid: str) -> str:
        path = self.instances / uuid / "console.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def content(self, host: str, uuid: str, name: str, suffix: str = "") -> str:
        """Digest of what a guest would read of a qcow2 that nobody has open, and that it is sound."""
        disk, raw = self.instances / (uuid + suffix) / name, self.instances / f"content-{uuid}"
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk], check=True, timeout=60)
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, raw], check=True, timeout=60)
        try:
            return content_digest(raw, RecordingJob())
        finally:
            raw.unlink()

    def bitmaps(self, host: str, uuid: str, name: str, suffix: str = "") -> list[str]:
        """Bitmaps in a qcow2, also one that a guest has open."""
        disk = self.instances / (uuid + suffix) / name
        said = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", "-f", "qcow2", disk], timeout=60)
        found = json.loads(said).get("format-specific", {}).get("data", {}).get("bitmaps", [])
        return [str(bitmap["name"]) for bitmap in found]

    def processes(self, host: str, name: str) -> list[str]:
        """Command lines of the host's processes that are called so."""
        words = [_words(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [b" ".join(w).decode(errors="replace") for w in words if os.path.basename(w[0]) == name.encode()]

    def driver(self, host: str) -> ComputeDriver:
        if host not in self._drivers:
            driver = LibvirtDriver(self.settings(host))
            driver.init_host(host)
            wait_for(lambda: driver.available, what="the driver's connection")
            self._drivers[host] = driver
        return self._drivers[host]

    def restart(self, host: str) -> ComputeDriver:
        if host in self._drivers:
            self._drivers.pop(host).cleanup_host()
        return self.driver(host)

    def new_instance(self, host: str, **changes: Any) -> Instance:
        changes = {"image": lab_image(checksum_algorithm="sha256", checksum=checksum(DATA)), **changes}
        instance = lab_instance(host, **changes)
        self._made[instance.uuid] = instance
        return instance

    def power(self, host: str, uuid: str) -> str:
        dom = self._lookup(uuid)
        if dom is None:
            return "nostate"
        state = dom.state()[0]
        if state == libvirt.VIR_DOMAIN_SHUTOFF:
            return "suspended" if dom.hasManagedSaveImage() else "shutdown"
        return _STATES[state]

    def files(self, host: str, uuid: str) -> set[str]:
        return {str(p.relative_to(self.instances)) for p in self.instances.rglob("*")
                if str(p.relative_to(self.instances)).startswith(uuid)}

    def plugged(self, host: str, uuid: str) -> set[str]:
        wanted = {f"tap{vif.id[:11]}" for vif in self._made[uuid].vifs}
        return wanted & set(os.listdir("/sys/class/net"))

    def boots(self, host: str, uuid: str) -> int:
        self._hear_all()
        return len([e for e in self._told
                    if e.uuid == uuid and e.kind is Lifecycle.STARTED and e.reason == "booted"])

    def memory(self, host: str, uuid: str) -> tuple[str, int]:
        count = self.boots(host, uuid)
        console = self.instances / uuid / "console.log"

        def ticked() -> tuple[str, int] | None:
            boots = oracle.boots(console.read_text(errors="replace"))
            return (str(boots[-1].number), boots[-1].ticks[-1]) if len(boots) == count and boots[-1].ticks else None

        return wait_for(ticked, 60, f"boot {count} to tick") or ("", 0)

    def write_disk(self, host: str, uuid: str, data: bytes) -> None:
        raise NotImplementedError("this guest takes no orders")

    def read_disk(self, host: str, uuid: str) -> bytes:
        raise NotImplementedError("this guest takes no orders")

    def guest_dies(self, host: str, uuid: str) -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and uuid.encode() in _words(entry):
                os.kill(int(entry.name), signal.SIGKILL)
                return
        raise AssertionError(f"no process runs {uuid}")

    def images(self) -> set[str]:
        return set(os.listdir(IMAGES_PATH))

    def base_image(self, instance: Instance) -> bool:
        return (self.instances / "_base" / base_name(instance.image)).exists()

    def close(self) -> None:
        """Remove every instance that a test made, by the driver."""
        for uuid_ in self._made:
            run(self.driver(self.a).destroy(self._made[uuid_]), RecordingJob())
        for driver in self._drivers.values():
            driver.cleanup_host()
        self._host.close()
        self._own.close()

    def spawned(self, **changes: Any) -> tuple[ComputeDriver, Instance]:
        """An instance that runs."""
        driver, instance = self.driver(self.a), self.new_instance(self.a, **changes)
        run(driver.spawn(instance, SpawnRequest()), RecordingJob())
        driver.unpause(instance)
        return driver, instance

    def _lookup(self, uuid: str) -> Any:
        try:
            return self._own.lookupByUUIDString(uuid)
        except libvirt.libvirtError:
            return None

    def _hear_all(self) -> None:
        """Until every event of before has come: libvirtd tells them in order, so one of our own is the last."""
        mark = str(uuid.uuid4())
        xml = (f"<domain type='qemu'><name>sentinel-{mark}</name><uuid>{mark}</uuid><memory>1024</memory>"
               "<os><type>hvm</type></os></domain>")
        self._own.defineXML(xml).undefine()
        wait_for(lambda: [e for e in self._told if e.uuid == mark and e.kind is Lifecycle.UNDEFINED],
                 what="the sentinel's end")


def _words(process: Path) -> list[bytes]:
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]
