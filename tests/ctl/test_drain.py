from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl import drain
from tests.ctl.cell import IMAGE, CtlCell, Result
from tests.waiting import wait_for

# Names of their own: the broker in this process is one for all cells.
FULL, NEXT, OTHER = "drained", "next", "other"


@pytest.fixture
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlCell]:
    directory = tmp_path_factory.mktemp("drain")
    with CtlCell([FULL, NEXT, OTHER], directory, compute={"peer_ask_interval": 0.2}) as cell:
        (directory / "images" / IMAGE).write_bytes(b"image")
        cell.ready()
        yield cell


def boots(cell: CtlCell, count: int) -> list[str]:
    return [cell.boot(f"vm{n}", "--host", FULL) for n in range(count)]


def enabled(cell: CtlCell, host: str = FULL) -> bool:
    return cell.api.get_host_state(host=host).enabled


def test_a_dry_run_changes_nothing(cell: CtlCell) -> None:
    uuids = boots(cell, 2)
    told = cell.ctl("drain", FULL, "--dry-run")
    assert told.code == 0 and "2 instances would leave host drained, 0 would stay" in told.out
    assert all(uuid in told.out for uuid in uuids)
    document = cell.ctl("drain", FULL, "--dry-run", "--json").document
    assert {m["instance"] for m in document["plan"]["moves"]} == set(uuids)
    assert {m["to"] for m in document["plan"]["moves"]} == {NEXT, OTHER}, "they are spread"
    assert enabled(cell) and len(cell.api.list_instances(host=FULL)) == 2


def test_everything_leaves_and_is_confirmed(cell: CtlCell) -> None:
    uuids = boots(cell, 4)
    assert cell.ctl("stop", uuids[0]).code == 0
    told = cell.ctl("drain", FULL, "--how", "cold", "--confirm", "--parallel", "3")
    assert told.code == 0, told
    assert told.out.endswith("host drained is empty\n") and told.out.count("moved, confirmed") == 4
    assert not enabled(cell) and "being drained" in cell.ctl("hosts").out
    states = {i.uuid: i.vm_state.value for h in (NEXT, OTHER) for i in cell.api.list_instances(host=h)}
    assert states == {uuid: "stopped" if uuid == uuids[0] else "active" for uuid in uuids}
    assert cell.simulated(FULL).leftovers() == []
    again = cell.ctl("drain", FULL)
    assert again.code == 0 and "host drained has no instance" in again.out


def test_without_confirm_it_keeps_copies_and_is_not_empty(cell: CtlCell) -> None:
    boots(cell, 2)
    told = cell.ctl("drain", FULL, "--how", "cold")
    assert told.code == 1, told
    assert "host drained is not empty: 2 copies are kept until their moves are confirmed" in told.out
    assert "drain drained --confirm" in told.err
    later = cell.ctl("drain", FULL, "--confirm", "--json")
    assert later.code == 0 and later.document["empty"] is True and later.document["left"]["instances"] == []


def test_what_cannot_leave_is_named_and_stays(cell: CtlCell) -> None:
    goes, sleeps = boots(cell, 2)
    assert cell.ctl("suspend", sleeps).code == 0
    told = cell.ctl("drain", FULL, "--confirm")
    assert told.code == 1
    assert "it is suspended" in told.out and "host drained is not empty: 1 instances stay" in told.out
    assert [i.uuid for i in cell.api.list_instances(host=FULL)] == [sleeps]
    assert goes in {i.uuid for h in (NEXT, OTHER) for i in cell.api.list_instances(host=h)}


def test_one_that_fails_stays_as_it_was_and_the_rest_goes(cell: CtlCell) -> None:
    bad, good = boots(cell, 2)
    for host in (NEXT, OTHER):
        error = errors.GuestFailed(instance=bad, reason="no such machine type")
        cell.simulated(host).faults.fail("define", error, times=None, uuid=bad)
    told = cell.ctl("drain", FULL, "--how", "cold", "--confirm", "--json")
    assert told.code == 1
    results = {r["instance"]: r for r in told.document["results"]}
    assert not results[bad]["moved"] and "no such machine type" in results[bad]["reason"]
    assert results[good]["moved"] and results[good]["confirmed"]
    assert told.document["left"]["instances"] == [bad]
    assert cell.simulated(FULL).running(bad)


def test_a_busy_one_is_waited_for(cell: CtlCell) -> None:
    (uuid,) = boots(cell, 1)
    stall = cell.simulated(FULL).faults.stall("pause", uuid)
    assert cell.ctl("pause", uuid, "--no-wait").code == 0
    assert stall.entered.wait(10)
    told: list[Result] = []
    thread = threading.Thread(target=lambda: told.append(cell.ctl("drain", FULL, "--confirm")))
    thread.start()
    wait_for(lambda: not enabled(cell), what="the drain to begin")
    stall.release()
    thread.join(30)
    assert told[0].code == 0, told
    assert "busy: pausing" in told[0].out and "moved live" in told[0].out


