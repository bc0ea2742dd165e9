from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.objects import Flavor, Instance
from tests.ctl.cell import IMAGE, CtlCell
from tests.examples.load import EXAMPLES, example
from tests.waiting import wait_for

mover = example("mover")
BIGGER = Flavor(vcpus=2, memory_mb=256, root_gb=2)
# Names of their own: the broker in this process is one for all cells.
A, B, C = "mover1", "mover2", "mover3"


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[CtlCell]:
    with CtlCell([A, B, C], tmp_path / "movers", compute={"peer_ask_interval": 0.2}) as cell:
        (cell.directory / "images" / IMAGE).write_bytes(b"an image")
        cell.ready()
        yield cell


@pytest.fixture
def on(cell: CtlCell) -> Iterator[Any]:
    topic = cell.settings[A].telemetry.notification_topic
    made = mover.Mover(
        cell.api, cell.transport, exchange=cell.exchange, topic=topic, url=cell.url, say=lambda text: None
    )
    assert made.discover(5.0, expected=3) == [A, B, C]
    with made.listening():
        yield made


def booted(cell: CtlCell, name: str = "vm", host: str = A) -> Instance:
    return cell.api.get_instance(cell.boot(name, "--host", host), host=host)


def test_a_resize_is_followed_and_confirmed(cell: CtlCell, on: Any) -> None:
    instance = booted(cell)
    move = on.move(instance, BIGGER)
    assert on.run_moves(30)
    assert move.state == "confirmed" and move.host in (B, C)
    now = cell.api.get_instance(instance.uuid, host=move.host)
    assert now.flavor == BIGGER and now.vm_state == "active"
    assert cell.simulated(move.host).running(instance.uuid)


def test_a_destination_that_refuses_is_followed_by_the_next(
    cell: CtlCell, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = booted(cell)
    cell.api.disable_host("fan", host=B)
    monkeypatch.setattr(on, "_refresh", lambda: None)
    assert mover.candidates(on.hosts.values(), instance.flavor, [A]) == [B, C], "it does not know that B is disabled"
    move = on.move(instance)
    assert on.run_moves(30)
    assert (move.state, move.host) == ("confirmed", C)


def test_a_move_that_fails_leaves_the_guest_where_it_was(cell: CtlCell, on: Any) -> None:
    instance = booted(cell)
    for host in (B, C):
        cell.simulated(host).faults.fail("define", errors.GuestFailed(instance=instance.uuid, reason="no such machine"))
    move = on.move(instance)
    assert on.run_moves(30)
    assert move.state == "failed" and "no such machine" in move.error and move.host == A
    # The destination's word comes first; the source starts the guest when it has heard it.
    wait_for(lambda: cell.simulated(A).running(instance.uuid), 30, "the guest to run on its source again")


def test_a_lost_answer_is_no_second_move(cell: CtlCell, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instance, real, sent = booted(cell), cell.api.prep_resize, []

    def answer_is_lost(*args: Any, host: str, **options: Any) -> Any:
        sent.append(options["operation"])
        answer = real(*args, host=host, **options)
        if len(sent) == 1:
            raise errors.PeerUnavailable(host=host)
        return answer

    monkeypatch.setattr(cell.api, "prep_resize", answer_is_lost)
    move = on.move(instance)
    assert on.run_moves(30)
    assert move.state == "confirmed" and sent == [move.operation] * 2


def test_without_a_single_notification(cell: CtlCell, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on, "_hear", lambda *heard: None)
    move = on.move(booted(cell))
    assert on.run_moves(30) and move.state == "confirmed"


def test_a_host_is_emptied(cell: CtlCell, on: Any) -> None:
    uuids = {booted(cell, f"vm{n}").uuid for n in range(3)}
    asleep = booted(cell, "asleep")
    assert cell.ctl("suspend", asleep.uuid).code == 0
    stays = on.drain(A, at_once=2, seconds=30)
    assert len(stays) == 1 and stays[0].startswith("asleep: ")
    assert [i.uuid for i in cell.api.list_instances(host=A)] == [asleep.uuid]
    assert {i.uuid for host in (B, C) for i in cell.api.list_instances(host=host)} == uuids
    assert not cell.api.get_host_state(host=A).enabled


def test_a_running_guest_moves_while_it_runs(cell: CtlCell, on: Any) -> None:
    instance = booted(cell)
    token = cell.simulated(A).guest_memory(instance.uuid)[0]
    move = on.move_live(instance)
    assert on.run_moves(30) and (move.state, move.live) == ("moved", True)
    assert move.host in (B, C) and cell.simulated(move.host).guest_memory(instance.uuid)[0] == token


def test_one_that_nobody_can_take_live_leaves_its_host_cold(cell: CtlCell, on: Any) -> None:
    instance = booted(cell)
    for host in (B, C):
        cell.simulated(host).cpu_model = "another"
    assert on.move_live(instance) is None
    assert on.drain(A, seconds=30) == []
    assert [m.state for m in on.moves.values()] == ["confirmed"]


def test_one_that_fails_on_its_way_runs_on(cell: CtlCell, on: Any) -> None:
    instance = booted(cell)
    for host in (B, C):
        cell.simulated(host).faults.fail("receive", errors.DiskFull(path="instances"), times=None, uuid=instance.uuid)
    move = on.move_live(instance)
    assert on.run_moves(30)
    assert (move.state, move.host) == ("failed", A) and "no space left" in move.error
    assert cell.simulated(A).running(instance.uuid)


def test_nowhere_to_go(cell: CtlCell, on: Any) -> None:
    instance = booted(cell)
    for host in (B, C):
        cell.api.disable_host("fan", host=host)
    with pytest.raises(RuntimeError, match="no other host has room"):
        on.move(instance)


def test_the_program(tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "mover.py"), "--embedded"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done
    assert done.stdout.splitlines()[-1].endswith(" is empty") and done.stderr == ""
    environment = {k: v for k, v in os.environ.items() if k != "COMPUTE_WORKER_TRANSPORT_URL"}
    bare = subprocess.run(program[:2], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert bare.returncode == 2 and "--embedded" in bare.stderr
