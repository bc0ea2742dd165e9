from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.ctl.moves import Way, choose, migration_for, require_movable, resize_flavor
from compute_worker.objects import Flavor, HostState, ImageMeta, Instance
from compute_worker.states import VmState
from tests.ctl.cell import IMAGE, KERNEL, CtlCell
from tests.ctl.test_placement import host
from tests.waiting import wait_for

OLD = Flavor(vcpus=1, memory_mb=64, root_gb=1, ephemeral_gb=2, swap_mb=3, extra_specs={"a": "b"})
INSTANCE = Instance(uuid=str(uuid.uuid4()), flavor=OLD, image=ImageMeta(id="x"), vm_state=VmState.ACTIVE)


@pytest.mark.parametrize(
    ("text", "extra", "sizes"),
    [
        ("2/128", (None, None), (2, 128, 1, 2, 3)),
        ("2/128/0", (None, None), (2, 128, 0, 2, 3)),
        ("2/128/9", (8, 4), (2, 128, 9, 4, 8)),
        ("2/128", (0, None), (2, 128, 1, 2, 0)),
    ],
)
def test_what_is_not_said_stays(text: str, extra: tuple[Any, Any], sizes: tuple[int, ...]) -> None:
    new = resize_flavor(text, OLD, *extra)
    assert (new.vcpus, new.memory_mb, new.root_gb, new.ephemeral_gb, new.swap_mb) == sizes
    assert new.extra_specs == {"a": "b"}


def test_the_best_other_host_and_then_the_others() -> None:
    states = [host("src", memory=9999), host("a", memory=2048), host("b", memory=4096), host("c", vcpus=0)]
    assert choose(states, "src", OLD) == Way("b", ("a",))


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([], "no other host answers"),
        ([host("a", vcpus=0)], "a: vcpus: 1 asked for, 0 free"),
        ([host("a", machine_arch="aarch64")], "a: it is aarch64, host src is x86_64"),
        ([host("a", enabled=False)], r"a: disabled \(no reason given\)"),
    ],
)
def test_no_host_can_take_it(others: list[HostState], reason: str) -> None:
    with pytest.raises(errors.Unschedulable, match=reason):
        choose([host("src", machine_arch="x86_64"), *others], "src", OLD)


def test_the_same_operation_is_the_same_migration() -> None:
    operation = str(uuid.uuid4())
    one = migration_for(operation, INSTANCE, "src", Way("a", ("b",)), None)
    assert one == migration_for(operation, INSTANCE, "src", Way("a", ("b",)), None)
    assert one.migration_type == "migration" and one.alternates == ["b"] and one.new_flavor is None
    other = migration_for(str(uuid.uuid4()), INSTANCE, "src", Way("a"), OLD)
    assert other.uuid != one.uuid and other.migration_type == "resize" and other.new_flavor is OLD


def test_what_the_source_would_refuse_is_not_sent() -> None:
    require_movable(INSTANCE)
    suspended = Instance(uuid=INSTANCE.uuid, flavor=OLD, image=INSTANCE.image, vm_state=VmState.SUSPENDED)
    with pytest.raises(errors.InvalidState, match="needs vm_state active"):
        require_movable(suspended)


# --- against embedded hosts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CtlCell]:
    """Three hosts, with an image."""
    directory = tmp_path_factory.mktemp("three")
    with CtlCell(["node1", "node2", "node3"], directory, compute={"peer_ask_interval": 0.2}) as cell:
        for name in (IMAGE, KERNEL):
            (directory / "images" / name).write_bytes(name.encode() * 100)
        cell.ready()
        yield cell


def where(cell: CtlCell, instance: str) -> tuple[str, str]:
    shown = cell.ctl("show", instance, "--json").document
    return shown["host"], shown["instance"]["vm_state"]


def quiet(cell: CtlCell) -> None:
    """Until nothing is open on any host."""
    wait_for(lambda: not cell.ctl("operations", "--open", "--json").document["operations"], what="quiet")


