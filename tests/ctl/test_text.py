from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.ctl.text import amount, fraction, number, progress_line, safe, span
from compute_worker.objects import Progress


@given(st.text())
def test_safe_leaves_nothing_a_terminal_obeys(text: str) -> None:
    assert all(c.isprintable() for c in safe(text))


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S"])))
def test_safe_leaves_plain_text_alone(text: str) -> None:
    assert safe(text) == text


def test_safe_spells_out_and_keeps_what_it_is_told_to() -> None:
    assert safe("\x1b[31m\x9b\u202e\ud800\n") == r"\x1b[31m\x9b\u202e\ud800\n"
    assert safe("a\tb\nc\r", keep="\t\n") == "a\tb\nc\\r"


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 * 1024, "150 KiB"), (3 << 30, "3.0 GiB")],
)
def test_amount(size: int, words: str) -> None:
    assert amount(size) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0 ms"), (0.0031, "3 ms"), (0.9996, "1.0 s"), (2.14, "2.1 s"), (59.96, "1 min 0 s"), (250, "4 min 10 s"),
        (3600 * 3 + 300, "3 h 5 min"), (86_400 * 2 + 4 * 3600, "2 d 4 h"),
    ],
)
def test_span(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_number_has_no_needless_fraction() -> None:
    assert (number(4.0), number(4.25)) == ("4", "4.2")


def test_progress_line_says_what_is_known() -> None:
    assert progress_line(None) == ""
    assert progress_line(Progress(phase="define")) == "define"
    full = Progress(
        phase="fetch_images", done_bytes=1 << 20, total_bytes=3 << 20, rate=1 << 20, eta=2, detail={"image": "\x1b"}
    )
    assert progress_line(full) == r"fetch_images 1.0 MiB of 3.0 MiB, 1.0 MiB/s, 2.0 s left, image \x1b"


def test_progress_line_of_a_live_migration() -> None:
    detail: dict[str, float | int | str] = {
        "status": "running", "iteration": 3, "memory_total": 1 << 30, "memory_processed": 5 << 20,
        "memory_remaining": 64 << 20, "memory_rate": 1e8, "memory_dirty_rate": float(32 << 20), "disk_total": 1,
        "disk_processed": 1, "disk_remaining": 0, "disk_rate": 0.0, "throttle": 20, "expected_downtime": 0.64,
        "elapsed": 4.0,
    }  # fmt: skip
    said = progress_line(Progress(phase="live_migration", done_bytes=5 << 20, total_bytes=69 << 20, detail=detail))
    assert said == (
        "live_migration 5.0 MiB of 69.0 MiB, running, pass 3 over its memory, 64.0 MiB of memory left,"
        " it writes 32.0 MiB/s, slowed down by 20 %, would stand still for 640 ms"
    )
    over = Progress(phase="live_migration", detail={"status": "completed", "downtime": 0.041})
    assert progress_line(over) == "live_migration completed, stood still for 41 ms"


def test_fraction() -> None:
    assert fraction(None) is None
    assert fraction(Progress(phase="x", done_bytes=1, total_bytes=0)) is None
    assert fraction(Progress(phase="x", done_bytes=1, total_bytes=4)) == 0.25
    assert fraction(Progress(phase="x", done_bytes=5, total_bytes=4)) == 1.0
