"""The wire form: every object goes there and back, bounds hold, and it does not change unnoticed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker import objects
from compute_worker.errors import InvalidCommand
from compute_worker.objects import (
    RPC_VERSION,
    Accepted,
    Bytes,
    Capacity,
    Count,
    Device,
    Flavor,
    Gb,
    HostName,
    ImageId,
    ImageMeta,
    Instance,
    Key,
    Mac,
    Mb,
    Migration,
    Name,
    Object,
    Seconds,
    Uuid,
    decode,
    encode,
)

SCHEMA = Path(__file__).with_name("wire_schema.json")
CLASSES = sorted(
    (cls for cls in Object.__subclasses__() if cls.__module__ == objects.__name__), key=lambda cls: cls.__name__
)
UUID = "6f3a1c52-0a4e-4c7a-9d7e-0123456789ab"
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

# --- strategies out of the types ------------------------------------------------------------------------------------

_PRINTABLE = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])
_HAND_MADE = {
    objects.HOST_PATTERN: st.from_regex(r"[A-Za-z0-9]([.:_-]?[A-Za-z0-9]){0,20}", fullmatch=True),
    objects.ID_PATTERN: st.from_regex(r"[A-Za-z0-9]([._-]?[A-Za-z0-9]){0,20}", fullmatch=True),
    objects.TEXT_PATTERN: st.text(_PRINTABLE, max_size=30),
}


def strategy(info: Any) -> st.SearchStrategy[Any]:
    """Values as JSON has them, for a type as msgspec describes it."""
    inspect = msgspec.inspect
    if isinstance(info, inspect.Metadata):
        return strategy(info.type)
    if isinstance(info, inspect.StructType):
        required = {f.encode_name: strategy(f.type) for f in info.fields if f.required}
        optional = {f.encode_name: strategy(f.type) for f in info.fields if not f.required}
        return st.fixed_dictionaries(required, optional=optional)
    if isinstance(info, inspect.UnionType):
        return st.one_of([strategy(one) for one in info.types])
    if isinstance(info, inspect.ListType):
        return st.lists(strategy(info.item_type), max_size=3)
    if isinstance(info, inspect.DictType):
        return st.dictionaries(strategy(info.key_type), strategy(info.value_type), max_size=3)
    if isinstance(info, inspect.EnumType):
        return st.sampled_from([member.value for member in info.cls])
    return _plain(info)


def _plain(info: Any) -> st.SearchStrategy[Any]:
    inspect = msgspec.inspect
    if isinstance(info, inspect.StrType):
        return _text(info)
    if isinstance(info, inspect.IntType):
        return st.integers(info.ge if info.ge is not None else -(1 << 53), info.le if info.le is not None else 1 << 53)
    if isinstance(info, inspect.FloatType):
        return st.floats(info.ge, info.le, allow_nan=False, allow_infinity=False)
    if isinstance(info, inspect.BoolType):
        return st.booleans()
    if isinstance(info, inspect.NoneType):
        return st.none()
    if isinstance(info, inspect.AnyType):
        return st.none() | st.booleans() | st.integers(-10, 10) | st.text(_PRINTABLE, max_size=5)
    raise TypeError(info)


def _text(info: Any) -> st.SearchStrategy[str]:
    if info.pattern is None:
        return st.text(_PRINTABLE, min_size=info.min_length or 0, max_size=30)
    if info.pattern in _HAND_MADE:
        return _HAND_MADE[info.pattern].filter(lambda text: len(text) >= (info.min_length or 0))
    return st.from_regex(info.pattern, fullmatch=True).filter(lambda text: not text.endswith("\n"))


BY_CLASS = {cls: strategy(msgspec.inspect.type_info(cls)) for cls in CLASSES}

# --- there and back -------------------------------------------------------------------------------------------------


@each_class
@settings(max_examples=30)
@given(data=st.data())
def test_wire_round_trip(cls: type[Object], data: st.DataObject) -> None:
    value = data.draw(BY_CLASS[cls])
    decoded: Object = decode(value, cls, "test")
    wire = json.loads(json.dumps(encode(decoded)))
    assert decode(wire, cls, "test") == decoded
    assert encode(decode(wire, cls, "test")) == wire
    assert msgspec.json.decode(msgspec.json.encode(decoded), type=cls) == decoded


@each_class
@settings(max_examples=30)
@given(data=st.data())
def test_unknown_fields_are_ignored(cls: type[Object], data: st.DataObject) -> None:
    value = data.draw(BY_CLASS[cls])
    newer = {**value, "field_of_the_future": {"x": [1]}}
    assert decode(newer, cls, "test") == decode(value, cls, "test")


@each_class
def test_objects_are_frozen_and_named(cls: type[Object]) -> None:
    assert cls.__struct_config__.frozen
    assert cls.__struct_config__.tag is None
    assert cls.__doc__


@each_class
@settings(max_examples=30)
@given(data=st.data())
def test_missing_fields_are_named(cls: type[Object], data: st.DataObject) -> None:
    required = [f.encode_name for f in msgspec.structs.fields(cls) if f.required]
    if not required:
        assert decode({}, cls, "test") == cls()
        return
    value = data.draw(BY_CLASS[cls])
    gone = data.draw(st.sampled_from(required))
    del value[gone]
    with pytest.raises(InvalidCommand, match=gone):
        decode(value, cls, "some_method")


def test_enums_travel_as_their_values() -> None:
    instance = Instance(uuid=UUID, flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="i"))
    wire = encode(instance)
    assert (wire["vm_state"], wire["power_state"], wire["task_state"]) == ("building", "nostate", None)
    assert type(wire["vm_state"]) is str


def test_every_default_is_within_its_own_bounds() -> None:
    for cls in CLASSES:
        for field in msgspec.structs.fields(cls):
            if field.default is not msgspec.NODEFAULT:
                decode(encode(field.default), field.type, f"{cls.__name__}.{field.name}")


# --- bounds ---------------------------------------------------------------------------------------------------------

HOSTILE = ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a/b", "a\0b", "a b", " a", "a ", "-a", "--help", "a\n",
           "\n", "a..b", "ä", "a;b", "$(x)", "`x`", "a\\b", "a" * 300, "a%", "a\u202eb"]  # fmt: skip
PATHLIKE = [("HostName", HostName), ("ImageId", ImageId), ("Device", Device), ("Uuid", Uuid), ("Mac", Mac)]


@pytest.mark.parametrize(("name", "type_"), PATHLIKE, ids=[name for name, _ in PATHLIKE])
@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(text)[:12] for text in HOSTILE])
def test_nothing_hostile_reaches_a_path_or_an_argument_vector(name: str, type_: Any, text: str) -> None:
    with pytest.raises(InvalidCommand):
        decode(text, type_, name)


@pytest.mark.parametrize(("name", "type_"), PATHLIKE, ids=[name for name, _ in PATHLIKE])
@given(text=st.text(max_size=40))
def test_whatever_passes_is_one_plain_path_component(name: str, type_: Any, text: str) -> None:
    try:
        decode(text, type_, name)
    except InvalidCommand:
        return
    assert re.fullmatch(r"[A-Za-z0-9.:_-]+", text)
    assert text[0] not in "-." and ".." not in text
    assert os.path.basename(text) == text


@pytest.mark.parametrize(
    "text",
    [UUID.upper(), UUID[:-1], UUID + "0", "{" + UUID + "}", UUID.replace("-", ""), f"urn:uuid:{UUID}", UUID + "\n"],
)
def test_uuids_are_lower_case_with_dashes(text: str) -> None:
    with pytest.raises(InvalidCommand):
        decode(text, Uuid, "test")


@pytest.mark.parametrize("text", ["a", "host-1", "node.example.org", "h_1", "2001:db8::1", "A" * 253])
def test_good_host_names(text: str) -> None:
    assert decode(text, HostName, "test") == text


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31m", "\0", "x" * 256, "a\x7f", "a\r"])
def test_names_for_people_carry_no_control_characters(text: str) -> None:
    for type_ in (Name, Key):
        with pytest.raises(InvalidCommand):
            decode(text, type_, "test")


SIZES = [("Gb", Gb), ("Mb", Mb), ("Bytes", Bytes), ("Count", Count), ("Seconds", Seconds)]


@pytest.mark.parametrize(("name", "type_"), SIZES, ids=[name for name, _ in SIZES])
@pytest.mark.parametrize("value", [-1, -(1 << 62), 1 << 61, 1 << 63, 1 << 200, "1", None, [], True, float("nan"),
                                   float("inf"), -0.5])  # fmt: skip
def test_sizes_are_numbers_within_bounds(name: str, type_: Any, value: Any) -> None:
    with pytest.raises(InvalidCommand):
        decode(value, type_, name)


@pytest.mark.parametrize(
    "change",
    [{"vcpus": 0}, {"vcpus": 1025}, {"memory_mb": 15}, {"memory_mb": 1 << 25}, {"root_gb": -1}, {"vcpus": 1.5}],
)
def test_flavors_out_of_bounds(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidCommand, match=next(iter(change))):
        decode({"vcpus": 1, "memory_mb": 64, **change}, Flavor, "test")


def test_errors_name_method_field_and_problem() -> None:
    value = {"uuid": UUID, "flavor": {"vcpus": "two", "memory_mb": 64}, "image": {"id": "i"}}
    with pytest.raises(InvalidCommand) as caught:
        decode(value, Instance, "build(instance)")
    assert "build(instance)" in str(caught.value)
    assert "$.flavor.vcpus" in str(caught.value)


def test_errors_stay_short_and_do_not_repeat_hostile_input() -> None:
    with pytest.raises(InvalidCommand) as caught:
        decode({"uuid": "\x1b[31m" * 100_000}, Instance, "m")
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [deep(100_000), 7, "text", None, [], [1], {"uuid": {}}, {1: 2}])
def test_not_even_an_object(value: Any) -> None:
    with pytest.raises(InvalidCommand):
        decode(value, Instance, "test")


def test_deep_nesting_where_anything_goes() -> None:
    block = {"block_device_mapping": [{"connection_info": deep(100_000)}]}
    try:
        decode(block, objects.BlockDeviceInfo, "test")
    except InvalidCommand:
        return  # refused is fine; anything but a crash is


@pytest.mark.parametrize(("usable", "used", "free"), [(4, 1, 3), (4, 4, 0), (4, 6, 0)])
def test_free_is_never_negative(usable: float, used: float, free: float) -> None:
    assert Capacity(total=4, usable=usable, used=used).free == free


def test_migration_needs_two_hosts() -> None:
    with pytest.raises(InvalidCommand, match="dest_host"):
        decode({"uuid": UUID, "instance": UUID, "source_host": "a"}, Migration, "test")


def test_accepted_may_have_no_operation() -> None:
    assert decode({"operation": None, "host": "a"}, Accepted, "test").operation is None


# --- the schema -----------------------------------------------------------------------------------------------------


def wire_schema() -> dict[str, Any]:
    """The wire form of every object, with the version that promises it."""
    _, components = msgspec.json.schema_components(CLASSES)
    return {"rpc_version": RPC_VERSION, "objects": {name: _bare(components[name]) for name in sorted(components)}}


def _bare(schema: Any) -> Any:
    """Without words for people: they may change."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: _bare(v) for k, v in schema.items() if not (k in ("description", "title") and isinstance(v, str))}


def test_wire_form_changes_with_its_version_only() -> None:
    """Where this fails the wire form has changed. Compatible (a new field with a default): raise the minor part of
    ``RPC_VERSION``, and write the schema anew with ``UPDATE_WIRE_SCHEMA=1``. Anything else breaks older peers."""
    now = wire_schema()
    if os.environ.get("UPDATE_WIRE_SCHEMA"):
        SCHEMA.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    kept = json.loads(SCHEMA.read_text())
    changed = sorted(
        name
        for name in now["objects"].keys() | kept["objects"].keys()
        if now["objects"].get(name) != kept["objects"].get(name)
    )
    assert not changed, f"the wire form of {', '.join(changed)} changed: see this test's docstring"
    assert now["rpc_version"] == kept["rpc_version"], "write the schema of the new version with UPDATE_WIRE_SCHEMA=1"


def test_schema_covers_every_object() -> None:
    assert {cls.__name__ for cls in CLASSES} <= set(json.loads(SCHEMA.read_text())["objects"])
    assert {"Instance", "Migration", "MigrateData", "Operation", "HostState"} <= {cls.__name__ for cls in CLASSES}