def test_resize_confirm(three: CtlCell) -> None:
    instance = three.boot("grows", "--host", "node1")
    told = three.ctl("resize", "grows", "--to", "node2", "--flavor", "2/128/2")
    assert told.code == 0, told
    assert f"resize of instance {instance}: done on host node2 in" in told.out
    assert f"compute-workerctl confirm {instance}" in told.err
    assert where(three, "grows") == ("node2", "resized")
    listed = three.ctl("migrations").out
    assert instance in listed and "kept at the source" in listed and "finished" in listed
    confirmed = three.ctl("confirm", "grows", "--json")
    assert confirmed.code == 0
    assert {part["host"]: part["state"] for part in confirmed.document["operations"]} == {
        "node1": "done", "node2": "done",
    }
    assert where(three, "grows") == ("node2", "active")
    assert three.ctl("show", "grows", "--json").document["instance"]["flavor"]["root_gb"] == 2
    assert instance not in three.ctl("migrations").out and instance in three.ctl("migrations", "--all").out
    again = three.ctl("confirm", "grows")
    assert again.code == 3 and "needs vm_state resized; it is active" in again.err


def test_the_phases_of_both_hosts_are_told(three: CtlCell) -> None:
    instance = three.boot("told", "--host", "node1")
    stall = three.simulated("node1").faults.stall("set_aside", instance)
    try:
        begun = three.ctl("migrate", "told", "--to", "node2", "--no-wait", "--json").document["accepted"]["operation"]
        assert stall.entered.wait(10)
        told = three.ctl("migrate", "told", "--to", "node2", "--operation", begun, "--timeout", "0.2")
        about = f"migration of instance {instance}"
        assert told.code == 4 and "it goes on" in told.err
        assert f"{about}: node1: set_aside" in told.err and f"{about}: node2: await_disks" in told.err, told
    finally:
        stall.release()
    quiet(three)
    assert three.ctl("revert", "told").code == 0


def test_migrate_revert_without_saying_where(three: CtlCell) -> None:
    three.boot("goes", "--host", "node1")
    document = three.ctl("migrate", "goes", "--no-clean-shutdown", "--json").document
    assert document["operation"]["state"] == "done" and document["destination"] in ("node2", "node3")
    assert {part["host"] for part in document["operations"]} == {"node1", document["destination"]}
    reverted = three.ctl("revert", "goes")
    assert reverted.code == 0, reverted
    assert where(three, "goes") == ("node1", "active")


def test_a_host_that_refuses_is_followed_by_its_alternate(three: CtlCell) -> None:
    three.boot("next", "--host", "node1")
    assert three.ctl("disable", "node2").code == 0
    try:
        told = three.ctl("migrate", "next", "--to", "node2", "--alternate", "node3")
        assert told.code == 0 and "done on host node3" in told.out, told
        refused = three.ctl("migrate", "next", "--to", "node2")
        assert refused.code == 3, "it is resized"
        three.ctl("confirm", "next")
        refused = three.ctl("migrate", "next", "--to", "node2")
        assert refused.code == 3 and "compute-workerctl enable node2" in refused.err
    finally:
        three.ctl("enable", "node2")
    assert where(three, "next") == ("node3", "active")


def test_a_move_that_fails_leaves_the_guest_as_it_was(three: CtlCell) -> None:
    three.boot("stays", "--host", "node1")
    three.simulated("node2").faults.fail("define", errors.GuestFailed(instance="x", reason="no such machine type"))
    told = three.ctl("migrate", "stays", "--to", "node2")
    assert told.code == 1 and "no such machine type" in told.err and "explain" in told.err, told
    assert where(three, "stays") == ("node1", "active")


def test_check_only_and_no_wait(three: CtlCell) -> None:
    instance = three.boot("later", "--host", "node1")
    checked = three.ctl("resize", "later", "--to", "node2", "--flavor", "1/64/5", "--check-only")
    assert checked.code == 0 and "would be accepted by host node2" in checked.out
    shrunk = three.ctl("resize", "later", "--to", "node2", "--flavor", "1/64/0", "--check-only")
    assert shrunk.code == 3 and "root_gb cannot shrink from 1 to 0" in shrunk.err
    accepted = three.ctl("migrate", "later", "--to", "node2", "--no-wait", "--json").document
    assert accepted["operation"] is None
    operation = accepted["accepted"]["operation"]
    again = three.ctl("migrate", instance, "--to", "node2", "--operation", operation, "--json").document
    assert again["accepted"]["repeated"] and again["operation"]["state"] == "done"
    assert again["migration"] == accepted["migration"]
    assert where(three, "later") == ("node2", "resized")


