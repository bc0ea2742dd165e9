"""Names of hosts and paths before they reach an argument vector or a socket."""

from __future__ import annotations

import ipaddress
import re

_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\Z")
_PATH = re.compile(r"(/[A-Za-z0-9_+=@%,~-][A-Za-z0-9_.+=@%,~-]*|/\.[A-Za-z0-9_-]+)+\Z")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")


def is_host(text: str) -> bool:
    """Whether it is an IP address or a host name; nothing that could be an option, a user or a port."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _NAME.match(text) is not None
    return "%" not in text


def is_path(text: str) -> bool:
    """Whether it is an absolute path that no shell and no rsync reads anything into."""
    return _PATH.match(text) is not None


def is_user(text: str) -> bool:
    """Whether it is a login name."""
    return _USER.match(text) is not None


def in_url(host: str) -> str:
    """A host where a colon follows: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host
