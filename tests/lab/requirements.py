"""What the lab needs of the machine, and which of it is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

TOOLS_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
# Program -> Debian package, for the message.
PROGRAMS = {
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "libvirtd": "libvirt-daemon-system",
    "virtlogd": "libvirt-daemon-system",
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "busybox": "busybox-static",
    "qemu-ga": "qemu-guest-agent",
    "cpio": "cpio",
    "mformat": "mtools",
    "syslinux": "syslinux",
    "modprobe": "kmod",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "xorriso": "xorriso",
}
FILES = {
    "/usr/lib/rabbitmq/bin/rabbitmq-server": "rabbitmq-server",
    "/usr/lib/syslinux/mbr/mbr.bin": "syslinux-common",
}


def missing() -> list[str]:
    """What stands in the way of a cell on this machine, each with its remedy; empty if nothing."""
    if os.geteuid() != 0:
        return ["root: the lab makes namespaces and mounts"]
    found = [f"{name} (apt install {package})" for name, package in PROGRAMS.items()
             if not shutil.which(name, path=TOOLS_PATH)]
    found += [f"{name} (apt install {package})" for name, package in FILES.items()
              if not Path(name).exists()]
    if not list(Path("/boot").glob("vmlinuz-*cloud-amd64")):
        found.append("a guest kernel (apt install linux-image-cloud-amd64)")
    if not found:
        found += _forbidden()
    return found


def _forbidden() -> list[str]:
    """Namespaces, or mounts in them, may be forbidden even to root (a container)."""
    argv = ["unshare", "--mount", "--uts", "--net", "--pid", "--ipc", "--fork", "--propagation",
            "private", "mount", "-t", "sysfs", "sysfs", "/sys"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        return [f"the right to make namespaces with mounts of their own: {done.stderr.strip()}"]
    return []
