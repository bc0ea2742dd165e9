from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kombu import Connection, Exchange, Queue

from compute_worker import errors
from compute_worker.config import Rpc
from compute_worker.manager.service import ENDPOINTS
from compute_worker.messages import messages_of
from compute_worker.objects import (
    Capacity,
    Disk,
    DiskInfo,
    ExternalEvent,
    Flavor,
    HostState,
    ImageMeta,
    Instance,
    MigrateData,
    Migration,
    Object,
)
from compute_worker.rpc import asyncapi
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport
from tests.rpc.hosts import UUID, Notebook

FILE = Path(__file__).parents[2] / "doc" / "asyncapi.yaml"
DOCUMENT = yaml.safe_load(FILE.read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
ONE = UUID.format(1)
INSTANCE = Instance(uuid=ONE, flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="cirros"))
MIGRATION = Migration(
    uuid=ONE, instance=ONE, source_host="node1", dest_host="node2", new_flavor=INSTANCE.flavor, alternates=["node3"]
)
DISKS = DiskInfo(disks=[Disk(name="disk", format="qcow2", virtual_size_bytes=1 << 30, backing="cirros")])
MOVING = MigrateData(migration=ONE, disks=DISKS.disks)


class Said(Object, frozen=True, kw_only=True):
    """A payload."""

    text: str


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(item)


def valid(schema: str, value: Any) -> None:
    jsonschema.Draft7Validator({"$ref": f"#/components/schemas/{schema}", **DOCUMENT}).validate(value)


def test_every_message_of_a_worker_is_described() -> None:
    described = DOCUMENT["components"]["messages"]
    assert {message.name for endpoint in ENDPOINTS for message, _ in messages_of(endpoint)} <= described.keys()


def test_the_file_is_what_the_code_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncapi.main(["--check", str(FILE)]) == 0, capsys.readouterr().err


def test_a_stale_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "asyncapi.yaml"
    assert asyncapi.main(["--check", str(stale)]) == 1
    stale.write_text(FILE.read_text() + "\n")
    assert asyncapi.main(["--check", str(stale)]) == 1
    assert "is stale" in capsys.readouterr().err


def test_printing_it_makes_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncapi.main([]) == 0
    assert capsys.readouterr().out == FILE.read_text()


def test_every_reference_leads_somewhere() -> None:
    references = [node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)]
    assert len(references) > 100
    for reference in references:
        target: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_schemas_are_schemas_and_speak_no_python() -> None:
    for name, schema in SCHEMAS.items():
        jsonschema.Draft7Validator.check_schema(schema)
        assert name
    assert r"\Z" not in FILE.read_text()


def test_defaults_are_those_of_the_method() -> None:
    text = asyncapi.describe([Notebook], [Said], Rpc(), "n")["components"]["schemas"]
    assert text["resize.args"]["required"] == ["flavor", "instance"]
    assert text["resize.args"]["properties"]["count"] == {"type": "integer", "minimum": 0, "maximum": 10, "default": 1}
    assert "not_exposed.args" not in text


@pytest.fixture
def heard() -> Iterator[Any]:
    """What a client sends to host "described", as the bytes of its bodies."""
    with Connection("memory://") as connection, connection.channel() as channel:
        exchange = Exchange("compute_worker", "topic", durable=True)
        queue = Queue("compute.described", exchange, "compute.described")(channel)
        queue.declare()

        def get() -> dict[str, Any]:
            message = queue.get(no_ack=True)
            assert message is not None and message.content_type == "application/json"
            body: dict[str, Any] = json.loads(message.body)
            return body

        yield get
        queue.delete()


