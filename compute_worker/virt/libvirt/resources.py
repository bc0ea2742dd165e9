"""What the host brings: its resources, and whether its file system can do direct I/O."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import uuid
from pathlib import Path

from compute_worker.images import files
from compute_worker.virt.boot import boot_id
from compute_worker.virt.driver import HostResources
from compute_worker.virt.libvirt.host import Host

LOG = logging.getLogger(__name__)
_GIB = 1 << 30
ID_FILE = "directory.id"
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
            instances_id=instances_id(self._instances),
        )


def instances_id(directory: Path) -> str:
    """Which instances directory this is: written into it once, by whichever host is first. Empty: not readable.

    It stands in a file, so that hosts that see the same directory see the same id; a copy of a directory has it too.
    """
    path = directory / ID_FILE
    try:
        if not path.exists():
            part = directory / f"{ID_FILE}-{uuid.uuid4()}"
            part.write_text(f"{uuid.uuid4()}\n")
            try:
                os.link(part, path)
            except FileExistsError:
                LOG.debug("%s: another host was first", path)
            finally:
                part.unlink()
        return path.read_text().strip()
    except OSError as exc:
        LOG.warning("%s: %s: it is not known whether other hosts share this directory", path, exc.strerror)
        return ""


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
