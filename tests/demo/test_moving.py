from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from compute_worker import errors
from compute_worker.ctl.output import Output
from compute_worker.demo import moving, scenario
from compute_worker.demo.embedded import EmbeddedDemo, embedded_demo
from compute_worker.demo.moving import Heartbeat, Moved, between
from compute_worker.demo.stage import SceneFailed, Stage
from compute_worker.objects import Operation, StepRecord
from compute_worker.states import OperationState, VmState
from tests.waiting import wait_for

NAME = scenario.FIRST


@pytest.fixture
def stage() -> Iterator[Stage]:
    with embedded_demo() as cell:
        stage = Stage(cell, Output(stdout=io.StringIO(), stderr=io.StringIO()))
        scenario.boot_with_kernel(stage)
        stage.booted(NAME, 1)
        yield stage


def test_heartbeat_is_the_longest_silence() -> None:
    said, lives = [0], threading.Event()
    lives.set()

    def alive() -> int | None:
        said[0] += 1
        return said[0] if lives.is_set() else None

    with Heartbeat(alive) as beats:
        wait_for(lambda: said[0] > 3, what="some signs of life")
        before = beats.longest
        lives.clear()
        seen = said[0]
        wait_for(lambda: said[0] > seen + 10, what="some silence")
        lives.set()
        wait_for(lambda: beats.longest > before, what="life again")
    assert 9 * moving.LOOK_SECONDS < beats.longest < 10
    with Heartbeat(lambda: "the same") as dead:
        assert dead.longest == 0.0


def operation(*steps: tuple[str, float, float]) -> Operation:
    records = [
        StepRecord(name=name, direction="do", state="done", started_at=began, ended_at=ended)
        for name, began, ended in steps
    ]
    return Operation(
        uuid="00000000-0000-4000-8000-000000000001", kind="k", host="h", state=OperationState.DONE, phase="done",
        created_at=0, updated_at=0, steps=records,
    )


def test_between_power_off_and_start() -> None:
    off = operation(("precopy", 1.0, 2.0), ("power_off", 2.0, 5.0), ("send_disk", 5.0, 9.0))
    assert between(off, "power_off", operation(("await_disks", 1.0, 9.0), ("resume_guest", 10.0, 12.5))) == 7.5


def test_a_resize_is_seen_from_outside(stage: Stage) -> None:
    uuid, source = stage.guest(NAME)
    told = moving.resize(stage, NAME)
    assert told.startswith("node1 -> node2, disk 1.0 GiB -> 2.0 GiB") and "off for" in told
    assert stage.guest(NAME) == (uuid, "node2") and source == "node1"
    told = moving.resize_and_revert(stage, NAME)
    assert told.startswith("node2 -> node1 and back, as it was") and "back: off for" in told
    assert stage.guest(NAME) == (uuid, "node2")
    scenario.delete(stage)
    assert scenario.nothing_left(stage)


def test_a_move_that_is_undone_is_no_success(stage: Stage) -> None:
    cell: Any = stage.cell
    cell._hosts["node2"].faults.fail("define", errors.GuestFailed(instance=NAME, reason="no such machine"))
    with pytest.raises(SceneFailed, match="prep_resize: undone: instance web: no such machine"):
        moving.resize(stage, NAME)


def test_a_disk_that_did_not_grow_is_no_success(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbeddedDemo, "root_disk_bytes", lambda *args: 96 << 20)
    with pytest.raises(SceneFailed, match="the guest's disk had 100663296 bytes and has 100663296"):
        moving.resize(stage, NAME)


def test_one_that_is_off_is_compared_and_goes_on_where_it_came_to(stage: Stage) -> None:
    uuid, _ = stage.guest(NAME)
    stage.command(NAME, "stop_instance")
    assert moving.resize_off(stage, NAME) == "node1 -> node2, 128 KiB are the same"
    assert stage.guest(NAME) == (uuid, "node2")
    told = scenario.start(stage)
    assert told.startswith("on node2, disk 1.0 GiB -> 2.0 GiB, ticks again")
    assert stage.api.get_instance(uuid, host="node2").vm_state is VmState.ACTIVE


def test_a_byte_that_changed_on_the_way_is_no_success(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid, _ = stage.guest(NAME)
    stage.command(NAME, "stop_instance")
    compare = EmbeddedDemo.compare

    def spoilt(cell: Any, source: str, dest: str, instance: str) -> str:
        disk = cell._hosts[dest].slots[uuid].directories[""]["disk"]
        disk.data = disk.data[:-1] + bytes([disk.data[-1] ^ 1])
        return compare(cell, source, dest, instance)

    monkeypatch.setattr(EmbeddedDemo, "compare", spoilt)
    with pytest.raises(AssertionError, match="the disk on node2 is another than the one that node1 has set aside"):
        moving.resize_off(stage, NAME)


def test_warm_and_cold_are_told_by_the_journal_of_the_source() -> None:
    def sent(reason: str | None) -> Operation:
        step = StepRecord(name="send_disk", direction="do", state="done", started_at=0, reason=reason)
        return msgspec.structs.replace(operation(), steps=[step])

    assert moving.sent_ahead(sent("disk: only what was written since precopy-18d59e6e had to be sent"))
    assert not moving.sent_ahead(sent("disk: it is sent whole")) and not moving.sent_ahead(sent(None))


def test_a_warm_resize_that_is_none_is_no_success(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    with Heartbeat(lambda: None) as beats:
        pass
    assert "no host here sends disks ahead" in moving._off(stage, beats, Moved("m", 2.0, False), "node2")
    monkeypatch.setattr(EmbeddedDemo, "sends_ahead", ("node2",))
    assert "off for 2.0 s of it (cold)" in moving._off(stage, beats, Moved("m", 2.0, False), "node1")
    for source, ahead in (("node2", False), ("node1", True)):
        with pytest.raises(SceneFailed, match=f"the disks of {source} went {'warm' if ahead else 'cold'}"):
            moving._off(stage, beats, Moved("m", 1.0, ahead), source)
    assert "off for 2.0 s of it (cold)" in moving._off(stage, beats, Moved("m", 2.0, False), "node1")
    assert "(warm; cold it was 2.0 s)" in moving._off(stage, beats, Moved("m", 0.5, True), "node2")


def test_a_copy_that_stays_is_no_success(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid, source = stage.guest(NAME)
    monkeypatch.setattr(EmbeddedDemo, "leftovers", lambda self: [f"{source}: resize {uuid}_resize"])
    with pytest.raises(SceneFailed, match="after the confirmation: node1: resize"):
        moving.resize(stage, NAME)


def test_a_counter_that_began_anew_is_no_success(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbeddedDemo, "guest", dataclasses.replace(EmbeddedDemo.guest, keeps_count=True))
    monkeypatch.setattr(stage, "counter", lambda name: 1_000_000)
    with pytest.raises(SceneFailed, match="web counted to 1000000, and from"):
        moving.resize(stage, NAME)


def test_heartbeat_hears_the_sign_that_it_ends_with(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [1]
    with Heartbeat(lambda: said[0]) as beats:
        wait_for(lambda: beats._signs, what="the first sign")
        monkeypatch.setattr(moving, "LOOK_SECONDS", 60.0)
        said[0] = 2
    assert len(beats._signs) == 2
