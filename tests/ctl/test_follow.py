from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.ctl.connect import Client
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.follow import follow_console, fresh, overlap
from compute_worker.ctl.output import Output
from compute_worker.ctl.parser import make_parser
from tests.ctl.test_output import output

UUID = "00000000-0000-4000-8000-000000000001"
TEXT = st.text(alphabet="ab\n", max_size=40)


@given(TEXT, TEXT)
def test_overlap_is_the_longest(before: str, now: str) -> None:
    longest = max(n for n in range(len(before) + 1) if now.startswith(before[len(before) - n :]))
    assert overlap(before, now) == longest


@given(st.lists(TEXT, min_size=3, max_size=20), st.lists(TEXT, max_size=8), st.integers(0, 30))
def test_a_window_that_slides_loses_nothing_while_it_overlaps(old: list[str], more: list[str], extra: int) -> None:
    lines = [f"{number} {text!r}\n" for number, text in enumerate([*old, *more])]
    before, added = "".join(lines[: len(old)]), "".join(lines[len(old) :])
    window = len(added) + len("".join(lines[len(old) - 2 : len(old)])) + extra
    assert fresh(before[-window:], (before + added)[-window:]) == (added, True)


def test_fresh() -> None:
    assert fresh("", "a\n") == ("a\n", True)
    assert fresh("a\n", "a\nb\n") == ("b\n", True)
    assert fresh("a\n", "a\n") == ("", True)
    assert fresh("one\ntwo\n", "wo\nthree\n") == ("three\n", True)
    assert fresh("é one\ntwo\n", "\\xa9 one\ntwo\nthree\n") == ("three\n", True), "cut within a character"
    assert fresh("old\n", "new\n") == ("new\n", False)
    assert fresh("old\n", "") == ("", True)


class Console:
    """Stands for the worker: one answer after the other."""

    def __init__(self, *answers: str | Exception) -> None:
        self._answers = list(answers)

    def get_console_output(self, instance: str, tail_bytes: int, *, host: str) -> str:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


GONE = errors.InstanceDeleted(instance=UUID)


def follow(out: Output, *answers: str | Exception) -> int:
    api: Any = Console(*answers)
    argv = ["console", UUID, "--follow", *(["--json"] if out.as_json else [])]
    ctl = Ctl(Client(api, None), make_parser().parse_args(argv), out)
    return follow_console(ctl, "node1", UUID, sleep=lambda seconds: None)


def test_only_what_is_new_is_written_until_the_instance_goes() -> None:
    out, stdout, stderr = output()
    assert follow(out, "boot\n", "boot\ntick 1\n", "boot\ntick 1\n", errors.PeerUnavailable(host="node1"),
                  "tick 1\ntick 2\x1b[2J\n", GONE) == 0
    assert stdout.getvalue() == "boot\ntick 1\ntick 2\\x1b[2J\n"
    assert "asking again" in stderr.getvalue() and "is gone" in stderr.getvalue()


def test_a_break_is_said() -> None:
    out, stdout, stderr = output()
    follow(out, "before\n", "after\n", GONE)
    assert stdout.getvalue() == "before\nafter\n" and "began anew" in stderr.getvalue()


def test_json_is_a_document_for_each_piece() -> None:
    out, stdout, _ = output(as_json=True)
    follow(out, "a\n", "a\nb\n", GONE)
    pieces = [json.loads(line) for line in stdout.getvalue().splitlines()]
    assert [(p["console"], p["joined"]) for p in pieces] == [("a\n", True), ("b\n", True)]


def test_an_instance_that_never_was_is_not_found() -> None:
    with pytest.raises(errors.InstanceDeleted):
        follow(output()[0], GONE)
