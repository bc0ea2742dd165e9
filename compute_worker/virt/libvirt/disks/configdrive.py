"""The config drive: a small ISO with the label ``config-2`` that tells a guest who it is.

Layout of OpenStack's metadata (what cloud-init's ConfigDrive data source reads): ``openstack/latest/`` with
``meta_data.json``, ``network_data.json``, ``vendor_data.json`` and ``user_data``; injected files are numbered in
``openstack/content/`` and named in ``meta_data.json``, so that no path of a tenant is ever a path here.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compute_worker.images import files
from compute_worker.objects import Instance
from compute_worker.virt.libvirt.disks import process
from compute_worker.virt.libvirt.disks.process import Limits

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job, SpawnRequest

LABEL = "config-2"
PROGRAM = "xorriso"
_LIMITS = Limits(cpu_seconds=60, address_space_bytes=1 << 30)
_VERSION = "latest"


def meta_data(instance: Instance, request: SpawnRequest) -> dict[str, Any]:
    """``meta_data.json``."""
    data: dict[str, Any] = {
        "uuid": instance.uuid,
        "name": instance.name,
        "hostname": instance.hostname or instance.name or instance.uuid,
        "launch_index": 0,
        "meta": dict(instance.metadata),
        "random_seed": base64.b64encode(os.urandom(512)).decode(),
    }
    if request.admin_password is not None:
        data["admin_pass"] = request.admin_password
    if request.injected_files:
        data["files"] = [
            {"path": file.path, "content_path": f"/content/{index:04}"}
            for index, file in enumerate(request.injected_files)
        ]
    return data


def network_data(instance: Instance) -> dict[str, Any]:
    """``network_data.json``: every interface, each to be configured by DHCP."""
    links = [
        {
            "id": vif.devname or f"tap{vif.id[:11]}",
            "vif_id": vif.id,
            "type": "bridge" if vif.bridge else "phy",
            "ethernet_mac_address": vif.mac,
            "mtu": vif.mtu,
        }
        for vif in instance.vifs
    ]
    networks = [
        {"id": f"network{index}", "type": "ipv4_dhcp", "link": link["id"], "network_id": link["vif_id"]}
        for index, link in enumerate(links)
    ]
    return {"links": links, "networks": networks, "services": []}


def content(instance: Instance, request: SpawnRequest) -> dict[str, bytes]:
    """Every file of the drive, by its path in it."""
    latest = f"openstack/{_VERSION}"
    tree = {
        f"{latest}/meta_data.json": _json(meta_data(instance, request)),
        f"{latest}/network_data.json": _json(network_data(instance)),
        f"{latest}/vendor_data.json": _json({}),
    }
    if instance.user_data is not None:
        tree[f"{latest}/user_data"] = instance.user_data.encode()
    for index, file in enumerate(request.injected_files):
        tree[f"openstack/content/{index:04}"] = base64.b64decode(file.content_base64, validate=True)
    return tree


def build(path: Path, instance: Instance, request: SpawnRequest, job: Job) -> None:
    """Make the ISO at ``path`` (a ``.part``), mode 0600: it may hold a password.

    If the process dies inside, ``path`` and the directory ``<path without .part>.tree.part`` are garbage.

    :raises compute_worker.errors.CommandFailed: xorriso is missing or failed.
    """
    tree = path.with_name(path.name.removesuffix(".part") + ".tree.part")
    with files.disk_errors(path):
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(mode=0o700)
        try:
            for name, data in content(instance, request).items():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_bytes(data)
            files.create_private(path)
            options = ["-no_rc", "-as", "mkisofs", "-quiet", "-J", "-r", "-V", LABEL]
            words: list[str | Path] = [PROGRAM, *options, "-o", path, tree]
            process.run(words, job, limits=_LIMITS, writes=path)
        finally:
            shutil.rmtree(tree, ignore_errors=True)


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1, sort_keys=True).encode()