def test_silence_says_how_to_repeat_it(three: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    three.boot("silence", "--host", "node1")

    def silent(*args: Any, host: str, **options: Any) -> Any:
        raise errors.PeerUnavailable(host=host)

    monkeypatch.setattr(three.api, "prep_resize", silent)
    told = three.ctl("migrate", "silence", "--to", "node2")
    assert told.code == 4 and "repeat it with --to node2 --operation " in told.err


def test_a_destination_that_nobody_knows_gets_nothing(three: CtlCell) -> None:
    three.boot("nowhere", "--host", "node1")
    told = three.ctl("migrate", "nowhere", "--to", "node9")
    assert told.code == 4 and "node9" in told.err
    assert where(three, "nowhere") == ("node1", "active")


def test_take_back_needs_the_word_and_a_dead_host(three: CtlCell) -> None:
    instance = three.boot("back", "--host", "node1")
    assert three.ctl("take-back", "back", "--destination-is-off").code == 5, "nothing of it moves"
    three.ctl("migrate", "back", "--to", "node2")
    unsaid = three.ctl("take-back", instance)
    assert unsaid.code == 2 and "host node2 may have the instance" in unsaid.err
    alive = three.ctl("take-back", "back", "--destination-is-off")
    assert alive.code == 3 and "host node2 answers" in alive.err
    assert three.ctl("forget-host", "node2").code == 3
    assert three.ctl("revert", "back").code == 0


class TestDeadDestination:
    """Hosts that are shot: a cell of its own for each test, whose names the broker in this process has for it alone."""

    @pytest.fixture
    def cell(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[CtlCell]:
        directory = tmp_path_factory.mktemp("dead")
        with CtlCell(["alpha", "beta"], directory, compute={"peer_ask_interval": 0.2}) as cell:
            (directory / "images" / IMAGE).write_bytes(b"image")
            cell.ready()
            for worker in cell.workers.values():
                monkeypatch.setattr(worker.manager.core.quick_peers, "_timeout", 0.3)
                monkeypatch.setattr(worker.manager.core.peers, "_timeout", 0.3)
            monkeypatch.setattr(cell.api, "_timeout", 1.0)
            yield cell

    def test_before_it_has_decided(self, cell: CtlCell) -> None:
        instance = cell.boot("early", "--host", "alpha")
        stall = cell.simulated("beta").faults.stall("define")
        begun = cell.ctl("migrate", "early", "--to", "beta", "--no-wait", "--json").document
        assert stall.entered.wait(10)
        cell.kill("beta")
        operation = begun["accepted"]["operation"]
        wait_for(
            lambda: cell.api.get_operation(operation, host="alpha").phase == "await_outcome",
            what="the source to wait for its destination",
        )
        told = cell.ctl("take-back", instance[:8], "--destination-is-off")
        assert told.code == 0 and "host alpha has it, active" in told.out, told
        assert cell.simulated("alpha").running(instance)

    def test_after_it_had_decided(self, cell: CtlCell) -> None:
        instance = cell.boot("late", "--host", "alpha")
        assert cell.ctl("migrate", "late", "--to", "beta").code == 0
        cell.kill("beta")
        told = cell.ctl("take-back", instance, "--destination-is-off", "--json")
        assert told.code == 0 and told.document["instance"]["generation"] == 1, told
        assert cell.simulated("alpha").running(instance)

    def test_forget_host(self, cell: CtlCell) -> None:
        cell.boot("forgotten", "--host", "alpha")
        assert cell.ctl("migrate", "forgotten", "--to", "beta").code == 0
        cell.kill("beta")
        checked = cell.ctl("forget-host", "beta", "--check-only")
        assert checked.code == 0 and "host alpha would wait no longer for host beta" in checked.out
        told = cell.ctl("forget-host", "beta", "--json")
        assert told.code == 0 and [a["host"] for a in told.document["accepted"]] == ["alpha"]
        assert cell.ctl("forget-host", "alpha", "--host", "alpha").code == 4, "nobody else answers"


