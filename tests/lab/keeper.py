"""Removes a cell's state directory when whoever made the cell is gone, however it went.

Run as a script with the cell's lifeline as standard input.  The hosts watch the same lifeline
and are dead by then; standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator


def host_pids(state: str) -> Iterator[str]:
    """The PID 1s of the cell in `state` that are alive."""
    for name in os.listdir(state):
        try:
            with open(os.path.join(state, name, "pid"), encoding="ascii") as pid_file:
                pid, started = pid_file.read().split()
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
        except (OSError, ValueError):
            continue
        if fields[0] not in "ZX" and fields[19] == started:
            yield pid


def main() -> None:
    state = sys.argv[1]
    while os.read(0, 1):
        continue
    end = time.monotonic() + 30
    while os.path.isdir(state) and any(host_pids(state)) and time.monotonic() < end:
        time.sleep(0.05)
    # Only what is a cell's.
    if os.path.exists(os.path.join(state, "lab.json")):
        shutil.rmtree(state, ignore_errors=True)


if __name__ == "__main__":
    main()
