"""Which boot of this host this is."""

from __future__ import annotations


def boot_id() -> str:
    """The kernel's boot id and the start of the first process, so that a container's restart is a boot of its own."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as kernel, open("/proc/1/stat", "rb") as init:
        started = init.read().rpartition(b")")[2].split()[19].decode()
        return f"{kernel.read().strip()}/{started}"
