"""Scenes in which images are made of guests: while they write, once more from what changed, and of one that is off."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import msgspec

from compute_worker import objects
from compute_worker.ctl.text import amount, span
from compute_worker.demo.moving import Heartbeat
from compute_worker.demo.stage import FIRST, Scene, Stage
from compute_worker.objects import ImageMeta, Operation

COPY = "copy"
"""Name of the guest that boots from the image of another."""


@dataclass(frozen=True)
class Taken:
    """A snapshot that has ended. Bytes; seconds."""

    image: ImageMeta
    read_bytes: int
    seconds: float


def live(stage: Stage) -> str:
    """Of a guest that goes on counting: never undefined, hardly ever silent."""
    uuid_, _ = stage.guest(FIRST)
    before = stage.counter(FIRST)
    with Heartbeat(lambda: stage.cell.alive(uuid_)) as beats:
        taken = take(stage, FIRST)
    later = stage.tick_after(FIRST, before, f"{FIRST} to go on counting")
    return f"{words(taken)}; {FIRST} silent for {span(beats.longest)} at most, tick {before}, then {later}"


def boot_a_second(stage: Stage) -> str:
    """On the other host, from the image: it has what the first had then, and nothing that the first wrote later."""
    uuid_, host = stage.guest(FIRST)
    other = next(name for name in stage.cell.hosts if name != host)
    listed = stage.api.list_images(None, {"instance_uuid": uuid_}, host=other)
    stage.require(bool(listed), f"host {other} does not see the image in its store")
    image = listed[0].image
    new = stage.make(COPY, image)
    flavor = msgspec.structs.replace(new.flavor, root_gb=max(new.flavor.root_gb, image.min_disk_gb))
    stage.end_of(stage.send_boot(other, msgspec.structs.replace(new, flavor=flavor)))
    tick = stage.booted(COPY, 1)
    if not stage.cell.guest.keeps_count:
        return f"{COPY} ticks on {other} ({tick})"
    ahead = stage.counter(FIRST)
    stage.require(0 < tick <= ahead + 1, f"{COPY} counts {tick}, and {FIRST} {ahead}")
    return f"{COPY} runs on {other}: counts {tick}, where {FIRST} has {ahead}"


def second(stage: Stage) -> str:
    """Of the same guest, a while later: where the driver can, only what changed is read from its disk."""
    before = stage.counter(FIRST)
    later = stage.tick_after(FIRST, before, f"{FIRST} to write more")
    return f"{words(take(stage, FIRST))}; counter {later}"


def cold(stage: Stage) -> str:
    """Of the copy, shut down; then it goes."""
    stage.command(COPY, "stop_instance")
    taken = take(stage, COPY)
    stage.command(COPY, "terminate_instance")
    del stage.memory.guests[COPY]
    return words(taken)


SCENES = (
    Scene("snapshot of a guest that goes on writing", live),
    Scene("a second guest boots from that image", boot_a_second),
    Scene("a second snapshot, of what changed", second),
    Scene("snapshot of a guest that is off", cold),
)


def take(stage: Stage, name: str) -> Taken:
    """Snapshot a guest; the store then lists the image."""
    uuid_, host = stage.guest(name)
    image = str(uuid.uuid4())
    ended: Operation = stage.end_of(stage.api.snapshot_instance(uuid_, image, host=host))
    made: ImageMeta = objects.decode(ended.result["image"], ImageMeta, "the image")
    listed = [entry.image.id for entry in stage.api.list_images(None, {"instance_uuid": uuid_}, host=host)]
    stage.require(listed[:1] == [image], f"the store lists {listed}, not {image} first")
    read = int(ended.result.get("how", {}).get("read_bytes", 0))
    return Taken(made, read, ended.updated_at - ended.created_at)


def words(taken: Taken) -> str:
    """How large, how long, how much was read."""
    size = amount(taken.image.size_bytes or 0)
    return f"{taken.image.disk_format} of {size} in {span(taken.seconds)}, {amount(taken.read_bytes)} read"
