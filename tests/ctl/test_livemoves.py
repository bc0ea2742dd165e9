from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from compute_worker import errors
from compute_worker.ctl import livemoves
from compute_worker.objects import Flavor, ImageMeta, Instance, Operation
from compute_worker.states import OperationState, VmState
from tests.ctl.cell import IMAGE, KERNEL, CtlCell, Result
from tests.waiting import wait_for

A, B, C = "here", "there", "elsewhere"
RATE = 40_000_000.0


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlCell]:
    directory = tmp_path_factory.mktemp("live")
    with CtlCell([A, B, C], directory, compute={"peer_ask_interval": 0.2}) as cell:
        for name in (IMAGE, KERNEL):
            (directory / "images" / name).write_bytes(name.encode() * 100)
        cell.ready()
        yield cell


@pytest.fixture(autouse=True)
def _as_before(cell: CtlCell) -> Iterator[None]:
    yield
    for name in (A, B, C):
        host = cell.simulated(name)
        host.link_rate, host.dirty_rate, host.cpu_model = None, 0.0, "simulated-v1"


def where(cell: CtlCell, instance: str) -> str:
    return str(cell.ctl("show", instance, "--json").document["host"])


@contextmanager
def flying(cell: CtlCell, name: str, dest: str = B) -> Iterator[tuple[str, str]]:
    """A guest on its way that never gets there by itself: its uuid and the operation's."""
    instance = cell.boot(name, "--host", A)
    host = cell.simulated(A)
    host.link_rate, host.dirty_rate = RATE, 2 * RATE
    begun = cell.ctl("live-migrate", name, dest, "--no-wait", "--json")
    assert begun.code == 0, begun
    operation = begun.document["accepted"]["operation"]
    wait_for(lambda: (status(cell, operation) or "") == "running", what="the guest to be on its way")
    try:
        yield instance, operation
    finally:
        host.dirty_rate, host.link_rate = 0.0, None
        wait_for(lambda: not cell.ctl("operations", "--open", "--json").document["operations"], what="quiet")


def status(cell: CtlCell, operation: str, host: str = A) -> str | None:
    progress = cell.api.get_operation(operation, host=host).progress
    return None if progress is None else str(progress.detail.get("status"))


def told(cell: CtlCell, *argv: str) -> Result:
    result = cell.ctl(*argv)
    assert result.code == 0, result
    return result


def test_there_and_back_without_saying_where(cell: CtlCell) -> None:
    instance = cell.boot("runs", "--host", A)
    memory = cell.simulated(A).guest_memory(instance)
    went = told(cell, "live-migrate", "runs", B)
    assert f"live migration of instance {instance}: done on host {A} in" in went.out
    assert f"it is on host {B}, stood still for" in went.err
    assert where(cell, "runs") == B
    assert instance not in cell.ctl("migrations").out
    listed = cell.ctl("migrations", "--all").out
    assert instance in listed and "live-migration" in listed and "completed" in listed
    back = told(cell, "live-migrate", "runs", "--json").document
    assert back["source"] == B and back["destination"] in (A, C)
    assert back["operation"]["result"]["downtime"] >= 0 and back["operation"]["kind"] == "live_migration"
    assert {part["host"]: part["state"] for part in back["operations"]} == {B: "done", back["destination"]: "done"}
    after = cell.simulated(back["destination"]).guest_memory(instance)
    assert after[0] == memory[0], "it booted anew"


def test_the_host_that_cannot_take_it_is_passed_over_with_the_reason(cell: CtlCell) -> None:
    cell.boot("picky", "--host", A)
    best = max((s for s in cell.client().hosts() if s.host != A), key=lambda s: (s.memory_mb.free, s.host == B)).host
    other = next(name for name in (B, C) if name != best)
    cell.simulated(best).cpu_model = "another"
    refused = cell.ctl("live-migrate", "picky", "--to", best)
    assert refused.code == 3 and f"{best}: host {best}: its processor model is another" in refused.err
    went = told(cell, "live-migrate", "picky")
    assert where(cell, "picky") == other
    assert f"not to host {best}: host {best}: its processor model" in went.err


def test_what_is_refused_before_anything_is_sent(cell: CtlCell) -> None:
    cell.boot("off", "--host", A)
    told(cell, "stop", "off", "--hard")
    stopped = cell.ctl("live-migrate", "off", B)
    assert stopped.code == 3 and "live_migration needs vm_state active, paused; it is stopped" in stopped.err
    assert cell.ctl("live-migrate", "off", B, "--to", C).code == 2
    none = cell.ctl("abort", "off")
    assert none.code == 5 and "the source of an open move" in none.err
    assert cell.ctl("live-migrate", "off", "nobody").code in (3, 4)


