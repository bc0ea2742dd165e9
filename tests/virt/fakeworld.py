"""The world of the fake driver: two simulated hosts in a cell of their own."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import msgspec

from compute_worker.config import Compute, Images, Settings
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, Flavor, ImageMeta, Instance, Vif
from compute_worker.virt.driver import ComputeDriver
from compute_worker.virt.fake import FakeDriver
from compute_worker.virt.simulated import SimulatedCell, SimulatedHost
from compute_worker.virt.simulated.files import base_name
from tests.virt.world import EVERYTHING

IMAGE = b"bootable " * 100


class FakeWorld:
    """See :class:`tests.virt.world.World`."""

    supports = EVERYTHING
    a, b = "alpha", "beta"
    guest_writes_disk = True
    plugs_with_guest = False

    def __init__(self) -> None:
        self.cell = SimulatedCell()
        self.cell.images.put("tiny", IMAGE)
        self.hosts = {name: SimulatedHost(name, self.cell) for name in (self.a, self.b)}
        self._drivers: dict[str, FakeDriver] = {}

    def settings(self, host: str) -> Settings:
        return Settings(
            compute=Compute(host=host, state_path="/nonexistent"), images=Images(remove_unused_base_images_after=0)
        )

    def driver(self, host: str) -> ComputeDriver:
        if host not in self._drivers:
            driver = FakeDriver(self.settings(host), self.hosts[host])
            driver.init_host(host)
            self._drivers[host] = driver
        return self._drivers[host]

    def restart(self, host: str) -> ComputeDriver:
        if host in self._drivers:
            self._drivers.pop(host).die()
        return self.driver(host)

    def new_instance(self, host: str, **changes: Any) -> Instance:
        instance = Instance(
            uuid=str(uuid.uuid4()),
            name="test",
            host=host,
            flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1, ephemeral_gb=1, swap_mb=16),
            image=ImageMeta(
                id="tiny",
                checksum_algorithm="sha256",
                checksum=hashlib.sha256(IMAGE).hexdigest(),
                size_bytes=len(IMAGE),
            ),
            vifs=[Vif(id=str(uuid.uuid4()), mac="52:54:00:00:00:01")],
            block_device_info=BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=1)]),
        )
        return msgspec.structs.replace(instance, **changes)

    def power(self, host: str, uuid: str) -> str:
        return str(self.hosts[host].power_of(uuid))

    def files(self, host: str, uuid: str) -> set[str]:
        return set(self.hosts[host].files(uuid))

    def plugged(self, host: str, uuid: str) -> set[str]:
        return set(self.hosts[host].slot(uuid).vifs.values())

    def boots(self, host: str, uuid: str) -> int:
        return self.hosts[host].effects[uuid, "boot"]

    def memory(self, host: str, uuid: str) -> tuple[str, int]:
        return self.hosts[host].guest_memory(uuid)

    def write_disk(self, host: str, uuid: str, data: bytes) -> None:
        self.hosts[host].guest_write(uuid, data)

    def read_disk(self, host: str, uuid: str) -> bytes:
        return self.hosts[host].read_disk(uuid)

    def guest_dies(self, host: str, uuid: str) -> None:
        self.hosts[host].guest_crash(uuid)

    def images(self) -> set[str]:
        return self.cell.images.names()

    def base_image(self, instance: Instance) -> bool:
        return base_name(instance.image.id) in self.hosts[self.a].base

    def close(self) -> None:
        for driver in self._drivers.values():
            driver.cleanup_host()
        for host in self.hosts.values():
            host.close()
