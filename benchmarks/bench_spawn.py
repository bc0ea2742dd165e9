"""What the worker adds to a spawn: a build on real libvirt with its image in the cache, against ``qemu-img create`` and
``virsh define`` and ``virsh start`` of the same guest on the same host.

The bare guest has the domain XML that libvirt shows of the worker's one, with another uuid, name, directory and MAC
address, and an overlay on the same base image. The worker's time is a caller's: from sending the command over RabbitMQ
until ``get_operation(wait=...)`` has answered that it is done and the guest runs.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

from common import CannotRun, Report, arguments, finish, median, percentile, run

from compute_worker.objects import Flavor, ImageMeta, Instance, Vif
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from compute_worker.states import OperationState
from tests.lab.cell import Cell, interrupt_as_exit
from tests.lab.guest_images import MEMORY_MIB, GuestImages, guest_images
from tests.lab.node import Node
from tests.lab.rabbit import ADMINISTRATOR, broker_url
from tests.lab.requirements import missing
from tests.lab.settings import IMAGES_PATH, INSTANCES_PATH
from tests.waiting import wait_for

HOST = "node1"
GOAL = 0.3
CONFIG = {"images": {"file_path": IMAGES_PATH}, "claims": {"reserved_host_memory_mb": 0}}
# By the host's own clock, in one shell: entering the host's namespaces is not what bare libvirt costs.
BARE = """
set -e
mkdir {directory}
touch {directory}/console.log
for it in . ./console.log; do
  chown --reference={theirs}/$it {directory}/$it
  chmod --reference={theirs}/$it {directory}/$it
done
for it in kernel ramdisk; do ln {theirs}/$it {directory}/$it; done
began=$(date +%s.%N)
qemu-img create -q -f qcow2 -b {base} -F {base_format} {directory}/disk {size}
chown --reference={theirs}/disk {directory}/disk
chmod --reference={theirs}/disk {directory}/disk
made=$(date +%s.%N)
virsh -q define {directory}/domain.xml
virsh -q start {uuid}
ended=$(date +%s.%N)
echo $began $made $ended
"""


class Spawns:
    """One host with its worker, asked in turn by RabbitMQ and by hand."""

    def __init__(self, node: Node, api: ComputeAPI, images: GuestImages) -> None:
        self._node = node
        self._api = api
        self._image = ImageMeta(
            id=images.data_qcow2.name, disk_format="qcow2", kernel_id=images.kernel.name, ramdisk_id=images.initrd.name
        )

    def by_worker(self) -> tuple[Instance, float, float]:
        """Build one: the instance, seconds as the caller sees them, and seconds of the operation by the journal."""
        instance = Instance(
            uuid=str(uuid.uuid4()), name="bench", flavor=Flavor(vcpus=1, memory_mb=MEMORY_MIB, root_gb=1),
            image=self._image, vifs=[Vif(id=str(uuid.uuid4()), mac="52:54:00:1a:b0:07", bridge="br0")],
            kernel_cmdline="quiet lab.noga",
        )  # fmt: skip
        began = time.perf_counter()
        accepted = self._api.build_and_run_instance(instance, host=HOST)
        ended = self._api.get_operation(str(accepted.operation), wait=60, host=HOST)
        seconds = time.perf_counter() - began
        if ended.state is not OperationState.DONE:
            raise AssertionError(f"the build ended {ended.state}: {ended.error}")
        return instance, seconds, ended.updated_at - ended.created_at

    def delete(self, instance: Instance) -> None:
        accepted = self._api.terminate_instance(instance.uuid, host=HOST)
        ended = self._api.get_operation(str(accepted.operation), wait=60, host=HOST)
        assert ended.state is OperationState.DONE, ended

    def bare(self, instance: Instance) -> tuple[float, float]:
        """The same guest by hand, while ``instance`` is there to look at: seconds in all, and of them qemu-img's."""
        other = str(uuid.uuid4())
        ours, theirs = f"{INSTANCES_PATH}/{other}", f"{INSTANCES_PATH}/{instance.uuid}"
        about = json.loads(self._node.run("qemu-img", "info", "-U", "--output=json", f"{theirs}/disk").stdout)
        script = BARE.format(
            directory=ours, theirs=theirs, uuid=other, base=about["full-backing-filename"],
            base_format=about["backing-filename-format"], size=about["virtual-size"],
        )  # fmt: skip
        definition = _same_guest(self._node.virsh("dumpxml", "--inactive", instance.uuid).stdout, instance.uuid, other)
        prepared = script.replace("began=", f"cat > {ours}/domain.xml <<'XML'\n{definition}\nXML\nbegan=", 1)
        try:
            said = self._node.run("sh", stdin=prepared).stdout.split()
        finally:
            for action in ("destroy", "undefine"):
                self._node.virsh(action, other, check=False)
            self._node.run("rm", "-rf", ours)
        began, made, ended = map(float, said[-3:])
        return ended - began, made - began


