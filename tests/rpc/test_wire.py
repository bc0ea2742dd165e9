from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import Flavor
from compute_worker.rpc import wire
from tests.rpc.hosts import UUID, Notebook

CATALOGUE = wire.Catalogue([Notebook()])
RESIZE = CATALOGUE.find({"method": "resize"})
GOOD: dict[str, Any] = {"instance": UUID.format(1), "flavor": {"vcpus": 1, "memory_mb": 64}, "count": 3}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12,
)  # fmt: skip


def test_good_arguments_come_typed() -> None:
    decoded = wire.decode_arguments(RESIZE, GOOD)
    assert decoded == {"instance": UUID.format(1), "flavor": Flavor(vcpus=1, memory_mb=64), "count": 3}


def test_defaults_are_left_to_the_method() -> None:
    assert "count" not in wire.decode_arguments(RESIZE, {k: GOOD[k] for k in ("instance", "flavor")})


def test_unknown_fields_of_objects_are_ignored() -> None:
    flavor = {"vcpus": 1, "memory_mb": 64, "from_the_future": 1}
    assert wire.decode_arguments(RESIZE, GOOD | {"flavor": flavor})["flavor"] == Flavor(vcpus=1, memory_mb=64)


@pytest.mark.parametrize(
    ("change", "argument", "says"),
    [
        ({"instance": None}, "instance", "Expected `str`"),
        ({"instance": "../../etc/passwd"}, "instance", "regex"),
        ({"instance": UUID.format(1) + "\0"}, "instance", "regex"),
        ({"instance": UUID.format(1) + "\n"}, "instance", "regex"),
        ({"instance": " " + UUID.format(1)}, "instance", "regex"),
        ({"instance": "-rf"}, "instance", "regex"),
        ({"instance": "x" * 10_000_000}, "instance", "regex"),
        ({"flavor": {"vcpus": 1}}, "flavor", "missing required field `memory_mb`"),
        ({"flavor": {"vcpus": "1", "memory_mb": 64}}, "flavor", "$.vcpus"),
        ({"flavor": {"vcpus": -1, "memory_mb": 64}}, "flavor", "$.vcpus"),
        ({"flavor": {"vcpus": 1, "memory_mb": 1 << 70}}, "flavor", "64 bits"),
        ({"flavor": []}, "flavor", "Expected `object`"),
        ({"count": 11}, "count", "<= 10"),
        ({"count": True}, "count", "Expected `int`"),
        ({"count": 1.5}, "count", "Expected `int`"),
        ({"count": float("nan")}, "count", "not finite"),
        ({"flavor": {"vcpus": 1, "memory_mb": 64, "name": "\ud800"}}, "flavor", "not valid unicode"),
        ({"flavor": {"vcpus": 1, "memory_mb": 64, "\udfff": 1}}, "flavor", "not valid unicode"),
    ],
)
def test_a_bad_argument_is_named(change: dict[str, Any], argument: str, says: str) -> None:
    with pytest.raises(errors.InvalidCommand) as caught:
        wire.decode_arguments(RESIZE, GOOD | change)
    assert caught.value.kwargs["argument"] == argument
    assert str(caught.value).startswith(f"resize: argument '{argument}': ")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 700


def test_missing_and_unknown_arguments_are_named() -> None:
    with pytest.raises(errors.InvalidCommand, match="resize: argument 'flavor' is missing"):
        wire.decode_arguments(RESIZE, {"instance": UUID.format(1)})
    with pytest.raises(errors.InvalidCommand, match="resize: unknown argument 'colour'"):
        wire.decode_arguments(RESIZE, GOOD | {"colour": "red"})
    for args in (None, [], "x", 3):
        with pytest.raises(errors.InvalidCommand, match="not an object"):
            wire.decode_arguments(RESIZE, args)


@given(st.dictionaries(st.sampled_from(["instance", "flavor", "count", "context", "self", "x"]), ANY_JSON))
def test_garbage_is_decoded_or_refused(args: dict[str, Any]) -> None:
    try:
        decoded = wire.decode_arguments(RESIZE, args)
    except errors.InvalidCommand as exc:
        json.dumps(exc.to_dict())
    else:
        assert decoded.keys() <= {"instance", "flavor", "count"}


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("\ud800", "unicode"),
        ("\udfff\ud83d", "unicode"),
        ({"\ude00": 1}, "unicode"),
        (float("nan"), "finite"),
        (-float("inf"), "finite"),
        (1 << 63, "64 bits"),
        (-(1 << 63) - 1, "64 bits"),
        (nested(1 << 63, 5000), "64 bits"),
        (nested(1, 5000), None),
        ((1 << 63) - 1, None),
        (-(1 << 63), None),
        ("9" * 30, None),
        ("\U0001f600 \ud7ff \ue000", None),
        ("\\ud800", None),
    ],
    ids=itertools.count(),
)
def test_what_cannot_be_stored_is_named(value: Any, problem: str | None) -> None:
    found = wire.unacceptable({"a": [value]})
    assert found is None if problem is None else problem in (found or "")


@given(ANY_JSON)
def test_what_is_acceptable_can_be_stored(value: Any) -> None:
    if wire.unacceptable(value) is None:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("method", ["not_exposed", "__init__", "_note", "seen", "", None, 3, ["resize"], "x" * 1000])
def test_only_messages_are_methods(method: object) -> None:
    with pytest.raises(errors.UnknownMethod) as caught:
        CATALOGUE.find({"method": method})
    assert len(str(caught.value)) < 100


