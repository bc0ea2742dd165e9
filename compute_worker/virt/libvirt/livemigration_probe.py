"""Whether two hosts see one instances directory: the destination makes a file, and the source looks for it.

Ids that stand in both directories and differ say no without a file. Equal ones are no proof: a copied directory has its
id copied too.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from pathlib import Path

from compute_worker.images import files

_NAME = re.compile(r"probe-[0-9a-f]{32}\Z")
LIFETIME = 60.0
"""Seconds after which a file that no source removed goes."""


def make(directory: Path, source_id: str, own_id: str) -> tuple[str, str]:
    """Destination: name and content of a new file in ``directory``; empty where the source is known to have another.

    It is gone after :data:`LIFETIME`, and what a dead process left, with the next one.
    """
    clean(directory)
    if source_id and own_id and source_id != own_id:
        return "", ""
    name, content = f"probe-{secrets.token_hex(16)}", secrets.token_hex(16)
    with files.disk_errors(directory / name):
        files.create_private(directory / name)
        (directory / name).write_text(content)
    timer = threading.Timer(LIFETIME, remove, (directory, name))
    timer.daemon = True
    timer.start()
    return name, content


def seen(directory: Path, name: str, content: str) -> bool:
    """Source: whether ``directory`` is the destination's too; then the file has done its work and goes."""
    if not name or not content or _NAME.match(name) is None:
        return False
    try:
        found = (directory / name).read_text() == content
    except (OSError, UnicodeDecodeError):
        return False
    if found:
        remove(directory, name)
    return found


def remove(directory: Path, name: str) -> None:
    """The file is gone; one that cannot be removed does no harm."""
    if _NAME.match(name) is None:
        return
    try:
        (directory / name).unlink(missing_ok=True)
    except OSError:
        return


def clean(directory: Path, now: float | None = None) -> None:
    """Remove files that outlived their question."""
    for path in directory.glob("probe-*"):
        try:
            age = (time.time() if now is None else now) - path.stat().st_mtime
        except OSError:
            continue
        if age > LIFETIME:
            remove(directory, path.name)
