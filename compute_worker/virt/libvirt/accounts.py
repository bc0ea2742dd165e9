"""The account that libvirt runs guests as, and what it may reach."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree as ET


def guest_user(capabilities_xml: str) -> tuple[int, int] | None:
    """User and group that guests run as, from libvirt's capabilities (the DAC security model); ``None``: not told."""
    for model in ET.fromstring(capabilities_xml).iterfind("./host/secmodel"):
        if model.findtext("model") == "dac":
            match = re.match(r"\+(\d+):\+(\d+)\Z", model.findtext("baselabel", ""))
            return (int(match[1]), int(match[2])) if match else None
    return None


def groups_of(uid: int, gid: int) -> set[int]:
    """The group itself and those that the user is a member of."""
    import pwd

    try:
        return {gid, *os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)}
    except KeyError:
        return {gid}


def may(wanted: int, found: os.stat_result, uid: int, gids: Collection[int]) -> bool:
    """Whether the user has all permissions of ``wanted`` (4 read, 2 write, 1 pass). By mode bits alone: access lists
    may say otherwise."""
    if uid == 0:
        return True
    shift = 6 if found.st_uid == uid else 3 if found.st_gid in gids else 0
    return stat.S_IMODE(found.st_mode) >> shift & wanted == wanted


def blocked_at(path: Path, uid: int, gids: Collection[int]) -> Path | None:
    """The topmost directory on the way to ``path`` (itself included) that the user may not pass; ``None``: none."""
    for directory in (*reversed(path.parents), path):
        if not may(1, directory.stat(), uid, gids):
            return directory
    return None
