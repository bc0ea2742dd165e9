"""How values look in XML: text, choices, numbers, truth."""

from __future__ import annotations

import re
from typing import Protocol, TypeVar

T = TypeVar("T")

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def readable(text: str) -> str:
    """``text`` with every character that XML 1.0 cannot hold replaced: for words of people, never for names."""
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


class Converter(Protocol[T]):
    """How a value looks as text. ``dump`` refuses what must not be written (``ValueError``)."""

    def load(self, text: str) -> T:
        """The value of what is in the XML."""

    def dump(self, value: T) -> str:
        """The text to write."""


class Str:
    """Any text that XML 1.0 can hold."""

    def load(self, text: str) -> str:
        """The text itself."""
        return text

    def dump(self, value: str) -> str:
        """The text itself; control characters and lone surrogates would make the document unreadable."""
        if not isinstance(value, str):
            raise ValueError(f"expected text, got {value!r}")
        if _ILLEGAL.search(value):
            raise ValueError(f"XML cannot hold the characters of {value!r}")
        return value


class Choice(Str):
    """One of the values we write. Parsing accepts others too: libvirt may know more."""

    def __init__(self, *values: str) -> None:
        self.values = values

    def dump(self, value: str) -> str:
        """The value, if it is one of ours."""
        if value not in self.values:
            raise ValueError(f"expected one of {', '.join(self.values)}, got {value!r}")
        return value


class Int:
    """A decimal integer of at least ``minimum``. ``0x`` is read too (libvirt prints addresses so)."""

    def __init__(self, minimum: int = 0) -> None:
        self.minimum = minimum

    def load(self, text: str) -> int:
        """The number."""
        return int(text.strip(), 0) if text.strip().startswith("0x") else int(text)

    def dump(self, value: int) -> str:
        """The number in decimal."""
        if not isinstance(value, int) or isinstance(value, bool) or value < self.minimum:
            raise ValueError(f"expected an integer of at least {self.minimum}, got {value!r}")
        return str(value)


class Bool:
    """Two words for a truth value: ``yes``/``no`` or ``on``/``off``."""

    def __init__(self, true: str, false: str) -> None:
        self.true = true
        self.false = false

    def load(self, text: str) -> bool:
        """True for the first word only."""
        return text == self.true

    def dump(self, value: bool) -> str:
        """The word."""
        if not isinstance(value, bool):
            raise ValueError(f"expected True or False, got {value!r}")
        return self.true if value else self.false


STR = Str()
YES_NO = Bool("yes", "no")
ON_OFF = Bool("on", "off")
