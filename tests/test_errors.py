"""The tree of errors: drawn as it is, and every one travels."""

from __future__ import annotations

import json
import re
import string
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oslo_messaging._drivers import common as driver_common  # what every driver rebuilds a remote error with

from compute_worker import errors
from compute_worker.errors import Broken, Cancelled, ComputeError, Refused, Retryable, from_dict


def all_classes(cls: type[ComputeError] = ComputeError) -> list[type[ComputeError]]:
    return [cls, *(sub for direct in cls.__subclasses__() for sub in all_classes(direct))]


OURS = sorted({cls for cls in all_classes() if cls.__module__ == errors.__name__}, key=lambda c: c.__name__)
AXES = (Refused, Retryable, Broken, Cancelled)
every_class = pytest.mark.parametrize("cls", OURS, ids=lambda c: c.__name__)


def fields(cls: type[ComputeError]) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(cls.template) if name]


def sample(cls: type[ComputeError]) -> dict[str, object]:
    numbers = {"seconds", "size", "limit", "needed", "given", "requested", "free", "running", "queued", "status"}
    return {name: 7 if name in numbers else f"some-{name}" for name in fields(cls)}


def drawn() -> dict[str, str]:
    """Class by parent, out of the module's docstring."""
    assert errors.__doc__ is not None
    tree = errors.__doc__.split("::")[1].split("Every error travels")[0]
    parents: dict[int, str] = {}
    found = {}
    for line in tree.splitlines():
        match = re.search(r"[A-Z]\w+", line)
        if match is None:
            continue
        depth = (match.start() - 4) // 4
        parents[depth] = match.group()
        found[match.group()] = parents.get(depth - 1, "")
    return found


def test_the_drawn_tree_is_the_tree() -> None:
    actual = {cls.__name__: "" if cls is ComputeError else cls.__bases__[0].__name__ for cls in OURS}
    assert drawn() == actual


@every_class
def test_every_class_is_on_one_axis(cls: type[ComputeError]) -> None:
    if cls is not ComputeError:
        assert sum(issubclass(cls, axis) for axis in AXES) == 1


@every_class
def test_template_fills_and_details_are_attributes(cls: type[ComputeError]) -> None:
    details = sample(cls)
    error = cls(**details)
    assert "{" not in str(error)
    for name, value in details.items():
        assert getattr(error, name) == value
        assert str(value) in str(error)


@every_class
def test_dictionary_round_trip(cls: type[ComputeError]) -> None:
    error = cls(**sample(cls))
    back = from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(back) is cls
    assert back.to_dict() == error.to_dict()
    assert from_dict(back.to_dict()).to_dict() == error.to_dict()


@every_class
def test_remote_round_trip(cls: type[ComputeError]) -> None:
    error = cls(**sample(cls))
    try:
        raise error
    except ComputeError:
        wire = driver_common.serialize_remote_exception(sys.exc_info())
    back = driver_common.deserialize_remote_exception(wire, ["compute_worker.errors"])
    assert isinstance(back, cls)
    assert str(back).startswith(str(error))
    for name, value in sample(cls).items():
        assert getattr(back, name) == value
    assert (back.reschedulable, back.retry_after) == (error.reschedulable, error.retry_after)


def test_hints_of_one_error_travel() -> None:
    error = errors.InvalidState("no", reschedulable=True, retry_after=2.5)
    back = from_dict(json.loads(json.dumps(error.to_dict())))
    assert (back.reschedulable, back.retry_after) == (True, 2.5)


details = st.dictionaries(
    st.sampled_from(["instance", "host", "reason", "path"]), st.text(max_size=40) | st.integers() | st.booleans()
)


@given(st.sampled_from(OURS), details, st.text(max_size=100) | st.none())
def test_any_details_fill_any_class(cls: type[ComputeError], kwargs: dict[str, object], message: str | None) -> None:
    error = cls(message, **kwargs)
    if message is not None:
        assert str(error) == message
    assert from_dict(error.to_dict()).to_dict() == error.to_dict()


def test_missing_details_still_make_a_sentence() -> None:
    assert "h1" in str(errors.InstanceNotFound(host="h1"))


def test_objects_in_details_do_not_travel() -> None:
    assert errors.Broken("x", thing=object(), path="/p").to_dict()["details"] == {"path": "/p"}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"class": "NoSuchError", "message": "m"},
        {"class": "ClassVar", "message": "m"},
        {"class": "from_dict", "message": "m"},
        {"class": "__doc__", "message": "m"},
    ],
)
def test_unknown_class_comes_back_as_the_base(data: dict[str, str]) -> None:
    error = from_dict(data)
    assert type(error) is ComputeError
    assert error.message == data.get("message", ComputeError.template)


def test_hints_of_an_unknown_class_are_kept() -> None:
    error = from_dict({"class": "FromTheFuture", "message": "m", "reschedulable": True, "retry_after": 3.0})
    assert (error.reschedulable, error.retry_after) == (True, 3.0)


def test_details_cannot_replace_what_an_error_is() -> None:
    error = from_dict({"class": "Broken", "message": "m", "details": {"args": "x", "to_dict": "y", "template": "z"}})
    assert error.args == ("m",)
    assert error.to_dict()["message"] == "m"
    assert Broken("m", with_traceback=1, _fill="x").with_traceback(None).args == ("m",)


def test_retryable_may_be_tried_elsewhere_and_waits_where_something_is_down() -> None:
    assert all(cls.reschedulable for cls in OURS if issubclass(cls, Retryable))
    assert {cls.__name__ for cls in OURS if issubclass(cls, Retryable) and cls.patient} == {
        "HypervisorUnavailable",
        "ImageImporting",
        "PeerUnavailable",
    }
