"""``console --follow``: only what is new of a console that is read as its last bytes, again and again."""

from __future__ import annotations

import time
from collections.abc import Callable

from compute_worker import errors
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit
from compute_worker.ctl.find import follow
from compute_worker.ctl.text import safe

INTERVAL_SECONDS = 1.0


def overlap(before: str, now: str) -> int:
    """Length of the longest end of ``before`` that ``now`` begins with."""
    if before and now.startswith(before):
        return len(before)
    longest = min(len(before), len(now))
    pattern, text = now[:longest], before[len(before) - longest :]
    return _matched_at_end(pattern, text)


def _matched_at_end(pattern: str, text: str) -> int:
    """How much of ``pattern`` stands at the end of ``text``, in linear time (Knuth, Morris, Pratt)."""
    if not pattern:
        return 0
    border = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = border[length - 1]
        length += pattern[index] == pattern[length]
        border[index] = length
    length = 0
    for character in text:
        if length == len(pattern):
            length = border[length - 1]
        while length and character != pattern[length]:
            length = border[length - 1]
        length += character == pattern[length]
    return length


def fresh(before: str, now: str) -> tuple[str, bool]:
    """What ``now`` has after ``before``, and whether they join: both are ends of one text, the second a later one.

    The first line of ``now`` may be cut anywhere, also within an escaped character: then the lines after it decide.
    """
    if not before:
        return now, True
    known = overlap(before, now)
    if known:
        return now[known:], True
    rest = now.partition("\n")[2]
    known = overlap(before, rest) if rest else 0
    return (rest[known:], True) if known else (now, not now)


def follow_console(
    ctl: Ctl, host: str, uuid: str, sleep: Callable[[float], None] = time.sleep, interval: float = INTERVAL_SECONDS
) -> Exit:
    """Write what the guest writes until the instance is gone. With ``--json`` one document for each piece."""
    before = ""
    while True:
        try:
            text = ctl.client.api.get_console_output(uuid, ctl.args.bytes, host=host)
        except errors.InstanceMoved as exc:
            host = follow(ctl.client, uuid, exc.kwargs["host"]).host
            ctl.out.note(f"the instance has moved to host {host}")
            continue
        except (errors.InstanceDeleted, errors.InstanceNotFound):
            if not before:
                raise
            ctl.out.note(f"instance {uuid} is gone")
            return Exit.OK
        except errors.Retryable as exc:
            ctl.out.note(f"{exc.message}; asking again")
            sleep(interval)
            continue
        piece, joined = fresh(before, text)
        before = text or before
        if piece:
            _tell(ctl, host, uuid, piece, joined)
        sleep(interval)


def _tell(ctl: Ctl, host: str, uuid: str, piece: str, joined: bool) -> None:
    if ctl.out.as_json:
        ctl.out.document({"host": host, "instance": uuid, "console": piece, "joined": joined})
        return
    if not joined:
        ctl.out.note("(some of the console was missed, or it began anew)")
    ctl.out.raw(safe(piece, keep="\n\t"))
