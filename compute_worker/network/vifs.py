"""Network interfaces on the host's side: Linux bridges, and interfaces with no link.

The tap devices themselves are made and removed by the hypervisor's root daemon with the guest, so that a worker needs
no privilege for them; what is left to check is whether they will find what they are plugged into.
"""

from __future__ import annotations

from pathlib import Path

from compute_worker.errors import GuestFailed
from compute_worker.objects import Instance

SYS_NET = Path("/sys/class/net")


def is_bridge(name: str, sys_net: Path = SYS_NET) -> bool:
    """Whether this host has a Linux bridge of that name."""
    return (sys_net / name / "bridge").is_dir()


def check_bridges(instance: Instance, sys_net: Path = SYS_NET) -> None:
    """Every interface of ``instance`` will find its bridge.

    :raises GuestFailed: a bridge is missing, or is something else; it is named, with what to do.
    """
    for vif in instance.vifs:
        if vif.bridge is None or is_bridge(vif.bridge, sys_net):
            continue
        there = (sys_net / vif.bridge).exists()
        problem = "is not a Linux bridge" if there else "does not exist on this host"
        raise GuestFailed(
            instance=instance.uuid,
            reason=f"interface {vif.id} wants bridge {vif.bridge}, which {problem}: make it, or name another",
        )
