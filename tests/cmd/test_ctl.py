"""Every subcommand against two embedded hosts: exit status, what is said, the JSON document."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.cmd.ctl import main, run
from compute_worker.ctl import parser
from compute_worker.ctl.connect import URL_VARIABLE
from compute_worker.objects import Operation
from tests.ctl.cell import IMAGE, KERNEL, CtlCell
from tests.waiting import wait_for

ABSENT = "00000000-0000-4000-8000-000000000000"
COMMANDS_WITH_ONE_INSTANCE = ("delete", "start", "stop", "reboot", "pause", "unpause", "suspend", "resume")


def power(cell: CtlCell, instance: str) -> str:
    return str(cell.ctl("show", instance, "--json").document["instance"]["power_state"])


def test_hosts(cell: CtlCell) -> None:
    document = cell.ctl("hosts", "--json").document
    assert document["version"] == 1
    assert [host["host"] for host in document["hosts"]] == ["node1", "node2"]
    facts = {"enabled", "vcpus", "memory_mb", "disk_gb", "instances", "time", "journal_id"}
    assert facts <= document["hosts"][0].keys()
    told = cell.ctl("hosts").out
    assert "node1" in told and "enabled" in told and "0 of 65024" in told
    one = cell.ctl("hosts", "--host", "node2", "--json").document
    assert [host["host"] for host in one["hosts"]] == ["node2"]


def test_boot_says_where_and_how_long(cell: CtlCell) -> None:
    result = cell.ctl("boot", "told", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw", "--host", "node1")
    assert result.code == 0
    assert "boot of told" in result.out and "done on host node1 in" in result.out


def test_boot_with_everything_reaches_the_host(cell: CtlCell, tmp_path: Path) -> None:
    for name, content in (("motd", "hello"), ("user", "#cloud-config"), ("password", "s3cret\n")):
        (tmp_path / name).write_text(content)
    uuid_ = cell.boot(
        "all", "--kernel", KERNEL, "--ramdisk", KERNEL, "--ephemeral", "1:ext4", "--ephemeral", "2", "--swap", "64",
        "--file", f"/etc/motd={tmp_path}/motd", "--user-data", f"{tmp_path}/user", "--hostname", "all",
        "--admin-password-file", f"{tmp_path}/password", "--meta", "role=web", "--kernel-cmdline", "quiet",
        "--vif", "bridge=br0,mac=52:54:00:00:00:01,model=e1000,mtu=1400", "--vif", "",
    )
    shown = cell.ctl("show", uuid_, "--json").document
    instance = shown["instance"]
    assert instance["image"]["kernel_id"] == KERNEL and instance["kernel_cmdline"] == "quiet"
    assert [d["size_gb"] for d in instance["block_device_info"]["ephemerals"]] == [1, 2]
    assert instance["flavor"]["swap_mb"] == 64 and instance["metadata"] == {"role": "web"}
    assert instance["vifs"][0]["mac"] == "52:54:00:00:00:01" and instance["vifs"][0]["mtu"] == 1400
    assert instance["vifs"][1]["mac"].startswith("52:54:00:")
    files = cell.simulated(shown["host"]).files(uuid_)
    drive = json.loads(files[f"{uuid_}/disk.config"])
    assert drive["admin_pass"] == "s3cret" and drive["files"] == {"/etc/motd": "aGVsbG8="}
    assert drive["user_data"] == "#cloud-config"


def test_boot_from_a_whole_image_meta(cell: CtlCell, tmp_path: Path) -> None:
    (tmp_path / "image.json").write_text(json.dumps({"id": IMAGE, "disk_format": "raw", "min_ram_mb": 32}))
    argv = ("boot", "meta", "--flavor", "1/64/1", "--image-json", f"{tmp_path}/image.json", "--json")
    document = cell.ctl(*argv).document
    assert document["operation"]["state"] == "done"
    assert document["host"] in ("node1", "node2")


def test_boot_goes_to_the_host_with_most_memory(cell: CtlCell) -> None:
    cell.boot("big", "--host", "node1", "--flavor", "1/4096/1")
    cell.boot("bigger", "--host", "node2", "--flavor", "1/16384/1")
    assert cell.ctl("show", cell.boot("third"), "--json").document["host"] == "node1"


def test_boot_goes_on_to_the_next_host_when_one_refuses(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cell.api.build_and_run_instance
    asked: list[str] = []

    def refusing(*args: Any, host: str, **options: Any) -> Any:
        asked.append(host)
        if len(asked) == 1:
            raise errors.InsufficientResources(host=host, resource="vcpus", requested=1, free=0)
        return real(*args, host=host, **options)

    monkeypatch.setattr(cell.api, "build_and_run_instance", refusing)
    result = cell.ctl("boot", "next", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw")
    assert result.code == 0
    assert len(asked) == 2 and asked[0] != asked[1]
    assert f"host {asked[0]} does not take it" in result.err


def test_boot_does_not_try_another_host_after_silence(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def silent(*args: Any, host: str, **options: Any) -> Any:
        asked.append((host, options["operation"]))
        raise errors.PeerUnavailable(host=host)

    monkeypatch.setattr(cell.api, "build_and_run_instance", silent)
    result = cell.ctl("boot", "quiet", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw")
    assert result.code == 4
    assert len(asked) == 2 and len(set(asked)) == 1, "the same host and operation, twice"
    assert f"--host {asked[0][0]} --operation {asked[0][1]} --uuid " in result.err


def test_repeating_a_boot_as_it_says_makes_no_second_instance(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cell.api.build_and_run_instance

    def answer_is_lost(*args: Any, host: str, **options: Any) -> Any:
        real(*args, host=host, **options)
        raise errors.PeerUnavailable(host=host)

    boot = ("boot", "one", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw", "--vif", "bridge=br0")
    monkeypatch.setattr(cell.api, "build_and_run_instance", answer_is_lost)
    said = cell.ctl(*boot, "--json").document["error"]["message"]
    monkeypatch.undo()
    advised = said[said.index("--host") : said.index(", and it is done once")].split()
    document = cell.ctl(*boot, *advised, "--json").document
    assert document["accepted"]["repeated"] and document["operation"]["state"] == "done"
    named = [i for i in cell.ctl("list", "--json").document["instances"] if i["name"] == "one"]
    assert [i["uuid"] for i in named] == [document["instance"]]


def test_boot_that_fits_nowhere(cell: CtlCell) -> None:
    result = cell.ctl("boot", "huge", "--flavor", "1024/64/1", "--image", IMAGE)
    assert result.code == 3
    assert "no host can take it" in result.err and "node1: vcpus" in result.err and "node2: vcpus" in result.err


def test_a_boot_that_fails_is_told_with_its_reason(cell: CtlCell) -> None:
    result = cell.ctl("boot", "none", "--flavor", "1/64/1", "--image", "absent", "--host", "node1")
    assert result.code == 1
    assert "undone on host node1: image absent is not in store" in result.err
    assert "explain" in result.err
    as_json = cell.ctl("boot", "none", "--flavor", "1/64/1", "--image", "absent", "--json")
    assert as_json.code == 1
    assert as_json.document["operation"]["error"]["class"] == "ImageNotFound"


def test_no_wait_and_check_only(cell: CtlCell) -> None:
    boot = ("boot", "later", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw", "--host", "node1")
    checked = cell.ctl(*boot, "--check-only")
    assert checked.code == 0 and "would be accepted by host node1" in checked.out
    stall = cell.simulated("node1").faults.stall("create_disks")
    try:
        document = cell.ctl(*boot, "--no-wait", "--json").document
        assert document["operation"] is None
        assert stall.entered.wait(10)
        timed_out = cell.ctl(*boot[:-2], "--host", "node1", "--timeout", "0.3", "--operation",
                             document["accepted"]["operation"], "--uuid", document["instance"], "--json")
        assert timed_out.code in (3, 4)
    finally:
        stall.release()
    ended = wait_for(lambda: _ended(cell, document["accepted"]["operation"]), what="the build's end")
    assert ended["state"] == "done"


def _ended(cell: CtlCell, operation: str) -> dict[str, Any] | None:
    found = cell.ctl("explain", operation, "--host", "node1", "--json").document["operations"][0]
    return found if found["state"] in ("done", "undone") else None


def test_timeout_says_what_goes_on(cell: CtlCell) -> None:
    stall = cell.simulated("node1").faults.stall("create_disks")
    try:
        result = cell.ctl("boot", "slow", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw",
                          "--host", "node1", "--timeout", "0.2")
        assert result.code == 4
        assert "is still running (create_disks)" in result.err and "cancel" in result.err
        listed = cell.ctl("operations", "--open", "--json").document["operations"]
        assert [o["phase"] for o in listed] == ["create_disks"]
        board = cell.ctl("watch", "--count", "1", "--json").document
        assert [o["phase"] for o in board["operations"]] == ["create_disks"]
        operation = listed[0]["uuid"]
        told = cell.ctl("explain", operation[:8])
        assert "it can be cancelled" in told.out and "create_disks" in told.out
        cancelled = cell.ctl("cancel", operation[:8])
        assert cancelled.code == 0
    finally:
        stall.release()
    assert wait_for(lambda: _ended(cell, operation), what="the cancelled build's end")["state"] == "undone"
    assert "undone" in cell.ctl("explain", operation).out


def test_the_whole_life_by_name(cell: CtlCell) -> None:
    cell.boot("life")
    for command, expected in (
        ("stop", "shutdown"), ("start", "running"), ("reboot", "running"), ("pause", "paused"), ("unpause", "running"),
        ("suspend", "suspended"), ("resume", "running"),
    ):
        result = cell.ctl(command, "life")
        assert result.code == 0, result
        assert "done on host" in result.out
        assert power(cell, "life") == expected
    assert cell.ctl("reboot", "life", "--hard").code == 0
    assert cell.ctl("stop", "life", "--hard").code == 0
    assert cell.ctl("start", "life", "--json").document["operation"]["kind"] == "start_instance"
    assert cell.ctl("stop", "life", "--grace", "1").code == 0
    gone = cell.ctl("delete", "life")
    assert gone.code == 0
    assert cell.ctl("show", "life").code == 5


def test_list_and_show(cell: CtlCell) -> None:
    uuid_ = cell.boot("listed", "--host", "node2")
    document = cell.ctl("list", "--json").document
    assert document["unreachable"] == []
    assert {"uuid": uuid_, "name": "listed", "host": "node2"}.items() <= {
        i["uuid"]: i for i in document["instances"]
    }[uuid_].items()
    assert uuid_ in cell.ctl("list", "--host", "node2").out
    assert uuid_ not in cell.ctl("list", "--host", "node1").out
    assert "img-1 (raw)" in cell.ctl("show", uuid_[:10]).out
    ambiguous = [cell.boot("twin"), cell.boot("twin")]
    result = cell.ctl("show", "twin")
    assert result.code == 2
    assert all(u in result.err for u in ambiguous)


def test_console_and_diagnostics(cell: CtlCell) -> None:
    uuid_ = cell.boot("talker", "--host", "node1")
    told = cell.ctl("console", "talker")
    assert told.out.startswith("boot ") and "tick" in told.out
    document = cell.ctl("console", uuid_, "--json").document
    assert document["instance"] == uuid_ and "tick" in document["console"]
    measured = cell.ctl("diagnostics", "talker", "--json").document
    assert measured["diagnostics"]["state"] == "running" and measured["host"] == "node1"
    assert "processor time" in cell.ctl("diagnostics", "talker").out


def test_hostile_console_and_names_cannot_reach_the_terminal(cell: CtlCell) -> None:
    uuid_ = cell.boot("\u202egnp.exe\x9b31m", "--host", "node1")
    cell.simulated("node1").console(uuid_, "\x1b]0;owned\x07\x1b[2J\u202e evil\r\x08 [bold]plain[/bold] :smile:\n")
    for argv in (("console", uuid_), ("console", uuid_, "--json"), ("list",), ("list", "--json"), ("show", uuid_)):
        for terminal in (False, True):
            out = cell.ctl(*argv, terminal=terminal and argv[0] == "console").out
            assert not {c for c in out if not c.isprintable()} - {"\n", "\t"}, argv
    told = cell.ctl("console", uuid_).out
    assert r"\x1b]0;owned\x07" in told and "[bold]plain[/bold] :smile:" in told


def test_explain_is_complete(cell: CtlCell) -> None:
    uuid_ = cell.boot("explained")
    cell.ctl("stop", uuid_)
    stop = cell.ctl("operations", "--instance", "explained", "--json").document["operations"][-1]
    told = cell.ctl("explain", stop["uuid"]).out
    assert "stop_instance of instance" in told and "the guest shut itself down" in told and "power_off" in told
    document = cell.ctl("explain", stop["uuid"], "--json").document
    step = document["operations"][0]["steps"][0]
    assert step.keys() == {
        "name", "direction", "state", "started_at", "ended_at", "attempts", "error", "reason",
    }
    assert document["verdicts"] == {stop["host"]: "done: nothing more will happen"}
    assert cell.ctl("explain", ABSENT).code == 5
    assert cell.ctl("explain", "fff").code == 2
    table = cell.ctl("operations").out
    assert stop["uuid"] in table and "stop_instance" in table


def test_operations_since(cell: CtlCell) -> None:
    uuid_ = cell.boot("seq", "--host", "node1")
    seq = cell.ctl("operations", "--host", "node1", "--json").document["operations"][-1]["seq"]
    assert cell.ctl("operations", "--host", "node1", "--since", str(seq), "--json").document["operations"] == []
    cell.ctl("stop", uuid_)
    later = cell.ctl("operations", "--host", "node1", "--since", str(seq), "--json").document["operations"]
    assert [o["kind"] for o in later] == ["stop_instance"]


def test_disable_and_enable(cell: CtlCell) -> None:
    assert cell.ctl("disable", "node1", "--reason", "fan").code == 0
    try:
        assert "disabled: fan" in cell.ctl("hosts").out
        refused = cell.ctl("boot", "x", "--flavor", "1/64/1", "--image", IMAGE, "--host", "node1")
        assert refused.code == 3
        assert "compute-workerctl enable node1" in refused.err
        assert cell.ctl("show", cell.boot("elsewhere"), "--json").document["host"] == "node2"
    finally:
        assert cell.ctl("enable", "--host", "node1").code == 0
    assert "disabled" not in cell.ctl("hosts").out
    assert cell.ctl("disable").code == 2


def test_event(cell: CtlCell) -> None:
    vif = str(uuid.uuid4())
    boot = cell.ctl("boot", "plugged", "--flavor", "1/64/1", "--image", IMAGE, "--disk-format", "raw",
                    "--vif", f"bridge=br0,id={vif},wait", "--no-wait", "--json").document
    instance, operation = boot["instance"], boot["accepted"]["operation"]
    host = boot["host"]
    waiting = lambda: cell.api.get_operation(operation, host=host).phase == "wait_for_vifs"  # noqa: E731
    wait_for(waiting, what="the build to wait for its vif")
    assert cell.ctl("event", instance, "network-vif-plugged", "--tag", vif).code == 0
    ended: Operation = cell.api.get_operation(operation, 10, host=host)
    assert ended.state == "done"
    assert cell.ctl("event", instance, "Not An Event").code == 2


def test_cancel_of_what_nobody_knows(cell: CtlCell) -> None:
    assert cell.ctl("cancel", ABSENT).code == 5
    never = str(uuid.uuid4())
    assert cell.ctl("cancel", never, "--host", "node1").code == 0
    late = cell.ctl("boot", "late", "--flavor", "1/64/1", "--image", IMAGE, "--host", "node1", "--operation", never)
    assert late.code == 3 and "choose another --operation" in late.err
    done = cell.ctl("operations", "--json").document["operations"][0]
    assert cell.ctl("cancel", done["uuid"]).code == 3


def test_the_same_operation_sent_again_is_done_once(cell: CtlCell) -> None:
    uuid_ = cell.boot("once", "--host", "node1")
    operation = str(uuid.uuid4())
    first = cell.ctl("stop", uuid_, "--host", "node1", "--operation", operation, "--json").document
    again = cell.ctl("stop", uuid_, "--host", "node1", "--operation", operation, "--json").document
    assert not first["accepted"]["repeated"] and again["accepted"]["repeated"]
    assert again["operation"]["uuid"] == operation
    told = cell.ctl("stop", uuid_, "--host", "node1", "--operation", operation, "--no-wait")
    assert "had been accepted before" in told.out


def test_a_command_follows_an_instance_that_moved(cell: CtlCell, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid_ = cell.boot("mover", "--host", "node2")
    real = cell.api.stop_instance

    def moved(instance: str, *args: Any, host: str, **options: Any) -> Any:
        if host == "node1":
            raise errors.InstanceMoved(instance=instance, host="node2")
        return real(instance, *args, host=host, **options)

    monkeypatch.setattr(cell.api, "stop_instance", moved)
    result = cell.ctl("stop", uuid_, "--host", "node1")
    assert result.code == 0
    assert "has moved to host node2" in result.err and "done on host node2" in result.out


@pytest.mark.parametrize("command", COMMANDS_WITH_ONE_INSTANCE)
def test_an_unknown_instance_is_not_found(cell: CtlCell, command: str) -> None:
    assert cell.ctl(command, ABSENT).code == 5
    by_name = cell.ctl(command, "nobody")
    assert by_name.code == 5 and "compute-workerctl list" in by_name.err
    as_json = cell.ctl(command, "nobody", "--json")
    assert as_json.code == 5
    assert as_json.document["error"]["class"] == "InstanceNotFound" and as_json.document["exit_code"] == 5
    assert as_json.err == ""


def test_an_unknown_host_is_unreachable(cell: CtlCell) -> None:
    result = cell.ctl("list", "--host", "node9")
    assert result.code == 4
    assert "node9" in result.err
    assert cell.ctl("stop", ABSENT, "--host", "node9").code == 4


def test_a_command_in_the_wrong_state_is_refused(cell: CtlCell) -> None:
    uuid_ = cell.boot("state")
    result = cell.ctl("resume", uuid_)
    assert result.code == 0, "an active instance is what resume wants: done already"
    assert cell.ctl("pause", uuid_).code == 0
    refused = cell.ctl("suspend", uuid_, "--json")
    assert refused.code == 3
    assert refused.document["error"]["class"] == "InvalidState"
    assert refused.document["error"]["reschedulable"] is False


def test_a_busy_instance_says_who_holds_it(cell: CtlCell) -> None:
    uuid_ = cell.boot("busy", "--host", "node1")
    stall = cell.simulated("node1").faults.stall("suspend")
    try:
        first = cell.ctl("suspend", uuid_, "--no-wait", "--json").document["accepted"]["operation"]
        assert stall.entered.wait(10)
        result = cell.ctl("pause", uuid_)
        assert result.code == 3
        assert f"compute-workerctl cancel {first}" in result.err
    finally:
        stall.release()
    assert cell.api.get_operation(first, 10, host="node1").state == "done"


def test_watch_ends_after_count(cell: CtlCell) -> None:
    began = time.monotonic()
    result = cell.ctl("watch", "--count", "2", "--interval", "0.1")
    assert result.code == 0 and time.monotonic() - began < 10
    assert result.out.count("node1") >= 2
    assert cell.ctl("watch", "--interval", "0").code == 2


def test_watch_on_a_terminal_puts_it_back(cell: CtlCell) -> None:
    out = cell.ctl("watch", "--count", "1", terminal=True).out
    assert out.startswith("\x1b[?1049h") and "node1" in out
    assert out.rstrip().endswith("\x1b[?25h") or out.index("\x1b[?1049l") > out.index("node1")
    assert out.index("\x1b[?25l") < out.rindex("\x1b[?25h")


@pytest.mark.parametrize("name", parser.SUBCOMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "--json" in told and parser.SUBCOMMANDS[name].help[:20] in " ".join(told.split())


@pytest.mark.parametrize("argv", [[], ["fly"], ["boot"], ["stop"], ["boot", "x"], ["hosts", "--timeout", "soon"]])
def test_a_wrong_command_line_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(argv)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_no_broker_configured_is_usage() -> None:
    environment = {k: v for k, v in os.environ.items() if k != URL_VARIABLE} | {"HOME": "/nonexistent"}
    done = _program(["hosts", "--config-file", "/nonexistent.conf"], environment)
    assert done.returncode == 2 and "/nonexistent.conf" in done.stderr


def test_an_unreachable_broker_is_4_and_no_password_is_told() -> None:
    # Port 1 of this machine: nothing listens there.
    environment = os.environ | {URL_VARIABLE: "rabbit://someone:hunter22@127.0.0.1:1/x"}
    done = _program(["hosts", "--json"], environment)
    assert done.returncode == 4, done
    assert json.loads(done.stdout)["error"]["class"] == "PeerUnavailable"
    assert "hunter22" not in done.stdout + done.stderr
    assert done.stderr == ""


def _program(argv: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "compute_worker.cmd.ctl"]
    return subprocess.run(program + argv, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_interrupt_is_130(cell: CtlCell) -> None:
    def interrupted(args: Any) -> Any:
        raise KeyboardInterrupt

    err = io.StringIO()
    assert run(["hosts"], interrupted, io.StringIO(), err) == 130
    assert "what was accepted goes on" in err.getvalue()


def test_main_returns_what_run_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(URL_VARIABLE, "nonsense://")
    assert main(["hosts"]) == 2
    assert "the broker's address cannot be used" in capsys.readouterr().err
