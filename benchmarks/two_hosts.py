"""Two workers on the fake driver in one process, for :mod:`bench_resize_cpu`, until standard input ends.

Arguments: transport URL of the broker, directory for what they keep. "listening" on standard output, followed by the
exchange they listen on, says that they take messages.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from common import IMAGE

from compute_worker.embedded import EmbeddedCell

HOSTS = ("node1", "node2")
ROOM: dict[str, Any] = {"vcpus": 65_536, "memory_mb": 16_777_216, "disk_gb": 1_000_000}


def cell(directory: Path, url: str | None = None) -> EmbeddedCell:
    """The two hosts, not yet started, with one image in their store.

    :param url: default: the broker in this process.
    """
    logging.getLogger().setLevel(logging.ERROR)
    made = EmbeddedCell(HOSTS, directory, url=url, fake=ROOM)
    (directory / "images" / IMAGE).write_bytes(b"a root file system of few bytes")
    return made


def main(url: str, directory: str) -> None:
    """Serve until whoever started us closes our standard input."""
    with cell(Path(directory), url) as made:
        print(f"listening {made.exchange}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
