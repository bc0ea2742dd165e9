"""A host's disks in a directory, and what an instance looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compute_worker.config import Compute, Images, Libvirt, Settings
from compute_worker.objects import Flavor, ImageMeta, Instance
from compute_worker.virt.libvirt.disks.builder import DiskBuilder

UUID = "0c7e1b8c-93b6-4d55-8a0e-2a8a4f5b8f01"
OTHER = "0c7e1b8c-93b6-4d55-8a0e-2a8a4f5b8f02"
GIB = 1 << 30


def settings(root: Path, *, images: dict[str, Any] | None = None, libvirt: dict[str, Any] | None = None) -> Settings:
    (root / "images").mkdir(exist_ok=True)
    return Settings(
        compute=Compute(state_path=str(root)),
        images=Images(**{"file_path": str(root / "images"), **(images or {})}),
        libvirt=Libvirt(**(libvirt or {})),
    )


def builder(root: Path, **groups: Any) -> DiskBuilder:
    made = DiskBuilder(settings(root, **groups))
    made.prepare()
    return made


def instance(image: ImageMeta, flavor: dict[str, Any] | None = None, uuid: str = UUID, **fields: Any) -> Instance:
    return Instance(
        uuid=uuid, name="guest", image=image, flavor=Flavor(**{"vcpus": 1, "memory_mb": 64, **(flavor or {})}), **fields
    )


def tree(root: Path) -> set[str]:
    """Everything under `root` but lock files."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if "locks" not in path.relative_to(root).parts and path.relative_to(root) != Path("_base")
    }