def test_only_asked_whether_it_would_go(cell: CtlCell) -> None:
    cell.boot("asked", "--host", A)
    said = told(cell, "live-migrate", "asked", B, "--check-only")
    assert f"would be accepted by host {A}" in said.out
    assert where(cell, "asked") == A


def test_the_same_operation_again_is_the_same_move(cell: CtlCell) -> None:
    cell.boot("twice", "--host", A)
    operation = str(uuid.uuid4())
    told(cell, "live-migrate", "twice", B, "--operation", operation)
    again = told(cell, "live-migrate", "twice", B, "--operation", operation, "--json")
    assert again.document["operation"]["uuid"] == operation
    assert where(cell, "twice") == B


def test_on_its_way_it_is_listed_watched_and_explained(cell: CtlCell) -> None:
    with flying(cell, "seen") as (instance, operation):
        (row,) = [
            m["state"] for m in told(cell, "migrations", "--json").document["migrations"]
            if m["state"]["migration"]["instance"] == instance and m["state"]["side"] == "source"
        ]
        assert row["migration"]["status"] == "running" and row["migration"]["migration_type"] == "live-migration"
        wait_for(lambda: "ms is permitted" in cell.ctl("explain", operation, "--host", A).out, what="a decision")
        explained = cell.ctl("explain", operation, "--host", A).out
        assert "downtime: it begins: a downtime of 50 ms is permitted" in explained
        assert "progress: live_migration" in explained and "of memory left" in explained
        watched = told(cell, "watch", "--count", "1").out
        assert "live_migration" in watched and "pass " in watched and "would stand still for" in watched
        assert cell.ctl("abort", "seen").code == 0


def test_aborted_it_goes_on_where_it_was(cell: CtlCell) -> None:
    with flying(cell, "stays") as (instance, operation):
        stopped = told(cell, "abort", "stays", "--json").document
        assert stopped["stopped"] and stopped["operation"]["uuid"] == operation
        assert stopped["operation"]["error"]["class"] == "Cancelled"
        assert where(cell, "stays") == A and cell.simulated(A).running(instance)
        assert cell.ctl("abort", "stays").code == 5, "there is nothing to abort any more"
    listed = [m["state"] for m in cell.ctl("migrations", "--all", "--json").document["migrations"]]
    mine = [m for m in listed if m["migration"]["instance"] == instance and m["side"] == "source"]
    assert [m["migration"]["status"] for m in mine] == ["cancelled"]


def test_an_abort_is_told_in_words(cell: CtlCell) -> None:
    with flying(cell, "words") as (instance, _):
        said = told(cell, "abort", "words").out
        assert said.startswith(f"abort of the live migration of instance {instance}: it goes on at host {A}")


@pytest.mark.parametrize("how", ["--pause", "--postcopy"])
def test_forced_it_arrives(cell: CtlCell, how: str) -> None:
    name = f"forced{how.strip('-')}"
    with flying(cell, name) as (instance, operation):
        done = told(cell, "force-complete", name, how)
        assert f"live migration of instance {instance}, forced: it is on host {B}, stood still for" in done.out
    reasons = [step.reason or "" for step in cell.api.get_operation(operation, host=A).steps]
    assert any(f"forced by {how.strip('-')}" in reason for reason in reasons)


def test_a_cold_move_is_not_what_these_steer(cell: CtlCell) -> None:
    cell.boot("cold", "--host", A)
    told(cell, "migrate", "cold", "--to", B)
    for command in ("abort", "force-complete"):
        said = cell.ctl(command, "cold")
        assert said.code == 3 and "is no live migration (migration, finished)" in said.err, said
    told(cell, "confirm", "cold")


def test_words_of_the_end() -> None:
    def ended(**result: float) -> Operation:
        return Operation(
            uuid=str(uuid.uuid4()), kind="live_migration", host="h", state=OperationState.DONE, phase="done",
            created_at=0, updated_at=0, result=dict(result),
        )  # fmt: skip

    assert livemoves.landed(ended(downtime=0.25), "b") == "it is on host b, stood still for 250 ms"
    assert livemoves.landed(ended(), "b") == "it is on host b"


def test_what_the_source_would_refuse_is_not_sent() -> None:
    instance = Instance(
        uuid=str(uuid.uuid4()), flavor=Flavor(vcpus=1, memory_mb=1), image=ImageMeta(id="x"), vm_state=VmState.STOPPED
    )
    with pytest.raises(errors.InvalidState, match="it is stopped"):
        livemoves.require_live(instance)
