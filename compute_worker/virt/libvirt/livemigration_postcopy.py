"""Whether a guest can come here by post-copy: its hypervisor must be let fetch pages on demand (userfaultfd).

QEMU finds out when a guest comes, and refuses it; then the whole migration has failed. Said before, it goes without.
"""

from __future__ import annotations

from pathlib import Path

DEVICE_SINCE = 8_001_000
"""QEMU that opens ``/dev/userfaultfd``: 8.1."""
_SYSCTL = "sys/vm/unprivileged_userfaultfd"


def problem(uid: int | None, hypervisor_version: int, proc: Path = Path("/proc"), dev: Path = Path("/dev")) -> str:
    """What keeps guests of this user from coming by post-copy; empty: nothing that is known.

    :param uid: whom guests run as; ``None``: not known, then nothing is said.
    """
    if uid is None or uid == 0:
        return ""
    try:
        allowed = (proc / _SYSCTL).read_text().strip() != "0"
    except OSError:
        return ""
    if allowed:
        return ""
    device = dev / "userfaultfd"
    if hypervisor_version >= DEVICE_SINCE:
        try:
            found = device.stat()
        except OSError:
            return f"guests run as user {uid}, vm.unprivileged_userfaultfd is 0 and {device} is missing"
        # An access list or a group may let the user in: only what nobody but root can open is known not to work.
        if found.st_uid == uid or found.st_mode & 0o066:
            return ""
    return f"guests run as user {uid}, and vm.unprivileged_userfaultfd is 0: set it to 1 for post-copy"
