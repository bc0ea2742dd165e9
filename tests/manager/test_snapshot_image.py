"""What the image of a snapshot says of itself, and which backups go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.images.store import ORIGIN
from compute_worker.manager.snapshot_image import beyond_rotation, check, describe
from compute_worker.objects import Flavor, ImageMeta, SnapshotOptions, StoredImage
from tests.manager.machine import make_instance

OPERATION = "aaaaaaaa-0000-4000-8000-000000000001"


def described(options: SnapshotOptions = SnapshotOptions(), backup_type: str | None = None, **changes):  # noqa: B008
    instance = make_instance(**changes)
    return describe(
        instance, "snap", options, operation=OPERATION, default_format="qcow2", backup_type=backup_type
    )


def test_what_held_for_the_old_image_holds_for_the_new():
    old = ImageMeta(
        id="old",
        min_ram_mb=512,
        os_type="linux",
        kernel_id="k",
        ramdisk_id="r",
        checksum_algorithm="sha256",
        checksum="0" * 64,
        size_bytes=5,
        properties={"hw_disk_bus": "virtio", "img_signature": "x", "backup_type": "daily", ORIGIN: "another"},
    )
    image = described(image=old)
    assert (image.min_ram_mb, image.os_type, image.kernel_id, image.ramdisk_id) == (512, "linux", "k", "r")
    assert (image.size_bytes, image.checksum) == (None, None)
    assert image.properties == {
        "hw_disk_bus": "virtio",
        ORIGIN: OPERATION,
        "instance_uuid": make_instance().uuid,
        "base_image_ref": "old",
        "image_type": "snapshot",
    }


def test_the_smallest_disk_is_the_instances():
    assert described(flavor=Flavor(vcpus=1, memory_mb=64, root_gb=7)).min_disk_gb == 7
    as_large_as_its_image = {"flavor": Flavor(vcpus=1, memory_mb=64), "image": ImageMeta(id="x", min_disk_gb=3)}
    assert described(**as_large_as_its_image).min_disk_gb == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SnapshotOptions(), "qcow2"),
        (SnapshotOptions(disk_format="raw"), "raw"),
        (SnapshotOptions(compression="zstd"), "qcow2"),
    ],
)
def test_its_format(options, expected):
    assert described(options).disk_format == expected


def test_a_name_is_never_too_long():
    assert described(name="x" * 255).name == "x" * 255
    assert described(SnapshotOptions(name="mine")).name == "mine"
    assert described(name="").name.startswith(make_instance().uuid)


@pytest.mark.parametrize(
    "options",
    [
        SnapshotOptions(disk_format="raw", compression="zlib"),
        SnapshotOptions(properties={ORIGIN: "x"}),
        SnapshotOptions(properties={"image_type": "x"}),
    ],
)
def test_what_contradicts_itself_is_refused(options):
    with pytest.raises(errors.InvalidCommand, match="options"):
        check(options, "snapshot_instance")


@given(ages=st.lists(st.integers(0, 9), max_size=8), rotation=st.integers(1, 10))
def test_rotation(ages, rotation):
    found = [StoredImage(image=ImageMeta(id=f"b{n}"), created_at=float(age)) for n, age in enumerate(ages)]
    newest = StoredImage(image=ImageMeta(id="new"), created_at=0.0)
    gone = beyond_rotation([*found, newest], "new", rotation)
    assert gone == beyond_rotation(found, "new", rotation)
    assert "new" not in gone
    kept = [entry for entry in found if entry.image.id not in gone]
    assert len(kept) == min(len(found), rotation - 1)
    age = {entry.image.id: entry.created_at for entry in found}
    assert all(entry.created_at >= age[name] for entry in kept for name in gone)
    assert [age[name] for name in gone] == sorted(age[name] for name in gone)