def test_namespaces_and_other_versions_are_refused() -> None:
    with pytest.raises(errors.UnknownMethod):
        CATALOGUE.find({"method": "echo", "namespace": "x"})
    for version in ("2.0", "1.999", "0.9", "1", "x", None, 1.0, "1.0\n", "-1.0"):
        with pytest.raises(errors.NotSupported):
            CATALOGUE.find({"method": "echo", "version": version})
    assert CATALOGUE.find({"method": "echo"}).name == "echo"


@pytest.mark.parametrize(
    ("asked", "spoken", "understood"),
    [("1.0", "1.0", True), ("1.0", "1.4", True), ("1.4", "1.3", False), ("2.0", "1.4", False), ("1.10", "1.9", False)],
)
def test_versions(asked: str, spoken: str, understood: bool) -> None:
    assert wire.compatible(asked, spoken) is understood


def test_two_endpoints_may_not_answer_the_same_message() -> None:
    with pytest.raises(ValueError, match="two endpoints answer"):
        wire.Catalogue([Notebook(), Notebook()])


def test_queries_are_known() -> None:
    assert CATALOGUE.is_query("echo")
    assert not any(CATALOGUE.is_query(name) for name in ("resize", "nobody", None, 3, ["echo"]))


def test_context_takes_ids_and_replaces_what_could_spoil_a_log() -> None:
    context = wire.context_of({"request_id": "req-1", "user_id": "u", "project_id": "p"}, "m", inbox=True)
    assert (context.request_id, context.user, context.project, context.inbox) == ("req-1", "u", "p", "m")
    for bad in ("x\ny", "", 3, None, "x" * 300, "a b"):
        context = wire.context_of({"request_id": bad, "user_id": bad}, "m", inbox=False)
        assert context.request_id.startswith("req-")
        assert context.user is None
        assert context.inbox is None


@pytest.mark.parametrize(
    ("args", "instance"),
    [({"instance": "i"}, "i"), ({"instance": {"uuid": "i"}}, "i"), ({"instance": 3}, None), ({}, None), (None, None),
     ({"instance": "x" * 100}, None), ({"instance": {"uuid": {}}}, None)],
)  # fmt: skip
def test_the_instance_of_a_command(args: Any, instance: str | None) -> None:
    assert wire.instance_of(args) == instance


def test_message_ids() -> None:
    assert wire.message_id_of({"_unique_id": "abc"}) == "abc"
    made = {wire.message_id_of({"_unique_id": bad}) for bad in (None, 3, "", "a b", "x" * 300)}
    assert len(made) == 5


def test_a_message_that_is_too_large_shrinks_to_what_it_was_about() -> None:
    instance = {"uuid": UUID.format(1), "x": "y" * 10_000}
    raw = {
        "method": "resize", "version": "1.0", "_unique_id": "u", "_context_request_id": "req-1",
        "_context_big": "x" * 999, "args": {"instance": instance, "operation": UUID.format(2), "blob": "z" * 10_000},
    }  # fmt: skip
    small = wire.shrunk(raw, 20_000)
    assert small["args"] == {"instance": UUID.format(1), "operation": UUID.format(2)}
    assert small["_size"] == 20_000
    assert {"method", "version", "_unique_id", "_context_request_id"} <= small.keys()
    assert len(json.dumps(small)) < 500


def test_secrets_and_bulk_are_left_out() -> None:
    args = {
        "instance": {"uuid": "i", "user_data": "#!secret", "metadata": {"db_password": "p"}},
        "admin_password": "hunter2", "injected_files": [{"path": "/a", "content_base64": "c2VjcmV0"}],
        "long": "x" * 10_000, "many": list(range(100)), "odd": "\ud800", "deep": [[[[[["x"]]]]]],
    }  # fmt: skip
    text = json.dumps(wire.redacted(args))
    assert not any(secret in text for secret in ("hunter2", "#!secret", "c2VjcmV0", '"p"'))
    assert '"uuid": "i"' in text
    assert len(text) < 1500
    wire.redacted(args)["odd"].encode()


@given(ANY_JSON)
def test_anything_can_be_redacted(value: Any) -> None:
    json.dumps(wire.redacted(value)).encode()


def test_errors_of_ours_are_sent_with_what_can_travel() -> None:
    error = errors.InstanceBusy(instance="i", operation="o", kind="k", phase="p", extra=object())
    sent = wire.sendable(error, "node1", "m", "req-1")
    assert type(sent) is errors.InstanceBusy
    assert sent.message == error.message
    assert "extra" not in sent.kwargs
    assert sent.retry_after == 5.0


def test_hints_set_on_an_error_are_sent() -> None:
    error = errors.Refused("no")
    error.reschedulable, error.retry_after = True, 7.0
    assert wire.sendable(error, "node1", "m", "r").kwargs == {"reschedulable": True, "retry_after": 7.0}


def test_an_error_of_another_module_is_sent_as_what_callers_know() -> None:
    class Private(errors.InstanceBusy):
        retry_after = 9.0

    sent = wire.sendable(Private("busy", instance="i"), "node1", "m", "r")
    assert (type(sent), sent.message) == (errors.InstanceBusy, "busy")
    assert sent.kwargs == {"instance": "i", "retry_after": 9.0}


def test_unexpected_errors_say_where_to_look_and_nothing_else() -> None:
    sent = wire.sendable(KeyError("/etc/shadow", "hunter2"), "node1", "resize", "req-1")
    assert type(sent) is errors.ComputeError
    assert str(sent) == "internal error in resize; see the log of host node1 for request req-1"