def _same_guest(xml: str, instance: str, other: str) -> str:
    """``xml`` as another guest: libvirt itself makes its interface, as a person with virsh would have it."""
    domain = ET.fromstring(xml.replace(instance, other))
    name = domain.find("name")
    assert name is not None
    name.text = other
    metadata, devices = domain.find("metadata"), domain.find("devices")
    assert devices is not None
    if metadata is not None:
        domain.remove(metadata)
    for interface in devices.findall("interface"):
        devices.remove(interface)
        plain = ET.SubElement(devices, "interface", type="bridge")
        ET.SubElement(plain, "mac", address="52:54:00:1a:b0:08")
        ET.SubElement(plain, "source", bridge="br0")
        ET.SubElement(plain, "model", type="virtio")
    return ET.tostring(domain, encoding="unicode")


def measure(options: argparse.Namespace) -> Report:
    report = Report("spawn with a warm cache")
    images = guest_images()
    with Cell(nodes=1) as cell:
        for path in (images.kernel, images.initrd, images.data_qcow2):
            cell.add_image(path)
        cell.start_worker(HOST, CONFIG).wait_ready(60)
        transport = get_transport(
            broker_url("rabbit", ADMINISTRATOR, "127.0.0.1", cell.relay().port, cell.rabbit.vhost)
        )
        try:
            api = ComputeAPI(transport, timeout=90)
            wait_for(lambda: api.get_host_state(host=HOST).vcpus.total, 30, "the hypervisor to tell what it has")
            spawns = Spawns(cell[HOST], api, images)
            warm, seconds, _ = spawns.by_worker()
            report.add("the first, with an empty cache, s", f"{seconds:.2f}", cold_s=seconds)
            spawns.delete(warm)
            tell(report, rounds(spawns, options.rounds))
        finally:
            transport.cleanup()
    return report


def rounds(spawns: Spawns, count: int) -> list[dict[str, float]]:
    """One build and one bare start a round, one after the other, each alone on the host."""
    found = []
    for _ in range(count):
        instance, seconds, operation = spawns.by_worker()
        bare, image = spawns.bare(instance)
        spawns.delete(instance)
        found.append({"worker": seconds, "operation": operation, "bare": bare, "qemu_img": image})
    return found


def tell(report: Report, found: Sequence[dict[str, float]]) -> None:
    def values(name: str) -> list[float]:
        return [item[name] for item in found]

    def shown(name: str) -> str:
        return f"{median(values(name)):.2f} (from {min(values(name)):.2f} to {max(values(name)):.2f})"

    middle: dict[str, Any] = {f"{name}_s": median(values(name)) for name in found[0]}
    report.add(f"bare qemu-img create + virsh define + start, median s of {len(found)}", shown("bare"), **middle)
    report.add("of that qemu-img create, median s", shown("qemu_img"))
    report.add("worker, call to done, median s", shown("worker"))
    report.add("worker, accepted to done by its journal, median s", shown("operation"))
    extra = [item["worker"] - item["bare"] for item in found]
    overhead = median(values("worker")) - median(values("bare"))
    report.add("overhead, difference of the medians, s", f"{overhead:+.2f}", f"<= {GOAL}", overhead <= GOAL,
               overhead_s=overhead)  # fmt: skip
    report.add("overhead a round, p50 / worst s", f"{median(extra):+.2f} / {percentile(extra, 1.0):+.2f}")


def main(argv: Sequence[str]) -> int:
    """Exit status 0, whatever the figures are."""
    options = arguments(__doc__ or "", rounds=10).parse_args(argv)
    if lacking := missing():
        raise CannotRun(f"real libvirt hosts need {'; '.join(lacking)}")
    interrupt_as_exit()
    return finish(measure(options), options.json)


if __name__ == "__main__":
    raise SystemExit(run(main))