SENDING = {
    "build_and_run_instance": [INSTANCE], "terminate_instance": [ONE], "start_instance": [ONE], "stop_instance": [ONE],
    "reboot_instance": [ONE], "pause_instance": [ONE], "unpause_instance": [ONE], "suspend_instance": [ONE],
    "resume_instance": [ONE], "external_instance_event": [ONE, [ExternalEvent(name="network-vif-plugged", tag="x")]],
    "disable_host": ["maintenance"], "enable_host": [], "cancel_operation": [ONE], "get_console_output": [ONE],
    "get_diagnostics": [ONE], "list_instances": [3], "get_instance": [ONE], "get_operation": [ONE, 3],
    "list_operations": [1, ONE, True], "get_host_state": [],
    "prep_resize": [INSTANCE, MIGRATION], "confirm_resize": [ONE, ONE], "revert_resize": [ONE, ONE],
    "take_back_instance": [ONE, ONE, True], "forget_host": ["node3"], "resize_instance": [ONE, MIGRATION],
    "finish_resize": [INSTANCE, MIGRATION, DISKS], "finish_revert_resize": [ONE, ONE, 2],
    "settle_operation": ["prep_resize", ONE, ONE, 1, True], "get_migration": [ONE, "source"],
    "list_migrations": [False], "answer_peer": [ONE, {"ask": "facts"}], "peer_changed": [ONE],
    "list_leftovers": [], "repair_leftovers": [ONE], "snapshot_instance": [ONE, "backup-1"],
    "snapshot": [ONE, "backup-1"], "backup_instance": [ONE, "backup-1", "daily", 7], "list_cached_images": [],
    "list_images": ["file", {"image_type": "backup"}, 5],
    "get_hypervisor": [], "check_can_live_migrate_destination": [INSTANCE, MIGRATION],
    "check_can_live_migrate_source": [INSTANCE, MIGRATION, MOVING], "live_migration": [ONE, MIGRATION],
    "live_migration_abort": [ONE, ONE], "live_migration_force_complete": [ONE, ONE, "postcopy"],
    "pre_live_migration": [INSTANCE, MIGRATION, MOVING, DISKS],
}  # fmt: skip
CASTS = frozenset({"peer_changed"})
"""Nobody waits for an answer to these."""


def test_all_that_is_described_is_sent_here() -> None:
    described = {name for name, operation in DOCUMENT["operations"].items() if operation["action"] == "receive"}
    assert described == SENDING.keys() | {"announce"}


@pytest.mark.parametrize("method", sorted(SENDING))
def test_what_the_client_sends_is_what_is_described(method: str, heard: Any) -> None:
    api = ComputeAPI(get_transport("kombu+memory://"), timeout=0.01)
    with nullcontext() if method in CASTS else pytest.raises(errors.PeerUnavailable):
        getattr(api, method)(*SENDING[method], host="described")
    body = heard()
    envelope = DOCUMENT["components"]["messages"][method]["payload"]
    jsonschema.Draft7Validator({**DOCUMENT, **envelope}).validate(body)
    valid(f"{method}.request", json.loads(body["oslo.message"]))


def test_a_request_that_is_wrong_is_not_described() -> None:
    good = {"method": "start_instance", "args": {"instance": ONE}, "version": "1.0", "_unique_id": "a"}
    valid("start_instance.request", good)
    for bad in (
        good | {"args": {}}, good | {"args": {"instance": ONE, "x": 1}}, good | {"method": "stop_instance"},
        good | {"version": "2.0"}, good | {"_msg_id": "a"}, {k: v for k, v in good.items() if k != "_unique_id"},
    ):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            valid("start_instance.request", bad)


def test_host_announced_is_described() -> None:
    nothing = Capacity(total=0, usable=0)
    state = HostState(host="node1", vcpus=nothing, memory_mb=nothing, disk_gb=nothing)
    from compute_worker.objects import encode

    valid("host_announced.args", {"state": encode(state)})


def test_failures_name_every_error() -> None:
    failure = SCHEMAS["failure"]
    assert "InstanceBusy" in failure["properties"]["class"]["enum"]
    assert failure["x-parents"]["InstanceMoved"] == "NotFound"
    assert "HostFull" in failure["x-reschedulable"] and "InvalidCommand" not in failure["x-reschedulable"]
