"""From the options of ``boot`` to an instance: pure, apart from the files that the operator names."""

from __future__ import annotations

import argparse
import base64
import json
import uuid
from pathlib import Path
from typing import Any, TypeVar

from compute_worker import objects
from compute_worker.ctl.exits import UsageError
from compute_worker.ctl.text import safe
from compute_worker.errors import InvalidCommand
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, Flavor, ImageMeta, InjectedFile, Instance, Vif

T = TypeVar("T")

LARGEST_FILE = 65_536
"""Bytes of all injected files together, as base64, that a worker takes."""
_NAMESPACE = uuid.UUID("0d3c1f6e-7d3b-4b43-9a55-6c0f2b8d7e11")
_VIF_FIELDS = frozenset({"id", "mac", "bridge", "model", "mtu", "devname", "wait"})


def instance_of(args: argparse.Namespace) -> Instance:
    """The instance that the options describe.

    :raises UsageError: naming the option and what is wrong with it.
    """
    uuid_ = args.uuid or str(uuid.uuid4())
    ephemerals = [ephemeral_of(text) for text in args.ephemeral]
    flavor = flavor_of(args.flavor, args.swap, sum(disk.size_gb for disk in ephemerals))
    return _made(
        Instance,
        "boot",
        uuid=uuid_,
        name=args.name,
        flavor=flavor,
        image=image_of(args),
        vifs=[vif_of(text, f"{uuid_}/{number}") for number, text in enumerate(args.vif)],
        block_device_info=BlockDeviceInfo(ephemerals=ephemerals),
        config_drive=args.config_drive or bool(args.file),
        hostname=args.hostname,
        kernel_cmdline=args.kernel_cmdline,
        metadata=dict(pair("--meta", text) for text in args.meta),
        user_data=_text_file("--user-data", args.user_data) if args.user_data else None,
    )


def flavor_of(text: str, swap_mb: int = 0, ephemeral_gb: int = 0) -> Flavor:
    """``VCPUS/MEMORY_MB/ROOT_GB``; without the last part the root disk is as large as the image."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise UsageError(f"--flavor {safe(text)!r}: give VCPUS/MEMORY_MB/ROOT_GB, such as 2/2048/20")
    vcpus, memory, root = (*map(int, parts), 0)[:3]
    return _made(
        Flavor,
        "--flavor",
        vcpus=vcpus,
        memory_mb=memory,
        root_gb=root,
        swap_mb=swap_mb,
        ephemeral_gb=ephemeral_gb,
    )


def image_of(args: argparse.Namespace) -> ImageMeta:
    """The image, by its options or as a whole from a JSON file."""
    if args.image_json:
        if args.image:
            raise UsageError("--image and --image-json: give one of them")
        try:
            raw = json.loads(_text_file("--image-json", args.image_json))
        except ValueError as exc:
            raise UsageError(f"--image-json {safe(args.image_json)}: it is no JSON: {exc}") from None
        return checked(raw, ImageMeta, "--image-json")
    if not args.image:
        raise UsageError("say what to boot: --image ID, or --image-json FILE")
    return _made(
        ImageMeta,
        "--image",
        id=args.image,
        store=args.store,
        disk_format=args.disk_format,
        kernel_id=args.kernel,
        ramdisk_id=args.ramdisk,
        os_type=args.os_type,
    )


def ephemeral_of(text: str) -> EphemeralDisk:
    """``SIZE_GB`` or ``SIZE_GB:FORMAT``."""
    size, _, fmt = text.partition(":")
    if not (size.isascii() and size.isdigit()):
        raise UsageError(f"--ephemeral {safe(text)!r}: give SIZE_GB or SIZE_GB:FORMAT, such as 10:ext4")
    return _made(EphemeralDisk, "--ephemeral", size_gb=int(size), guest_format=fmt or None)


def vif_of(text: str, whose: str) -> Vif:
    """``bridge=br0,mac=52:54:00:12:34:56``: also ``id``, ``model``, ``mtu``, ``devname``; ``wait`` for the plug event.

    Id and mac, where they are left out, follow from ``whose``: the same command repeated is the same command.
    """
    pairs = dict(pair("--vif", part) if "=" in part else (part, "true") for part in text.split(",") if part)
    unknown = pairs.keys() - _VIF_FIELDS
    if unknown:
        raise UsageError(f"--vif: no {safe(sorted(unknown)[0])!r}; there are {', '.join(sorted(_VIF_FIELDS))}")
    wait = pairs.pop("wait", "false")
    if wait not in ("true", "false"):
        raise UsageError(f"--vif wait={safe(wait)}: true or false")
    made_up = uuid.uuid5(_NAMESPACE, whose)
    fields: dict[str, Any] = {"id": str(made_up), "mac": mac_of(made_up), **pairs, "wait_for_plug": wait == "true"}
    if "mtu" in fields:
        if not fields["mtu"].isdigit():
            raise UsageError(f"--vif mtu={safe(fields['mtu'])}: give a number of bytes")
        fields["mtu"] = int(fields["mtu"])
    return checked(fields, Vif, "--vif")


def mac_of(vif: uuid.UUID) -> str:
    """A MAC address of QEMU's range."""
    return "52:54:00:" + vif.bytes[:3].hex(":")


def injected_of(texts: list[str]) -> list[InjectedFile]:
    """``PATH=LOCAL``: the content of a local file for a path in the guest."""
    found = []
    for text in texts:
        path, local = pair("--file", text)
        content = base64.b64encode(_bytes_file("--file", local)).decode()
        found.append(_made(InjectedFile, "--file", path=path, content_base64=content))
    if sum(len(f.content_base64) for f in found) > LARGEST_FILE:
        raise UsageError(f"--file: all files together exceed {LARGEST_FILE} bytes as base64")
    return found


def password_of(path: str | None) -> str | None:
    """The first line of a file: a password never stands in an argument vector."""
    return _text_file("--admin-password-file", path).split("\n", 1)[0] if path else None


def pair(option: str, text: str) -> tuple[str, str]:
    """``NAME=VALUE`` of the option.

    :raises UsageError: it is something else.
    """
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise UsageError(f"{option} {safe(text)!r}: give NAME=VALUE")
    return name, value


def _bytes_file(option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise UsageError(f"{option} {safe(path)}: {exc.strerror}") from None


def _text_file(option: str, path: str) -> str:
    try:
        return _bytes_file(option, path).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{option} {safe(path)}: it is no UTF-8 text") from None


def _made(type_: type[T], option: str, **fields: Any) -> T:
    """An object checked as a worker would check it."""
    return checked(objects.encode(fields), type_, option)


def checked(raw: Any, type_: type[T], option: str) -> T:
    """``raw`` as an object of ours.

    :raises UsageError: naming the option and what is wrong with its value.
    """
    try:
        made: T = objects.decode(raw, type_, option)
    except InvalidCommand as exc:
        raise UsageError(safe(exc.message)) from None
    return made
