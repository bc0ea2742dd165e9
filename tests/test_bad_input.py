"""What a caller can do wrong: one clear typed error, and nothing has changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.manager.inventory import InventoryEndpoint
from compute_worker.manager.lifecycle import LifecycleEndpoint
from compute_worker.manager.service import ENDPOINTS
from compute_worker.messages import MessageKind, messages_of
from compute_worker.objects import UUID_PATTERN
from compute_worker.states import OperationState
from tests.badinput.cases import CASES, CASTS, Case, build
from tests.badinput.cell import ACTIVE, FRESH, NOWHERE, STOPPED, WatchedCell, new_uuid, plain
from tests.waiting import wait_for

COMMANDS = {
    message.name: message
    for endpoint in (LifecycleEndpoint, InventoryEndpoint)
    for message, _ in messages_of(endpoint)
    if message.kind is MessageKind.COMMAND
}
"""What goes to one host. Moves need two, and are tried in ``test_bad_moves``."""
MOVES = {
    message.name: message
    for endpoint in ENDPOINTS
    for message, _ in messages_of(endpoint)
    if message.name not in COMMANDS and message.kind is MessageKind.COMMAND
}


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedCell]:
    with WatchedCell(tmp_path_factory.mktemp("cell")) as made:
        made.populate()
        made.settle()
        yield made


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_call_gets_one_typed_error_and_changes_nothing(cell: WatchedCell, case: Case) -> None:
    before = cell.state()
    with pytest.raises(errors.ComputeError) as caught:
        cell.call(case.method, case.args, version=case.version)
    assert type(caught.value) is case.error
    assert case.word in caught.value.message
    assert len(caught.value.message) < 1000
    assert cell.state() == before


@pytest.mark.parametrize("case", CASTS.values(), ids=CASTS)
def test_a_bad_cast_is_recorded_and_told_once_and_changes_nothing(cell: WatchedCell, case: Case) -> None:
    before = cell.state(journal=False)
    named = case.args.get("operation")
    mine = new_uuid()
    args = case.args if "operation" in case.args else {**case.args, "operation": mine}
    already = len(cell.heard.seen)
    cell.cast(case.method, args, version=case.version)
    wait_for(lambda: len(cell.heard.seen) > already, what="the notification")
    cell.settle()
    told = cell.heard.seen[already:]
    assert [priority for priority, _, _ in told] == ["ERROR"]
    _, event_type, payload = told[0]
    assert event_type.endswith(".error")
    assert payload["state"] == "refused"
    assert payload["error"]["class"] == case.error.__name__
    assert payload["request_id"] == "req-bad"
    if named is None:
        assert payload["operation"] == mine
    recorded = cell.api.get_operation(payload["operation"], host=cell.here)
    assert recorded.state is OperationState.REFUSED
    assert recorded.error is not None and recorded.error["class"] == case.error.__name__
    assert cell.state(journal=False) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({name for message in COMMANDS.values() for name in message.arguments} | {"disk", "context"})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from([*COMMANDS, "get_console_output", "get_operation", "announce"]),
    args=st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1),
)
def test_garbage_gets_a_refusal(cell: WatchedCell, method: str, args: dict[str, Any]) -> None:
    if method in ("disable_host", "enable_host"):
        args["disk"] = 1
    before = cell.state()
    with pytest.raises(errors.InvalidCommand):
        cell.call(method, args)
    assert cell.state() == before


FIELDS = ["uuid", "name", "host", "vm_state", "vifs", "image.id", "image.checksum", "flavor.name", "metadata", "fault",
          "image.properties", "block_device_info", "user_data", "config_drive", "launched_at", "seq"]  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(FIELDS), value=JSON)
def test_a_field_of_any_type_is_accepted_or_refused(cell: WatchedCell, path: str, value: Any) -> None:
    before = cell.state()
    args = {**build(path, value), "check_only": True}
    try:
        answer = cell.call("build_and_run_instance", args)
    except errors.Refused as exc:
        assert len(exc.message) < 1000
    else:
        assert answer["operation"] is None
        if path == "uuid":
            assert re.match(UUID_PATTERN, value)
    assert cell.state() == before


# --- accepted, and found to be impossible -----------------------------------------------------------------------------

IMPOSSIBLE = {
    "unknown image": (build("image.id", "nosuch"), errors.ImageNotFound),
    "bytes of another format": (build("image.id", "liar"), errors.ImageUnacceptable),
    "declared as qcow2": (build("image", {"id": "fresh", "disk_format": "qcow2"}), errors.ImageUnacceptable),
    "another size": (build("image", {"id": "fresh", "size_bytes": 1}), errors.ImageUnacceptable),
    "another checksum": (build("image", {"id": "fresh", "checksum": "0" * 64}), errors.ImageChecksumMismatch),
    "unknown kernel": (build("image.kernel_id", "nosuch"), errors.ImageNotFound),
    "larger than the flavor": (build("image", {"id": "big", "disk_format": "qcow2"}), errors.FlavorDiskTooSmall),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("how", ["call", "cast"])
def test_what_turns_out_impossible_is_undone(cell: WatchedCell, name: str, how: str) -> None:
    args, error = IMPOSSIBLE[name]
    fails(cell, args, error, how)


@pytest.mark.parametrize("how", ["call", "cast"])
@pytest.mark.parametrize("image", ["fresh", "img"], ids=["download", "disks"])
def test_a_full_disk_is_undone(cell: WatchedCell, how: str, image: str) -> None:
    host = cell.simulated()
    host.disk_limit_bytes = host.allocated() + 10
    try:
        fails(cell, build("image.id", image), errors.DiskFull, how)
    finally:
        host.disk_limit_bytes = None


def fails(cell: WatchedCell, args: dict[str, Any], error: type[errors.ComputeError], how: str) -> None:
    """A build that is accepted, fails with ``error`` and leaves nothing, told once."""
    instance, operation = new_uuid(), new_uuid()
    args = {"operation": operation, "instance": {**args["instance"], "uuid": instance}}
    host = cell.simulated()
    leftovers, claims = host.leftovers(), cell.workers[cell.here].manager.core.claims.usage()
    if how == "call":
        assert cell.call("build_and_run_instance", args)["operation"] == operation
    else:
        cell.cast("build_and_run_instance", args)
        cell.recorded(operation)
    ended = cell.api.get_operation(operation, 20, host=cell.here)
    assert ended.state is OperationState.UNDONE
    assert ended.error is not None and ended.error["class"] == error.__name__
    wait_for(lambda: any(e.endswith(".error") for _, e, _ in cell.heard.of(operation)), what="the notification")
    assert [e for _, e, _ in cell.heard.of(operation)] == ["instance.create.start", "instance.create.error"]
    assert host.files(instance) == {}
    assert host.leftovers() == leftovers
    assert not [name for name in host.base if name.endswith(".part")]
    assert cell.workers[cell.here].manager.core.claims.usage() == claims
    with pytest.raises(errors.InstanceNotFound):
        cell.api.get_instance(instance, host=cell.here)


# --- every command ----------------------------------------------------------------------------------------------------


def valid(method: str) -> dict[str, Any]:
    """Arguments with which ``method`` would be accepted."""
    by_method: dict[str, dict[str, Any]] = {
        "build_and_run_instance": {"instance": plain()},
        "start_instance": {"instance": STOPPED},
        "terminate_instance": {"instance": STOPPED},
        "external_instance_event": {"instance": ACTIVE, "events": [{"name": "network-vif-plugged"}]},
        "cancel_operation": {"cancel": NOWHERE},
        "disable_host": {"reason": "maintenance"},
        "enable_host": {},
    }
    return by_method.get(method, {"instance": ACTIVE})


@pytest.mark.parametrize("method", COMMANDS)
def test_check_only_says_yes_and_writes_nothing(cell: WatchedCell, method: str) -> None:
    before, already = cell.state(), len(cell.heard.seen)
    answer = cell.call(method, {**valid(method), "check_only": True, "operation": new_uuid()})
    assert answer["operation"] is None
    assert cell.state() == before
    assert cell.heard.seen[already:] == []


CHANGED: dict[str, dict[str, Any]] = {
    "build_and_run_instance": {"admin_password": "another"},
    "stop_instance": {"clean_shutdown": False},
    "reboot_instance": {"reboot_type": "HARD"},
    "external_instance_event": {"events": [{"name": "network-vif-unplugged"}]},
    "cancel_operation": {"cancel": FRESH},
    "disable_host": {"reason": "another"},
}


@pytest.fixture
def own(tmp_path: Any) -> Iterator[WatchedCell]:
    """A cell whose state may be changed."""
    short = {"shutdown_timeout": 0.2, "soft_reboot_timeout": 1.0}
    with WatchedCell(tmp_path, "host1", "host2", compute=short) as made:
        made.populate()
        made.settle()
        yield made


def test_a_command_sent_again_is_the_same_one_and_with_other_arguments_a_conflict(own: WatchedCell) -> None:
    for method in COMMANDS:
        args = {**valid(method), "operation": new_uuid()}
        own.done(method, args)
        own.settle()
        before, already = own.state(), len(own.heard.seen)
        again = own.call(method, args)
        assert (again["repeated"], again["operation"], again["state"]) == (True, args["operation"], "done"), method
        if method in CHANGED:
            with pytest.raises(errors.OperationConflict, match=args["operation"]):
                own.call(method, {**args, **CHANGED[method]})
        assert own.state() == before, method
        assert own.heard.seen[already:] == []
        prepare_next(own, method)


def prepare_next(cell: WatchedCell, method: str) -> None:
    """Make the instance what the next command of the catalogue needs."""
    after = {"pause_instance": "unpause_instance", "suspend_instance": "resume_instance", "stop_instance":
             "start_instance", "disable_host": "enable_host"}  # fmt: skip
    if method in after:
        cell.done(after[method], {} if method == "disable_host" else {"instance": ACTIVE})
    cell.settle()


def test_every_command_with_arguments_of_its_own_is_tried_with_others() -> None:
    common = {"instance", "operation", "expires_at", "check_only"}
    theirs = {name for name, message in COMMANDS.items() if set(message.arguments) - common}
    assert set(CHANGED) | {"build_and_run_instance"} == theirs | {"build_and_run_instance"}


def test_a_disabled_host_refuses_builds_and_nothing_else(own: WatchedCell) -> None:
    own.done("disable_host", {"reason": "disk is to be changed"})
    before = own.state()
    for check_only in (False, True):
        with pytest.raises(errors.HostDisabled, match="disk is to be changed") as caught:
            own.call("build_and_run_instance", {"instance": plain(), "check_only": check_only})
        assert caught.value.reschedulable
    assert own.state() == before
    own.done("pause_instance", {"instance": ACTIVE})


def test_a_busy_instance_refuses_what_is_no_delete(own: WatchedCell) -> None:
    stall = own.simulated().faults.stall("pause", ACTIVE)
    running = own.call("pause_instance", {"instance": ACTIVE})["operation"]
    assert stall.entered.wait(10)
    passing = {"build_and_run_instance", "terminate_instance", "cancel_operation", "external_instance_event"}
    for method in sorted(COMMANDS.keys() - passing - {"enable_host", "disable_host"}):
        before = own.state()
        with pytest.raises(errors.InstanceBusy, match=running) as caught:
            own.call(method, {**valid(method), "instance": ACTIVE})
        assert caught.value.retry_after
        assert own.state() == before
    with pytest.raises(errors.InvalidState, match="point of no return"):
        own.call("cancel_operation", {"cancel": running})
    stall.release()
    own.settle()


def test_a_refused_command_may_be_sent_again_and_its_messages_stay_apart(own: WatchedCell) -> None:
    operation = new_uuid()
    args = {"instance": plain(), "operation": operation}
    own.done("disable_host", {})
    own.cast("build_and_run_instance", args)
    assert own.recorded(operation).state is OperationState.REFUSED
    own.done("enable_host", {})
    assert own.done("build_and_run_instance", args).uuid == operation
    wait_for(lambda: len(own.heard.of(operation)) == 3, what="all notifications")
    assert [payload["sequence"] for _, _, payload in own.heard.of(operation)] == [1, 2, 3]
    with pytest.raises(errors.OperationConflict):
        own.call("build_and_run_instance", {**args, "admin_password": "other"})
    own.cast("build_and_run_instance", {**args, "admin_password": "other"})
    wait_for(lambda: len(own.heard.of(operation)) == 4, what="the refusal")
    assert own.api.get_operation(operation, host=own.here).state is OperationState.DONE


def test_an_operation_that_was_refused_can_still_be_cancelled(own: WatchedCell) -> None:
    operation = new_uuid()
    args = {"instance": plain(), "operation": operation}
    own.done("disable_host", {})
    own.cast("build_and_run_instance", args)
    own.recorded(operation)
    own.done("cancel_operation", {"cancel": operation})
    own.done("enable_host", {})
    with pytest.raises(errors.OperationRefusedBefore, match="cancelled"):
        own.call("build_and_run_instance", args)


def test_hosts_that_cannot_be_are_refused_before_anything_is_sent(cell: WatchedCell) -> None:
    for name in ("../node1", "node1\0", "-rf", "a b", "", "x" * 300, "node1\n", "a..b"):
        with pytest.raises(errors.InvalidCommand, match="host"):
            cell.api.start_instance(ACTIVE, host=name)
    with pytest.raises(errors.MessageUndeliverable, match="node9"):
        cell.api.start_instance(ACTIVE, host="node9")


MOVING = {"uuid": NOWHERE, "instance": ACTIVE, "source_host": "node1", "dest_host": "node2"}
ANOTHER = {**MOVING, "source_host": "node2", "dest_host": "node1"}
BAD_MOVES: list[tuple[str, dict[str, Any], type[errors.ComputeError]]] = [
    ("prep_resize", {"instance": plain(ACTIVE), "migration": MOVING}, errors.InvalidCommand),
    ("prep_resize", {"instance": plain(ACTIVE), "migration": ANOTHER}, errors.InstanceExists),
    ("prep_resize", {"instance": plain(ACTIVE), "migration": {**ANOTHER, "dest_host": "../x"}}, errors.InvalidCommand),
    ("prep_resize", {"instance": plain(ACTIVE), "migration": {**ANOTHER, "uuid": "x"}}, errors.InvalidCommand),
    ("prep_resize", {"instance": plain(ACTIVE), "migration": {**ANOTHER, "attempt": 0}}, errors.InvalidCommand),
    ("prep_resize", {"instance": plain(ACTIVE)}, errors.InvalidCommand),
    ("resize_instance", {"instance": ACTIVE, "migration": ANOTHER}, errors.InvalidCommand),
    ("resize_instance", {"instance": NOWHERE, "migration": MOVING}, errors.InvalidCommand),
    ("finish_resize", {"instance": plain(FRESH), "migration": ANOTHER, "disk_info": {}}, errors.MigrationNotFound),
    (
        "finish_resize",
        {"instance": plain(FRESH), "migration": ANOTHER, "disk_info": {"disks": [{"name": "../disk"}]}},
        errors.InvalidCommand,
    ),
    ("confirm_resize", {"instance": ACTIVE, "migration": NOWHERE}, errors.MigrationNotFound),
    ("revert_resize", {"instance": ACTIVE, "migration": NOWHERE}, errors.MigrationNotFound),
    ("finish_revert_resize", {"instance": ACTIVE, "migration": NOWHERE}, errors.MigrationNotFound),
    ("take_back_instance", {"instance": ACTIVE, "migration": NOWHERE}, errors.MigrationNotFound),
    ("forget_host", {"forget": "node1"}, errors.InvalidState),
    ("forget_host", {"forget": "node2"}, errors.InvalidState),
    ("forget_host", {"forget": "-rf"}, errors.InvalidCommand),
    ("live_migration", {"instance": ACTIVE, "migration": ANOTHER}, errors.InvalidCommand),
    ("live_migration", {"instance": STOPPED, "migration": {**MOVING, "instance": STOPPED}}, errors.InvalidState),
    ("live_migration_abort", {"instance": ACTIVE, "migration": NOWHERE}, errors.MigrationNotFound),
    ("live_migration_force_complete", {"instance": ACTIVE, "migration": NOWHERE}, errors.MigrationNotFound),
    ("live_migration_force_complete", {"instance": ACTIVE, "migration": NOWHERE, "how": "x"}, errors.InvalidCommand),
    ("snapshot_instance", {"instance": ACTIVE, "image": "../x"}, errors.InvalidCommand),
    ("snapshot_instance", {"instance": NOWHERE, "image": "snap"}, errors.InstanceNotFound),
    *(
        ("snapshot_instance", {"instance": ACTIVE, "image": "s", "image_options": options}, error)
        for options, error in (
            ({"disk_format": "vmdk"}, errors.InvalidCommand),
            ({"name": "a\nb"}, errors.InvalidCommand),
            ({"store": "../x"}, errors.InvalidCommand),
            ({"store": "nosuch"}, errors.NotSupported),
            ({"compression": "zlib", "disk_format": "raw"}, errors.InvalidCommand),
            ({"properties": {"instance_uuid": "another"}}, errors.InvalidCommand),
            ({"properties": {"x\r\ny": "z"}}, errors.InvalidCommand),
        )
    ),
    ("snapshot", {"instance": ACTIVE, "image": "a/b"}, errors.InvalidCommand),
    ("snapshot", {"instance": NOWHERE, "image": "snap"}, errors.InstanceNotFound),
    *(
        ("backup_instance", {"image": "s", "instance": uuid, "backup_type": kind, "rotation": rotation}, error)
        for uuid, kind, rotation, error in (
            (ACTIVE, "daily", 0, errors.InvalidCommand),
            (ACTIVE, "../x", 1, errors.InvalidCommand),
            (ACTIVE, "", 1, errors.InvalidCommand),
            (NOWHERE, "daily", 1, errors.InstanceNotFound),
        )
    ),
    ("repair_leftovers", {"findings": "everything"}, errors.InvalidCommand),
]


@pytest.mark.parametrize(("method", "args", "error"), BAD_MOVES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("check_only", [False, True])
def test_bad_moves(cell: WatchedCell, method: str, args: dict[str, Any], error: type, check_only: bool) -> None:
    before = cell.state()
    with pytest.raises(errors.ComputeError) as caught:
        cell.call(method, {**args, "operation": new_uuid(), "check_only": check_only}, version="1.1")
    assert type(caught.value) is error, caught.value
    assert cell.state() == before


def test_every_move_is_tried_badly() -> None:
    assert {method for method, _, _ in BAD_MOVES} == set(MOVES)
