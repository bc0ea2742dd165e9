from __future__ import annotations

import io
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.ctl.exits import UsageError
from compute_worker.ctl.output import Output, describe
from compute_worker.objects import Operation, Progress
from compute_worker.states import OperationState
from tests.ctl.cell import Terminal

UUID = "00000000-0000-4000-8000-000000000001"


def output(as_json: bool = False, terminal: bool = False) -> tuple[Output, io.StringIO, io.StringIO]:
    out, err = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
    return Output(as_json, out, err), out, err


def operation(state: str = "running", phase: str = "define", **facts: Any) -> Operation:
    return Operation(
        uuid=UUID, kind="k", host="h", state=OperationState(state), phase=phase, created_at=0, updated_at=1, **facts
    )


@given(st.text())
def test_whatever_a_table_holds_no_terminal_obeys_it(text: str) -> None:
    out, stdout, _ = output()
    out.table(("a", "b"), [(text, 1)])
    assert not {c for c in stdout.getvalue() if not c.isprintable()} - {"\n"}


@given(st.text())
def test_a_document_is_one_harmless_line_that_reads_back(text: str) -> None:
    out, stdout, _ = output(as_json=True)
    out.document({"text": text})
    line = stdout.getvalue()
    assert all(" " <= c < "\x7f" for c in line[:-1]) and line[-1] == "\n"
    assert json.loads(line) == {"version": 1, "text": text}


def test_markup_and_emoji_codes_are_plain_text() -> None:
    out, stdout, _ = output(terminal=True)
    out.table(("a",), [("[red]x[/red] :smile:",)])
    assert "[red]x[/red] :smile:" in stdout.getvalue()


def test_a_table_in_a_pipe_is_not_cut() -> None:
    out, stdout, _ = output()
    out.table(("a", "b"), [("x" * 300, "end")])
    assert "x" * 300 in stdout.getvalue() and "end" in stdout.getvalue()


def test_errors_for_people_and_for_programs() -> None:
    error = errors.HostDisabled(host="n\x1b1", reason="fan")
    out, stdout, stderr = output()
    out.error(error, "ctl")
    assert stdout.getvalue() == ""
    assert stderr.getvalue().splitlines() == [
        r"ctl: host n\x1b1 is disabled (fan): it takes no new instances",
        r"  choose another host, or `ctl enable n\x1b1`",
    ]
    out, stdout, stderr = output(as_json=True)
    out.error(error, "ctl")
    told = json.loads(stdout.getvalue())
    assert told["error"]["class"] == "HostDisabled" and told["error"]["reschedulable"] is True
    assert told["exit_code"] == 3 and stderr.getvalue() == ""
    out, stdout, _ = output(as_json=True)
    out.error(UsageError("what?"), "ctl")
    assert json.loads(stdout.getvalue())["error"] == {"class": "UsageError", "message": "what?"}


def test_notes_are_silent_with_json() -> None:
    out, stdout, stderr = output(as_json=True)
    out.note("something")
    with out.following("boot") as following:
        following(operation())
    assert stdout.getvalue() == stderr.getvalue() == ""


def test_following_in_a_pipe_tells_each_phase_once() -> None:
    out, _, stderr = output()
    with out.following("boot") as following:
        for phase in ("define", "define", "start_paused"):
            following(operation(phase=phase))
        following(operation("done", "done"))
    assert stderr.getvalue().splitlines() == ["boot: define", "boot: start_paused"]


def test_following_on_a_terminal_draws_a_bar_and_removes_it() -> None:
    out, stdout, stderr = output(terminal=True)
    with out.following("boot [b]x") as following:
        following(operation(progress=Progress(phase="fetch", done_bytes=1, total_bytes=2)))
    drawn = stderr.getvalue()
    assert "boot [b]x" in drawn and "━" in drawn and stdout.getvalue() == ""
    assert drawn.rindex("\x1b[?25h") > drawn.index("\x1b[?25l"), "the cursor is back"
    assert drawn.endswith("\x1b[2K"), "the line is wiped"


def test_describe() -> None:
    assert describe(operation()) == "define"
    assert describe(operation("done", "done")) == "done"
    waiting = operation(progress=Progress(phase="fetch"), waiting_for="room\x1b")
    assert describe(waiting) == r"fetch; waits: room\x1b"


def test_following_several_names_each() -> None:
    out, _, stderr = output()
    with out.following("resize", by=lambda o: o.host) as following:
        for phase in ("define", "define", "start_paused"):
            following(operation(phase=phase))
    host = operation().host
    assert stderr.getvalue().splitlines() == [f"resize: {host}: define", f"resize: {host}: start_paused"]
    out, _, stderr = output(terminal=True)
    with out.following("resize", by=lambda o: o.host) as following:
        following(operation(progress=Progress(phase="fetch", done_bytes=1, total_bytes=2)))
    assert "resize" in stderr.getvalue() and f"  {host}" in stderr.getvalue() and "━" in stderr.getvalue()
