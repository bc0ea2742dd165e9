"""What the host brings: its resources, whether its file system can do direct I/O, whether guests reach their disks."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree as ET

from compute_worker.images import files
from compute_worker.virt.boot import boot_id
from compute_worker.virt.driver import HostResources
from compute_worker.virt.libvirt.host import Host

LOG = logging.getLogger(__name__)
_GIB = 1 << 30
_MAX_AGE = 10.0


class Resources:
    """The host's resources, asked at most every ten seconds."""

    def __init__(self, host: Host, instances: Path) -> None:
        self._host = host
        self._instances = instances
        self._lock = threading.Lock()
        self._known: tuple[float, HostResources] | None = None

    def get(self) -> HostResources:
        """At most 10 s old.

        :raises HypervisorUnavailable: libvirt does not answer, and what is known is older.
        """
        with self._lock:
            if self._known is None or time.monotonic() - self._known[0] > _MAX_AGE:
                self._known = (time.monotonic(), self._ask())
            return self._known[1]

    def _ask(self) -> HostResources:
        facts = self._host.facts()
        with files.disk_errors(self._instances):
            space = os.statvfs(self._instances)
        return HostResources(
            vcpus=facts.vcpus,
            memory_mb=facts.memory_mb,
            disk_gb=space.f_blocks * space.f_frsize / _GIB,
            disk_free_gb=space.f_bavail * space.f_frsize / _GIB,
            hypervisor_type=facts.hypervisor_type,
            hypervisor_version=facts.hypervisor_version,
            hypervisor_hostname=facts.hostname,
            cpu_model=facts.cpu_model,
            machine_arch=facts.arch,
            cpu_info={
                "vendor": facts.cpu_vendor,
                "model": facts.cpu_model,
                "topology": dict(facts.cpu_topology),
                "features": list(facts.cpu_features),
                "domain_type": facts.domain_type,
            },
            boot_id=boot_id(),
        )


def can_direct_io(directory: Path) -> bool:
    """Whether files in ``directory`` can be opened past the page cache; tmpfs and some network file systems cannot.

    :raises Broken: the directory is not writable.
    """
    probe = directory / f".direct-io-{os.getpid()}"
    with files.disk_errors(directory):
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT, 0o600))
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return False
        finally:
            probe.unlink(missing_ok=True)
    return True


def guest_user(capabilities_xml: str) -> tuple[int, int] | None:
    """User and group that guests run as, from libvirt's capabilities (the DAC security model); ``None``: not told."""
    for model in ET.fromstring(capabilities_xml).iterfind("./host/secmodel"):
        if model.findtext("model") == "dac":
            match = re.match(r"\+(\d+):\+(\d+)\Z", model.findtext("baselabel", ""))
            return (int(match[1]), int(match[2])) if match else None
    return None


def blocked_at(path: Path, uid: int, gids: Collection[int]) -> Path | None:
    """The topmost directory on the way to ``path`` (itself included) that the user may not pass; ``None``: none.

    By mode bits alone: access lists may say otherwise.
    """
    if uid == 0:
        return None
    for directory in (*reversed(path.parents), path):
        found = directory.stat()
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in gids else 0
        if not stat.S_IMODE(found.st_mode) >> shift & 1:
            return directory
    return None


def groups_of(uid: int, gid: int) -> set[int]:
    """The group itself and those that the user is a member of."""
    import pwd

    try:
        return {gid, *os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)}
    except KeyError:
        return {gid}
