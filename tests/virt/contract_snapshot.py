"""The contract of snapshots. See ``contract``."""

from __future__ import annotations

from typing import Any

import pytest

from compute_worker import errors, objects
from compute_worker.images.store import ORIGIN
from compute_worker.objects import Instance
from compute_worker.virt.driver import SnapshotRequest, SpawnRequest
from tests.virt.contract import booted
from tests.virt.contract_moves import _Moves
from tests.virt.jobs import RecordingJob
from tests.virt.world import SNAPSHOT, World, run, undo


def asked(instance: Instance, image_id: str | None = None, live: bool = True, **changes: Any) -> SnapshotRequest:
    """A snapshot as the manager asks for it."""
    image = objects.ImageMeta(
        id=image_id or f"snap-{instance.uuid}",
        disk_format=changes.pop("disk_format", "qcow2"),
        properties={ORIGIN: "made-by-this-test"},
    )
    return SnapshotRequest(image=image, live=live, **changes)


class SnapshotContract(_Moves):
    """Snapshots."""

    needs = SNAPSHOT

    @pytest.mark.parametrize("live", [True, False])
    @pytest.mark.parametrize("times", [1, 2])
    def test_snapshot_of_a_running_guest(self, world: World, live: bool, times: int) -> None:
        driver, instance = booted(world)
        token, _ = world.memory(world.a, instance.uuid)
        image_id = f"snap-{instance.uuid}"
        told = run(driver.snapshot(instance, asked(instance, live=live)), RecordingJob(), times)
        image = objects.decode(told["image"], objects.ImageMeta, "test")
        assert image.id == image_id and image.size_bytes
        assert image_id in world.images()
        assert world.power(world.a, instance.uuid) == "running"
        assert world.memory(world.a, instance.uuid)[0] == token
        assert not [f for f in world.files(world.a, instance.uuid) if image_id in f]
        assert image.checksum and image.disk_format == "qcow2"
        other = world.new_instance(world.b, image=image)
        run(world.driver(world.b).spawn(other, SpawnRequest()), RecordingJob())
        assert world.power(world.b, other.uuid) == "paused"

    def test_snapshot_of_a_guest_that_is_off(self, world: World) -> None:
        driver, instance = booted(world)
        driver.power_off(instance, RecordingJob())
        run(driver.snapshot(instance, asked(instance, live=False)), RecordingJob())
        assert world.power(world.a, instance.uuid) == "shutdown"
        assert f"snap-{instance.uuid}" in world.images()

    @pytest.mark.parametrize("done", range(5))
    def test_undone_no_image_is_left(self, world: World, done: int) -> None:
        driver, instance = booted(world)
        images, files = world.images(), world.files(world.a, instance.uuid)
        parts = driver.snapshot(instance, asked(instance))
        run(parts[:done], RecordingJob())
        undo(parts[: done + 1], RecordingJob(), 2)
        assert world.images() == images
        assert world.files(world.a, instance.uuid) == files
        assert world.power(world.a, instance.uuid) == "running"

    @pytest.mark.parametrize(
        ("disk_format", "compression"), [("raw", "none"), ("qcow2", "zlib"), ("qcow2", "zstd")]
    )
    def test_in_the_format_that_is_asked_for(self, world: World, disk_format: str, compression: str) -> None:
        driver, instance = booted(world)
        request = asked(instance, disk_format=disk_format, compression=compression)
        told = run(driver.snapshot(instance, request), RecordingJob())
        image = objects.decode(told["image"], objects.ImageMeta, "test")
        assert image.disk_format == disk_format
        other = world.new_instance(world.b, image=image)
        run(world.driver(world.b).spawn(other, SpawnRequest()), RecordingJob())
        assert world.power(world.b, other.uuid) == "paused"

    def test_the_store_lists_it_and_lets_it_go(self, world: World) -> None:
        driver, instance = booted(world)
        run(driver.snapshot(instance, asked(instance)), RecordingJob())
        store = driver.image_store(None)
        found = store.list_images({ORIGIN: "made-by-this-test"})
        mine = [entry for entry in found if entry.image.id == f"snap-{instance.uuid}"]
        assert len(mine) == 1 and mine[0].image.disk_format == "qcow2" and mine[0].created_at > 0
        store.delete(mine[0].image.id)
        assert mine[0].image.id not in world.images()

    def test_a_store_that_is_not_there(self, world: World) -> None:
        driver, instance = booted(world)
        image = objects.ImageMeta(id="x", store="nosuch")
        with pytest.raises(errors.NotSupported):
            driver.snapshot(instance, SnapshotRequest(image))

    def test_an_image_of_somebody_else_is_not_replaced(self, world: World) -> None:
        driver, instance = booted(world)
        taken = instance.image.id
        with pytest.raises(errors.ImageUnacceptable):
            run(parts := driver.snapshot(instance, asked(instance, taken)), RecordingJob())
        undo(parts, RecordingJob())
        assert taken in world.images()
