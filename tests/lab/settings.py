"""What a cell is made with; kept as lab.json in its state directory until it goes down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

WORKER_USER = "compute-worker"
# Far from what adduser gives out; the account exists in the hosts' private /etc only.
WORKER_UID = 64901
STATE_PATH = "/var/lib/compute-worker"
INSTANCES_PATH = f"{STATE_PATH}/instances"
IMAGES_PATH = "/var/lib/lab-images"
CONFIG_FILE = "/etc/compute-worker/compute-worker.conf"
# sun_path holds 108 bytes with the final zero.
LONGEST_SOCKET = len("/node99/run/libvirt/virtlogd-admin-sock")


@dataclass(frozen=True)
class Settings:
    """One cell's settings; times in seconds."""

    nodes: int = 2
    net: str = "10.77.0"
    """The first three octets of the /24, which is only ever routed inside the namespaces."""
    tls: bool = False
    """Certificates for libvirt, QEMU and RabbitMQ, and libvirtd listening with TLS."""
    kvm: bool = False
    """Leave /dev/kvm visible in the hosts; hidden, domains are the same everywhere."""
    keepalive_interval: int = 5
    tcp_retries2: int = 6
    """A silent peer is given up after some 25 s; the kernel's 15 means 15 minutes."""
    libvirt_log_level: int = 3
    console_log_bytes: int = 2 * 1024 * 1024
    """virtlogd rolls a console log over at this size."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 99:
            raise ValueError(f"nodes must be 1 to 99, not {self.nodes}")

    @property
    def hub_address(self) -> str:
        return f"{self.net}.1"

    def address(self, index: int) -> str:
        return f"{self.net}.{10 + index}"

    def node_names(self) -> list[str]:
        return [f"node{index}" for index in range(1, self.nodes + 1)]

    def hosts_file(self) -> str:
        """/etc/hosts of the hub and of every host."""
        lines = ["127.0.0.1 localhost", f"{self.hub_address} hub controller"]
        for index, name in enumerate(self.node_names(), 1):
            lines.append(f"{self.address(index)} {name}")
        return "\n".join(lines) + "\n"

    def save(self, state: Path) -> None:
        (state / "lab.json").write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, state: Path) -> Settings:
        """Raises FileNotFoundError when no cell is up in `state`."""
        return cls(**json.loads((state / "lab.json").read_text()))
