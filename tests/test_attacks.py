"""Known attacks on paths, sizes, consoles and errors, replayed on a whole worker. Those on images: tests/images."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from compute_worker import errors
from compute_worker.manager.service import ENDPOINTS
from compute_worker.messages import messages_of
from compute_worker.states import OperationState
from compute_worker.telemetry.logs import TextFormatter
from compute_worker.telemetry.redaction import Redactor
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.simulated.files import CONSOLE
from compute_worker.virt.simulated.model import File
from tests.badinput.cases import HOSTILE, build
from tests.badinput.cell import ACTIVE, WatchedCell, new_uuid, plain
from tests.ctl.cell import CtlCell
from tests.waiting import wait_for

ONE_MEGABYTE = 1_000_000
BUILD = "build_and_run_instance"


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedCell]:
    with WatchedCell(tmp_path_factory.mktemp("attacked"), "attacked1", "attacked2") as made:
        made.populate()
        made.settle()
        yield made


# --- CVE-2012-1585: a long name fills logs and records ----------------------------------------------------------------

LONG = {
    "display name": (BUILD, build("name", "x" * ONE_MEGABYTE)),
    "metadata": (BUILD, build("metadata", {"key": "x" * ONE_MEGABYTE})),
    "uuid": (BUILD, build("uuid", "x" * ONE_MEGABYTE)),
    "image": (BUILD, build("image.id", "x" * ONE_MEGABYTE)),
    "operation": (BUILD, {"instance": plain(), "operation": "x" * ONE_MEGABYTE}),
    "instance": ("stop_instance", {"instance": "x" * ONE_MEGABYTE}),
    "name of an argument": ("stop_instance", {"x" * ONE_MEGABYTE: 1}),
    "name of the method": ("x" * ONE_MEGABYTE, {"instance": ACTIVE}),
    "reason": ("disable_host", {"reason": "x" * ONE_MEGABYTE}),
    "file system": (BUILD, build("block_device_info.ephemerals", [{"size_gb": 1, "guest_format": "x" * 255}])),
    "path of a file": (BUILD, {"instance": plain(), "injected_files": [
        {"path": "/" + "x" * ONE_MEGABYTE, "content_base64": ""}]}),
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_cve_2012_1585_a_long_name_is_short_wherever_it_is_told(
    cell: WatchedCell, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    method, args = LONG[name]
    before, already = cell.state(journal=False), len(cell.heard.seen)
    with caplog.at_level(logging.DEBUG, "compute_worker"):
        with pytest.raises(errors.InvalidCommand) as caught:
            cell.call(method, args)
        cell.cast(method, args)
        wait_for(lambda: len(cell.heard.seen) > already, what="the notification")
        cell.settle()
    assert len(caught.value.message) < 1000
    assert sum(len(record.getMessage()) for record in caplog.records) < 10_000
    assert len(str(cell.heard.seen[already:])) < 4000
    recorded = cell.api.get_operation(cell.heard.seen[-1][2]["operation"], host=cell.here)
    assert len(msgspec.json.encode(recorded)) < 4000
    assert cell.state(journal=False) == before


# --- CVE-2011-4596, CVE-2012-3360: names that climb -------------------------------------------------------------------

FREE_TEXT = {
    "name": "for people",
    "extra_specs": "hints to schedulers",
    "properties": "hints",
    "metadata": "goes to the guest",
    "user_data": "goes to the guest",
    "os_type": "looked up in a table of file systems",
    "guest_format": "looked up in a table of file systems",
    "block_device_mapping": "refused unless empty",
    "kernel_cmdline": "goes to the guest; one line",
    "fault": "replaced at once",
    "admin_password": "goes to the guest",
    "path": "within the config drive; may not climb",
    "content_base64": "must be base64",
    "reason": "for people",
    "tag": "compared with the id of an interface",
    "request": "read by the driver as one of its own typed requests, which name files by ImageId",
    "label": "the name of a file system, in disk.info only",
    "machine_arch": "compared",
    "journal_id": "compared",
    "machine": "compared",
    "cpu_xml": "compared by the hypervisor",
    "digest": "compared",
    "probe": "probe- and 32 hexadecimal digits, nothing else",
    "probe_content": "compared",
    "files": "content; its name is an ImageId",
    "migrate_uri": "asked of the destination's worker by the source's; goes to the hypervisor",
    "destination_xml": "asked of the destination's worker by the source's; goes to the hypervisor",
    "instance_path": "a directory of the destination, written into its own domain's definition",
    "base_path": "a directory of the destination, written into its own domain's definition",
}
"""Text that may look like a path, and why that does no harm."""


def strings(type_: inspect.Type, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], inspect.StrType]]:
    """Every place in a message where a caller can put text."""
    if isinstance(type_, inspect.StrType):
        yield path, type_
    elif isinstance(type_, inspect.StructType):
        for field in type_.fields:
            yield from strings(field.type, (*path, field.name))
    elif isinstance(type_, inspect.UnionType):
        for one in type_.types:
            yield from strings(one, path)
    elif isinstance(type_, inspect.Metadata):
        yield from strings(type_.type, path)
    elif isinstance(type_, inspect.ListType):
        yield from strings(type_.item_type, path)
    elif isinstance(type_, inspect.DictType):
        yield from strings(type_.key_type, path)
        yield from strings(type_.value_type, path)


PLACES = {
    "/".join((message.name, *path)): kind
    for endpoint in ENDPOINTS
    for message, _ in messages_of(endpoint)
    for name, hint in message.arguments.items()
    for path, kind in strings(inspect.type_info(hint), (name,))
}


@pytest.mark.parametrize("place", PLACES)
def test_cve_2011_4596_no_name_climbs(place: str) -> None:
    kind = PLACES[place]
    if place.rsplit("/", maxsplit=1)[-1] in FREE_TEXT:
        assert kind.max_length or kind.pattern or "fault" in place
        return
    assert kind.pattern is not None, f"{place}: any text; bound it, or say in FREE_TEXT why it does no harm"
    for hostile in HOSTILE.values():
        assert not re.search(kind.pattern, hostile), f"{place} takes {hostile!r}"


@pytest.mark.parametrize("path", ["../../root/.ssh/authorized_keys", "/etc/../../x", "..", "a/../b"])
def test_cve_2012_3360_an_injected_file_does_not_climb(cell: WatchedCell, path: str) -> None:
    before = cell.state()
    with pytest.raises(errors.InvalidCommand, match="climbs"):
        cell.call(BUILD, {"instance": plain(), "injected_files": [{"path": path, "content_base64": "eA=="}]})
    assert cell.state() == before


@pytest.mark.parametrize("name", [text for text in HOSTILE.values() if text != "\ud800"])
def test_a_directory_is_only_made_for_a_uuid(tmp_path: Path, name: str) -> None:
    """The last guard: also when everything before it let a name through."""
    directory = InstancesDirectory(tmp_path / "instances")
    directory.prepare()
    before = sorted(tmp_path.rglob("*"))
    for suffix in (name, name + "_resize"):
        with pytest.raises(errors.InvalidCommand):
            directory.create(suffix)
        with pytest.raises(errors.InvalidCommand):
            directory.remove(suffix)
    assert sorted(tmp_path.rglob("*")) == before


# --- CVE-2026-40212: what a guest or a tenant writes is shown to an operator ------------------------------------------

HOSTILE_BYTES = b"\x1b]0;owned\x07\x1b[2J\x9b31m\xff\xfe\x00\xe2\x80\xaeabc\xc2\x9b1m\x7f<script>x</script>\rlogin: "
HOSTILE_NAME = "vm\x9b31m\u202e\u2028[bold]x[/bold]"
SGR = re.compile(r"\x1b\[[0-9;]*m")


def harmless(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[CtlCell]:
    with CtlCell(["shown1"], tmp_path / "shown") as made:
        (tmp_path / "shown" / "images" / "img-1").write_bytes(b"root")
        made.ready()
        yield made


def test_cve_2026_40212_a_console_is_shown_as_text(shown: CtlCell) -> None:
    uuid = shown.boot("vm")
    directory = shown.simulated("shown1").directory(uuid)
    assert directory is not None
    directory[CONSOLE] = File(HOSTILE_BYTES)
    raw = shown.api.get_console_output(uuid, host="shown1")
    assert harmless(raw) and "owned" in raw and "login: " in raw
    for argv in (["console", uuid], ["console", uuid, "--json"]):
        for terminal in (False, True):
            result = shown.ctl(*argv, terminal=terminal)
            assert result.code == 0 and "owned" in result.out
            assert harmless(result.out + result.err)


def test_names_of_tenants_are_shown_as_text(shown: CtlCell) -> None:
    uuid = shown.boot(HOSTILE_NAME, "--meta", f"k={HOSTILE_NAME}")
    operation = shown.api.list_operations(instance=uuid, host="shown1")[0].uuid
    shown.ctl("disable", "shown1", "--reason", HOSTILE_NAME)
    for argv in (
        ["list"], ["show", uuid], ["hosts"], ["operations"], ["explain", operation], ["diagnostics", uuid],
        ["boot", HOSTILE_NAME, "--flavor", "1/64/1", "--image", "img-1", "--disk-format", "raw", "--host", "shown1"],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            for terminal in (False, True):
                result = shown.ctl(*argv, *more, terminal=terminal)
                said = result.out + result.err
                assert harmless(SGR.sub("", said) if terminal else said), argv
    assert "[bold]x[/bold]" in shown.ctl("list").out


def test_a_line_of_the_log_is_one_line() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s is refused", (f"a\nb\r\x85{HOSTILE_NAME}\x1b[2J",), None)
    assert len(record.getMessage().splitlines()) > 1
    formatted = TextFormatter(Redactor()).format(record)
    assert len(formatted.splitlines()) == 1 and harmless(formatted)


# --- what an error tells ----------------------------------------------------------------------------------------------


def test_cve_2019_14433_an_unexpected_error_says_nothing_of_this_host(cell: WatchedCell) -> None:
    secret = "/var/lib/compute-worker/instances: sesame"
    cell.simulated().faults.fail("get_diagnostics", OSError(secret), uuid=ACTIVE)
    prepared = cell.api._client.prepare(server=cell.here, timeout=20)
    with pytest.raises(errors.ComputeError) as caught:
        prepared.call({"request_id": "req-x"}, "get_diagnostics", instance=ACTIVE)
    # As oslo.messaging rebuilt it: with whatever text of the remote side came along.
    said = f"{caught.value!s} {caught.value!r} {caught.value.args} {caught.value.kwargs}"
    assert "req-x" in said and "see the log" in said
    for part in ("sesame", "/var/lib", "Traceback", ".py", "OSError"):
        assert part not in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/var/lib/compute-worker/instances/x/disk"),
        errors.DiskFull(path="/var/lib/compute-worker/instances/x/disk"),
        errors.CommandFailed(command="qemu-img", status=1, stderr="Could not open '/srv/vm/_base/abc': Permission"),
        errors.Broken("file:///srv/vm/x: read-only file system"),
    ],
    ids=["OSError", "DiskFull", "CommandFailed", "Broken"],
)
def test_cve_2019_14433_a_fault_names_no_path_of_this_host(cell: WatchedCell, error: Exception) -> None:
    cell.simulated().faults.fail("create_disks", error)
    instance, operation = new_uuid(), new_uuid()
    cell.call(BUILD, {"instance": plain(instance), "operation": operation})
    ended = cell.api.get_operation(operation, 20, host=cell.here)
    assert ended.state is OperationState.UNDONE
    record = next(i for i in cell.api.list_instances(0, host=cell.here) if i.uuid == instance)
    assert record.fault
    assert "/var" not in record.fault and "/srv" not in record.fault
    if isinstance(error, errors.ComputeError):
        # The operator is told where; only the instance's owner is not.
        assert ended.error is not None and ("/var" in ended.error["message"] or "/srv" in ended.error["message"])
        assert record.fault != ended.error["message"]
    else:
        assert ended.error is not None and "/var" not in ended.error["message"]


def test_a_fault_keeps_what_is_no_path(cell: WatchedCell) -> None:
    said = "image img: 3 of 4/5 GiB, http://images/x answered 1/2 times"
    cell.simulated().faults.fail("create_disks", errors.Broken(said))
    instance = new_uuid()
    accepted = cell.call(BUILD, {"instance": plain(instance)})
    cell.api.get_operation(accepted["operation"], 20, host=cell.here)
    records: list[Any] = [i for i in cell.api.list_instances(0, host=cell.here) if i.uuid == instance]
    assert records[0].fault == said
