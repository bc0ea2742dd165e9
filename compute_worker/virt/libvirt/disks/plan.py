"""Which disks an instance gets: decided from its record alone, before anything is made."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compute_worker import errors
from compute_worker.objects import Instance
from compute_worker.virt.libvirt.disks import ephemeral

if TYPE_CHECKING:
    from compute_worker.virt.driver import SpawnRequest

GIB = 1 << 30
MIB = 1 << 20
MAX_INJECTED_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class BlankDisk:
    """An ephemeral or swap disk: ``name`` in the instance directory, ``base`` in the cache."""

    name: str
    base: str
    fs: str
    size_bytes: int
    label: str
    reason: str


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What is made beside the root disk."""

    blanks: tuple[BlankDisk, ...] = ()
    config_drive: bool = False


def plan(instance: Instance, request: SpawnRequest, default_format: str, available: Collection[str]) -> DiskPlan:
    """The disks of ``instance``, or why it cannot have them.

    Ephemeral disks that are listed share ``flavor.ephemeral_gb`` and replace ``disk.local``; swap that is asked for
    lies within ``flavor.swap_mb``: more was never claimed.

    :raises compute_worker.errors.InvalidBDMFormat: a file system that this host cannot make.
    :raises compute_worker.errors.NotSupported: volumes.
    :raises compute_worker.errors.InvalidCommand: sizes beyond the flavor, bad or too much injected content.
    """
    if instance.block_device_info.block_device_mapping:
        raise errors.NotSupported(what="booting from or attaching a volume (block_device_mapping)")
    if instance.image.min_ram_mb > instance.flavor.memory_mb:
        raise _invalid(f"image needs {instance.image.min_ram_mb} MiB of memory, flavor has {instance.flavor.memory_mb}")
    _check_injected(request)
    blanks = [*_ephemerals(instance, default_format, available), *_swap(instance, available)]
    wanted = instance.config_drive or bool(request.injected_files) or request.admin_password is not None
    return DiskPlan(blanks=tuple(blanks), config_drive=wanted)


def _ephemerals(instance: Instance, default_format: str, available: Collection[str]) -> list[BlankDisk]:
    granted, listed = instance.flavor.ephemeral_gb, instance.block_device_info.ephemerals
    if sum(disk.size_gb for disk in listed) > granted:
        raise _invalid(f"ephemerals: together they exceed the {granted} GiB of the flavor (ephemeral_gb)")
    wanted = [(f"disk.eph{index}", disk.size_gb, disk.guest_format) for index, disk in enumerate(listed)]
    if granted and not wanted:
        wanted = [("disk.local", granted, None)]
    blanks = []
    for index, (name, size_gb, guest_format) in enumerate(wanted):
        fs, reason = ephemeral.choose_format(instance.image.os_type, guest_format, default_format, available)
        base = ephemeral.base_name(size_gb, fs, index)
        blanks.append(BlankDisk(name, base, fs, size_gb * GIB, f"ephemeral{index}", reason))
    return blanks


def _swap(instance: Instance, available: Collection[str]) -> list[BlankDisk]:
    asked, granted = instance.block_device_info.swap_mb, instance.flavor.swap_mb
    if asked is not None and asked > granted:
        raise _invalid(f"swap_mb: {asked} MiB exceed the {granted} MiB of the flavor")
    size_mb = granted if asked is None else asked
    if not size_mb:
        return []
    if "swap" not in available:
        raise errors.InvalidBDMFormat("swap areas cannot be made on this host: mkswap is missing", fmt="swap")
    return [BlankDisk("disk.swap", ephemeral.swap_base_name(size_mb), "swap", size_mb * MIB, "swap", "asked for")]


def _check_injected(request: SpawnRequest) -> None:
    total = 0
    for file in request.injected_files:
        try:
            total += len(base64.b64decode(file.content_base64, validate=True))
        except (binascii.Error, ValueError):
            raise _invalid(f"injected_files: the content of {file.path!r} is not base64") from None
    if total > MAX_INJECTED_BYTES:
        raise _invalid(f"injected_files: {total} bytes are more than {MAX_INJECTED_BYTES}")


def _invalid(problem: str) -> errors.InvalidCommand:
    return errors.InvalidCommand(method="build_and_run_instance", problem=problem)