def test_a_busy_one_is_not_waited_for_without_end(cell: CtlCell) -> None:
    (uuid,) = boots(cell, 1)
    stall = cell.simulated(FULL).faults.stall("pause", uuid)
    try:
        assert cell.ctl("pause", uuid, "--no-wait").code == 0
        assert stall.entered.wait(10)
        told = cell.ctl("drain", FULL, "--timeout", "0.1")
        assert told.code == 1 and "1 instances stay" in told.out
        assert "waiting for 1 instances that are busy" in told.err
    finally:
        stall.release()


def test_an_interrupt_leaves_what_was_sent_and_sends_no_more(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = boots(cell, 3)
    stall = cell.simulated(FULL).faults.stall("set_aside")
    real = drain.ThreadPoolExecutor.submit
    sent: list[Any] = []

    def interrupted(self: Any, *args: Any, **more: Any) -> Any:
        future = real(self, *args, **more)
        if args[0] is drain._leave:
            sent.append(future)
            if len(sent) == len(uuids):
                assert stall.entered.wait(10)
                raise KeyboardInterrupt
        return future

    monkeypatch.setattr(drain.ThreadPoolExecutor, "submit", interrupted)
    try:
        assert cell.ctl("drain", FULL, "--how", "cold", "--parallel", "1").code == 130
        assert [future.cancelled() for future in sent] == [False, True, True]
        wait_for(sent[0].done, what="the thread that followed to end")
        assert not sent[0].result().moved and "goes on" in sent[0].result().reason
    finally:
        stall.release()
    wait_for(lambda: len(cell.api.list_instances(host=FULL)) == 2, what="the one that was sent to leave")


def test_nothing_else_answers(cell: CtlCell) -> None:
    boots(cell, 1)
    for host in (NEXT, OTHER):
        cell.ctl("disable", host)
    told = cell.ctl("drain", FULL, "--dry-run")
    assert told.code == 1 and "no other host can take it" in told.out
    assert cell.ctl("drain", FULL, "--parallel", "0").code == 2
    assert cell.ctl("drain", "nobody").code == 4


def test_running_guests_leave_while_they_run_and_the_rest_cold(cell: CtlCell) -> None:
    runs, off = boots(cell, 2)
    token = cell.simulated(FULL).guest_memory(runs)[0]
    assert cell.ctl("stop", off).code == 0
    planned = {m["instance"]: m for m in cell.ctl("drain", FULL, "--dry-run", "--json").document["plan"]["moves"]}
    assert (planned[runs]["how"], planned[runs]["reason"]) == ("live", "it is active")
    assert (planned[off]["how"], planned[off]["reason"]) == ("cold", "it is stopped")
    told = cell.ctl("drain", FULL, "--confirm", "--json")
    assert told.code == 0, told
    results = {r["instance"]: r for r in told.document["results"]}
    assert (results[runs]["how"], results[off]["how"], results[off]["confirmed"]) == ("live", "cold", True)
    assert "stood still for" in results[runs]["reason"]
    assert cell.simulated(results[runs]["host"]).guest_memory(runs)[0] == token, "it booted anew"
    assert cell.simulated(FULL).leftovers() == []


def test_a_guest_that_nobody_can_take_live_goes_cold_and_the_plan_says_why(cell: CtlCell) -> None:
    (uuid,) = boots(cell, 1)
    for host in (NEXT, OTHER):
        cell.simulated(host).cpu_model = "another"
    told = cell.ctl("drain", FULL, "--dry-run")
    assert told.code == 0 and "not live: " in told.out and "its processor model is another" in told.out, told
    stays = cell.ctl("drain", FULL, "--dry-run", "--how", "live")
    assert stays.code == 1 and "not live: " in stays.out and "1 would stay" in stays.out
    assert cell.ctl("drain", FULL, "--confirm").code == 0
    assert uuid in {i.uuid for h in (NEXT, OTHER) for i in cell.api.list_instances(host=h)}


def test_the_first_host_that_can_take_it_live_is_taken(cell: CtlCell) -> None:
    (uuid,) = boots(cell, 1)
    states = sorted((s for s in cell.client().hosts() if s.host != FULL), key=lambda s: (-s.memory_mb.free, s.host))
    cell.simulated(states[0].host).cpu_model = "another"
    told = cell.ctl("drain", FULL, "--json")
    assert told.code == 0, told
    assert [(r["instance"], r["host"], r["how"]) for r in told.document["results"]] == [
        (uuid, states[1].host, "live")
    ]


def test_one_that_does_not_get_away_live_goes_on_where_it_is(cell: CtlCell) -> None:
    (uuid,) = boots(cell, 1)
    for host in (NEXT, OTHER):
        cell.simulated(host).faults.fail("receive", errors.DiskFull(path="instances"), times=None, uuid=uuid)
    told = cell.ctl("drain", FULL, "--how", "live", "--json")
    assert told.code == 1
    (result,) = told.document["results"]
    assert not result["moved"] and "no space left" in result["reason"]
    assert cell.simulated(FULL).running(uuid)
