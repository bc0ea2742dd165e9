"""Whether guests run on the processor's own virtualisation (KVM) or are emulated: decided once, with the reason."""

from __future__ import annotations

import errno
import os

from compute_worker import errors
from compute_worker.virt.libvirt.accounts import groups_of, may

KVM_DEVICE = "/dev/kvm"


def probe_kvm(user: tuple[int, int] | None, device: str = KVM_DEVICE) -> tuple[bool, str]:
    """Whether guests can use the device of KVM, and what was seen.

    libvirt offers ``kvm`` also where its guests may not open the device, and they would then fail to start.

    :param user: user and group that guests run as; ``None``: libvirt does not say, and it has to be open to us.
    """
    try:
        found = os.stat(device)
        ours = _opens(device)
    except OSError as exc:
        return False, f"{device}: {os.strerror(exc.errno or errno.EIO)}"
    if user is None:
        if ours:
            return True, f"{device} opens"
        return False, f"{device} is closed to this user, and libvirt does not say which user runs guests"
    if not may(6, found, user[0], groups_of(*user)):
        return False, f"{device} is closed to user {user[0]}, who runs guests: make it a member of group {found.st_gid}"
    return True, f"{device} {'opens' if ours else 'is there'}, open to user {user[0]}, who runs guests"


def _opens(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return False
    return True


def choose_domain_type(
    wish: str, offered: frozenset[str], device: tuple[bool, str], kvm_capable: tuple[bool, str]
) -> tuple[str, str]:
    """The type guests get, and why.

    :param wish: ``auto``, ``kvm`` or ``qemu`` (the option ``virt_type``).
    :param offered: domain types in libvirt's capabilities.
    :param device: what :func:`probe_kvm` saw.
    :param kvm_capable: whether libvirt's domain capabilities for ``kvm`` exist, and its words.
    :raises Broken: the wish cannot be met, or libvirt offers nothing we can run.
    """
    problems = [
        text for good, text in (device, ("kvm" in offered, "libvirt does not offer kvm"), kvm_capable) if not good
    ]
    if wish == "kvm" and problems:
        raise errors.Broken(f"virt_type is kvm, which does not work here: {'; '.join(problems)}")
    if wish in ("auto", "kvm") and not problems:
        return "kvm", f"{device[1]}, and libvirt offers kvm"
    if "qemu" in offered:
        reason = "asked for by virt_type" if wish == "qemu" else f"kvm does not work here: {'; '.join(problems)}"
        return "qemu", f"{reason}; guests are emulated, which is slow"
    if "test" in offered:
        return "test", "libvirt's test driver"
    raise errors.Broken(
        f"libvirt offers neither kvm nor qemu guests here, only: {', '.join(sorted(offered)) or 'none'}"
    )
