"""The hub: the network between the hosts, where RabbitMQ and a conductor can live."""

from __future__ import annotations

from pathlib import Path

from tests.lab.namespaces import Namespaces
from tests.lab.settings import Settings


class Hub:
    """Namespaces of their own with a bridge that every host's cable is plugged into."""

    def __init__(self, state: Path, settings: Settings) -> None:
        self.settings = settings
        self.state = state
        self.ns = Namespaces("hub", state / "hub", ("mount", "uts", "ipc", "pid", "net"))

    def start(self, lifeline: int | None = None) -> None:
        steps = [["proc", "/proc"], ["sysfs", "/sys"],
                 ["bind", str(self.state / "hosts"), "/etc/hosts"]]
        self.ns.start(steps, lifeline)
        self.ns.run(["sh", "-ec", f"""
            ip link set lo up
            ip link add lab0 type bridge
            ip link set lab0 up
            ip addr add {self.settings.hub_address}/24 dev lab0"""])

    def plug(self, name: str, pid: int) -> None:
        """A cable from the bridge to eth0 of the host whose PID 1 is `pid`."""
        cable = f"v{name}"
        # Only the network is entered, so that `pid` means what it means outside.  A cable of a
        # host that just lost its power may be there still.
        self.ns.run(["sh", "-ec", f"""
            ip link del {cable} 2>/dev/null || true
            ip link add {cable} type veth peer name eth0 netns {pid}
            ip link set {cable} master lab0 up"""], kinds=("net",))

    def cable(self, name: str, up: bool) -> None:
        """Pull the cable of a host, or put it back."""
        self.ns.run(["ip", "link", "set", f"v{name}", "up" if up else "down"])
