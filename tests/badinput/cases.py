"""Bad messages by name: method, arguments, the error that the caller gets, a word that its text must have."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compute_worker import errors as e
from tests.badinput.cell import ACTIVE, CANCELLED, DELETED, ELSEWHERE, FRESH, NOWHERE, STOPPED, U, plain

BUILD = "build_and_run_instance"
MEBIBYTE = 1 << 20
HOSTILE = {
    "traversal": "../../etc/passwd",
    "inner traversal": "a/../../b",
    "absolute": "/etc/passwd",
    "dots": "..",
    "dash": "-rf",
    "nul": "a\0b",
    "newline": "a\n",
    "space": "a b",
    "empty": "",
    "surrogate": "\ud800",
}
"""What no name that reaches a path, an argument vector or XML may be."""


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    args: dict[str, Any]
    error: type[e.ComputeError]
    word: str = ""
    version: str = "1.0"


def build(path: str, value: Any) -> dict[str, Any]:
    """Arguments of a build whose instance has ``value`` at ``a.b``."""
    instance = plain()
    *outer, last = path.split(".")
    place = instance
    for name in outer:
        place = place.setdefault(name, {})
    place[last] = value
    return {"instance": instance}


def _fields() -> Iterator[Case]:
    vif = {"id": U.format(50), "mac": "52:54:00:00:00:01"}
    ids = ["uuid", "image.id", "image.kernel_id", "image.ramdisk_id", "image.store", "hostname", "migration"]
    for kind, text in HOSTILE.items():
        for path in ids:
            yield Case(f"{path}: {kind}", BUILD, build(path, text), e.InvalidCommand, "instance")
        for name in ("bridge", "devname", "id", "mac"):
            args = build("vifs", [vif | {name: text}])
            yield Case(f"vif {name}: {kind}", BUILD, args, e.InvalidCommand, "instance")
        yield Case(f"host: {kind}", BUILD, build("host", text), e.InvalidCommand, "instance")
        yield Case(f"operation: {kind}", BUILD, {"instance": plain(), "operation": text}, e.InvalidCommand, "operation")
        yield Case(f"instance: {kind}", "stop_instance", {"instance": text}, e.InvalidCommand, "instance")
        yield Case(f"cancel: {kind}", "cancel_operation", {"cancel": text}, e.InvalidCommand, "cancel")
        yield Case(f"reply_topic: {kind}", "announce", {"reply_topic": text}, e.InvalidCommand, "reply_topic")


def _sizes() -> Iterator[Case]:
    for value in (-1, 1 << 40, 1 << 70, 1.5, "1", True, None, [1]):
        for path in ("flavor.vcpus", "flavor.memory_mb", "flavor.root_gb", "flavor.ephemeral_gb", "flavor.swap_mb"):
            yield Case(f"{path}: {value!r}", BUILD, build(path, value), e.InvalidCommand, "instance")
    for path in ("image.size_bytes", "image.min_disk_gb", "generation", "block_device_info.swap_mb"):
        yield Case(f"{path}: -1", BUILD, build(path, -1), e.InvalidCommand, path.split(".")[-1])
    yield Case("no vcpus", BUILD, build("flavor.vcpus", 0), e.InvalidCommand, "vcpus")
    for value in (-1, 1e9, math.nan, math.inf, "1"):
        args = {"instance": ACTIVE, "shutdown_timeout": value}
        yield Case(f"shutdown_timeout: {value!r}", "stop_instance", args, e.InvalidCommand, "shutdown_timeout")
    for value in (0, -1, 1 << 30, 1.5):
        args = {"instance": ACTIVE, "tail_bytes": value}
        yield Case(f"tail_bytes: {value!r}", "get_console_output", args, e.InvalidCommand, "tail_bytes")
    for method in ("list_instances", "list_operations"):
        for value in (-1, 1 << 70, "0"):
            yield Case(f"{method} since {value!r}", method, {"since": value}, e.InvalidCommand, "since")
    yield Case("wait: -1", "get_operation", {"operation": NOWHERE, "wait": -1}, e.InvalidCommand, "wait")
    yield Case("wait: a week", "get_operation", {"operation": NOWHERE, "wait": 604_800}, e.InvalidCommand, "wait")


def _shapes() -> Iterator[Case]:
    for method in ("no_such_method", "__class__", "_accept", "host_state", "", "x" * 100_000, "stop_instance\n"):
        yield Case(f"method {method[:20]!r}", method, {"instance": ACTIVE}, e.UnknownMethod, "no method")
    yield Case("version 2", "stop_instance", {"instance": ACTIVE}, e.NotSupported, "version", version="2.0")
    yield Case("version 1.99", "stop_instance", {"instance": ACTIVE}, e.NotSupported, "version", version="1.99")
    yield Case("nothing", BUILD, {}, e.InvalidCommand, "'instance' is missing")
    yield Case("a second disk", BUILD, {"instance": plain(), "disk": "x"}, e.InvalidCommand, "'disk'")
    yield Case("context", "stop_instance", {"instance": ACTIVE, "context": {}}, e.InvalidCommand, "'context'")
    for value in ("x", None, [], 3, {}, {"uuid": FRESH}):
        yield Case(f"instance is {value!r}", BUILD, {"instance": value}, e.InvalidCommand, "instance")
    for value in ("yes", 1, None):
        args = {"instance": ACTIVE, "check_only": value}
        yield Case(f"check_only: {value!r}", "pause_instance", args, e.InvalidCommand, "check_only")
    yield Case("reboot_type", "reboot_instance", {"instance": ACTIVE, "reboot_type": "soft"}, e.InvalidCommand, "regex")
    yield Case("events is no list", "external_instance_event", {"instance": ACTIVE, "events": {}}, e.InvalidCommand)
    args = {"instance": ACTIVE, "events": [{"name": "Plugged!"}]}
    yield Case("an event's name", "external_instance_event", args, e.InvalidCommand, "events")
    yield Case("ten mebibytes", BUILD, build("name", "x" * 10 * MEBIBYTE), e.MessageTooLarge, "larger than")
    yield Case("a long name", BUILD, build("name", "x" * 256), e.InvalidCommand, "name")
    yield Case("a name of two lines", BUILD, build("name", "a\nb"), e.InvalidCommand, "name")
    yield Case("a long reason", "disable_host", {"reason": "x" * 300}, e.InvalidCommand, "reason")
    yield Case("two lines for the kernel", BUILD, build("kernel_cmdline", "quiet\ninit=/x"), e.InvalidCommand)
    for fmt in ("qcow3", "RAW", "raw,backing=x"):
        yield Case(f"disk format {fmt}", BUILD, build("image.disk_format", fmt), e.InvalidCommand, "disk_format")


def _sense() -> Iterator[Case]:
    vif = {"id": U.format(50), "mac": "52:54:00:00:00:01"}
    eph = build("block_device_info.ephemerals", [{"size_gb": 1, "guest_format": "x;reboot"}])
    eph["instance"]["flavor"]["ephemeral_gb"] = 1
    files = [{"path": "/a", "content_base64": "no base64!"}]
    big = [{"path": f"/{n}", "content_base64": base64.b64encode(b"x" * 40_000).decode()} for n in range(2)]
    climbs = [{"path": "/etc/../../root/x", "content_base64": ""}]
    yield Case("two vifs alike", BUILD, build("vifs", [vif, vif]), e.InvalidCommand, "same id")
    yield Case("file system", BUILD, eph, e.InvalidBDMFormat, "x;reboot")
    yield Case("a volume", BUILD, build("block_device_info.block_device_mapping", [{"a": 1}]), e.NotSupported, "volume")
    yield Case("no base64", BUILD, {"instance": plain(), "injected_files": files}, e.InvalidCommand, "base64")
    yield Case("big files", BUILD, {"instance": plain(), "injected_files": big}, e.InvalidCommand, "65536")
    yield Case("a file that climbs", BUILD, {"instance": plain(), "injected_files": climbs}, e.InvalidCommand, "climbs")
    yield Case("swap beyond the flavor", BUILD, build("block_device_info.swap_mb", 5), e.InvalidCommand, "swap_mb")
    yield Case("image wants more disk", BUILD, build("image.min_disk_gb", 2), e.InvalidCommand, "root disk")
    yield Case("image wants more memory", BUILD, build("image.min_ram_mb", 65), e.InvalidCommand, "memory")
    for resource, value in (("vcpus", 1024), ("memory_mb", 1 << 24), ("root_gb", 1 << 20)):
        yield Case(f"no room: {resource}", BUILD, build(f"flavor.{resource}", value), e.InsufficientResources, "free")
    for name, when in (("at the epoch", 0), ("a minute ago", time.time() - 60)):
        yield Case(f"expired {name}", BUILD, {"instance": plain(), "expires_at": when}, e.CommandExpired, "ago")
    yield Case("expired stop", "stop_instance", {"instance": ACTIVE, "expires_at": 1}, e.CommandExpired, "ago")
    far = time.time() + 200_000
    for name, expiry, word in (
        ("days ahead", far, "24 h"), ("a word", "soon", "expires_at"), ("nan", math.nan, "finite"),
        ("huge", 1e308, "24 h"),
    ):  # fmt: skip
        args = {"instance": plain(), "expires_at": expiry}
        yield Case(f"expires_at {name}", BUILD, args, e.InvalidCommand, word)
    yield Case("here already", BUILD, {"instance": plain(ACTIVE)}, e.InstanceExists, ACTIVE)
    yield Case("deleted uuid", BUILD, {"instance": plain(DELETED)}, e.InstanceDeleted, "never used again")
    yield Case("cancelled", BUILD, {"instance": plain(), "operation": CANCELLED}, e.OperationRefusedBefore, "cancelled")
    yield Case("not running", "pause_instance", {"instance": STOPPED}, e.InvalidState, "stopped")
    yield Case("not suspended", "resume_instance", {"instance": STOPPED}, e.InvalidState, "stopped")
    for method in (
        "start_instance", "stop_instance", "reboot_instance", "pause_instance", "unpause_instance", "suspend_instance",
        "resume_instance", "get_instance", "get_console_output", "get_diagnostics",
    ):  # fmt: skip
        yield Case(f"{method}: unknown", method, {"instance": NOWHERE}, e.InstanceNotFound, "node1")
        yield Case(f"{method}: another host's", method, {"instance": ELSEWHERE}, e.InstanceNotFound, "node1")
        yield Case(f"{method}: deleted", method, {"instance": DELETED}, e.InstanceDeleted, DELETED)
    events = {"instance": NOWHERE, "events": [{"name": "network-vif-plugged"}]}
    yield Case("event: unknown", "external_instance_event", events, e.InstanceNotFound, NOWHERE)
    yield Case("operation: unknown", "get_operation", {"operation": NOWHERE}, e.OperationNotFound, NOWHERE)


CASES = {case.name: case for group in (_fields, _sizes, _shapes, _sense) for case in group()}
QUERIES = ("get_", "list_", "announce")
CASTS = {name: case for name, case in CASES.items() if not case.method.startswith(QUERIES)}
"""Those that are kept and told of when nobody waits for an answer."""
