"""What every driver refuses before it touches anything, decided from the command alone."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Sequence

from compute_worker.errors import InvalidBDMFormat, InvalidCommand, NotSupported
from compute_worker.objects import InjectedFile, Instance
from compute_worker.virt.driver import SpawnRequest

METHOD = "build_and_run_instance"
MAX_INJECTED_BYTES = 65_536


def check_request(instance: Instance, request: SpawnRequest, guest_formats: Collection[str]) -> None:
    """Refuse volumes, file systems that nobody can make, disks beyond the flavor, and malformed injected files.

    :param guest_formats: file systems that the driver can make.
    :raises NotSupported: volumes.
    :raises InvalidBDMFormat: a ``guest_format`` that is not one of ``guest_formats``.
    :raises InvalidCommand: anything else, naming the field.
    """
    info, flavor = instance.block_device_info, instance.flavor
    if info.block_device_mapping:
        raise NotSupported(what="attaching volumes, or booting from one,")
    for disk in info.ephemerals:
        if disk.guest_format is not None and disk.guest_format not in guest_formats:
            raise InvalidBDMFormat(fmt=disk.guest_format)
    wanted = sum(disk.size_gb for disk in info.ephemerals)
    if wanted > flavor.ephemeral_gb:
        raise _invalid(f"block_device_info.ephemerals: {wanted} GiB in all, the flavor has {flavor.ephemeral_gb}")
    if info.swap_mb is not None and info.swap_mb > flavor.swap_mb:
        raise _invalid(f"block_device_info.swap_mb: {info.swap_mb}, the flavor has {flavor.swap_mb}")
    _check_vifs(instance)
    _check_files(request.injected_files)


def swap_mb(instance: Instance) -> int:
    """MiB of swap disk: the block device info's wish, else the flavor's."""
    wish = instance.block_device_info.swap_mb
    return instance.flavor.swap_mb if wish is None else wish


def tap_name(vif_id: str, devname: str | None) -> str:
    """Name of an interface on the host."""
    return devname or f"tap{vif_id[:11]}"


def _check_vifs(instance: Instance) -> None:
    for field, values in (
        ("id", [v.id for v in instance.vifs]),
        ("mac", [v.mac for v in instance.vifs]),
        ("devname", [tap_name(v.id, v.devname) for v in instance.vifs]),
    ):
        if len(set(values)) != len(values):
            raise _invalid(f"vifs: two of them have the same {field}")


def _check_files(files: Sequence[InjectedFile]) -> None:
    total = 0
    for file in files:
        try:
            total += len(base64.b64decode(file.content_base64, validate=True))
        except (binascii.Error, ValueError):
            raise _invalid(f"injected_files: the content of {file.path!r} is not base64") from None
        if ".." in file.path.split("/"):
            raise _invalid(f"injected_files: {file.path!r} climbs out of its directory")
    if total > MAX_INJECTED_BYTES:
        raise _invalid(f"injected_files: {total} bytes in all, at most {MAX_INJECTED_BYTES}")


def _invalid(problem: str) -> InvalidCommand:
    return InvalidCommand(method=METHOD, problem=problem)
