"""Secrets out of text: log lines, errors, whatever may leave the process.

Patterns catch credentials in addresses and values of fields that are named like a secret; known secrets (the broker's
password) are caught wherever they stand, also without a name beside them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

MASK = "***"
SHORTEST_KNOWN = 6
"""A known secret with fewer characters is left to the patterns: it would be found inside ordinary words."""
TOO_COMMON = frozenset({"guest", "password", "rabbit", "rabbitmq", "compute"})

# Also the further brokers of rabbit://user:password@a,user:password@b/vhost.
_USERINFO = re.compile(r"(?P<before>(?:://|,)[^\s,/@:'\"]*):(?P<secret>[^\s,'\"]+?)@(?=[\w\[])")
_NAMED = re.compile(
    r"""(?P<name>
            (?:admin_?pass(?:word|wd)?|passwd|password|passphrase|secret(?:_key)?|auth_?token|x-auth-token|authorization)
            \\*["']?\s*(?:=>|[:=])\s*)
        (?P<value>
            b?u?"(?:[^"\\]|\\.)*"
            | b?u?'(?:[^'\\]|\\.)*'
            | \\"(?:[^"\\]|\\[^"])*\\"
            | (?:Bearer\ |Basic\ )?[^\s,;&}\])'"]+)""",
    re.IGNORECASE | re.VERBOSE,
)
_HINTS = ("pass", "secret", "token", "authorization")


class Redactor:
    """Takes secrets out of text. Thread-safe.

    :param secrets: values that must not appear anywhere.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._known: frozenset[str] = frozenset()
        self._pattern: re.Pattern[str] | None = None
        self.add(*secrets)

    def add(self, *secrets: str | None) -> None:
        """Know more secrets. Those too short or too common to be told from ordinary words are ignored."""
        forms = {form for s in secrets if s for form in (s, quote(s, safe=""), unquote(s))}
        with self._lock:
            kept = self._known | {f for f in forms if len(f) >= SHORTEST_KNOWN and f.lower() not in TOO_COMMON}
            self._known = kept
            longest_first = sorted(kept, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first))) if kept else None

    def __call__(self, text: str) -> str:
        """``text`` without secrets."""
        if self._pattern is not None:
            text = self._pattern.sub(MASK, text)
        if "@" in text:
            text = _USERINFO.sub(rf"\g<before>:{MASK}@", text)
        lowered = text.lower()
        if any(hint in lowered for hint in _HINTS):
            text = _NAMED.sub(_mask_value, text)
        return text


def _mask_value(match: re.Match[str]) -> str:
    value = match["value"]
    for opening in ('\\"', '"', "'"):
        if opening in value[:3] and value.endswith(opening):
            return f"{match['name']}{value[: value.index(opening)]}{opening}{MASK}{opening}"
    return f"{match['name']}{MASK}"


def passwords_of(transport_url: str | None) -> list[str]:
    """The passwords in an address of one or several brokers; none where it cannot be read."""
    if not transport_url or "://" not in transport_url:
        return []
    scheme, rest = transport_url.split("://", 1)
    found = []
    for broker in rest.split("/", 1)[0].split(","):
        try:
            password = urlsplit(f"{scheme}://{broker}").password
        except ValueError:
            continue
        if password:
            found.append(password)
    return found
