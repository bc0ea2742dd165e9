"""Values as an operator reads them. Whatever comes from a guest, a user or a host goes through :func:`safe`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from compute_worker.objects import Progress

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def safe(text: object, keep: str = "") -> str:
    """``text`` so that no terminal obeys it: what is not printable is spelled out, except the characters in ``keep``.

    Not printable are control characters (also the eight-bit ones), marks that turn the direction of writing, and lone
    surrogates.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in str(text))


def amount(size: float) -> str:
    """Bytes with a binary unit, three digits or so."""
    for unit in _UNITS[:-1]:
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def span(seconds: float) -> str:
    """A duration: ``3 ms``, ``2.1 s``, ``4 min 10 s``, ``3 h 5 min``, ``2 d 4 h``."""
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def clock(when: float) -> str:
    """A moment, as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def number(value: float) -> str:
    """A count without a needless fraction."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def fraction(progress: Progress | None) -> float | None:
    """How much is done, 0 to 1; ``None`` where nobody knows."""
    if progress is None or progress.done_bytes is None or not progress.total_bytes:
        return None
    return min(1.0, progress.done_bytes / progress.total_bytes)


def progress_line(progress: Progress | None) -> str:
    """``fetch_images 12.0 MiB of 30.0 MiB, 4.0 MiB/s, 4.5 s left``, as far as it is known."""
    if progress is None:
        return ""
    parts = []
    if progress.done_bytes is not None:
        total = f" of {amount(progress.total_bytes)}" if progress.total_bytes is not None else ""
        parts.append(f"{amount(progress.done_bytes)}{total}")
    if progress.rate:
        parts.append(f"{amount(progress.rate)}/s")
    if progress.eta is not None:
        parts.append(f"{span(progress.eta)} left")
    parts += [said for name, value in progress.detail.items() if (said := _detail(name, value))]
    return f"{safe(progress.phase)} {', '.join(parts)}".strip()


_LIVE: Mapping[str, Callable[[float], str]] = {
    "iteration": lambda count: f"pass {count:.0f} over its memory" if count else "",
    "memory_remaining": lambda size: f"{amount(size)} of memory left" if size else "",
    "disk_remaining": lambda size: f"{amount(size)} of disks left" if size else "",
    "memory_dirty_rate": lambda rate: f"it writes {amount(rate)}/s" if rate else "",
    "throttle": lambda percent: f"slowed down by {percent:.0f} %" if percent else "",
    "expected_downtime": lambda seconds: f"would stand still for {span(seconds)}",
    "downtime": lambda seconds: f"stood still for {span(seconds)}",
    # Said by the others.
    "memory_total": lambda size: "",
    "memory_processed": lambda size: "",
    "memory_rate": lambda rate: "",
    "disk_total": lambda size: "",
    "disk_processed": lambda size: "",
    "disk_rate": lambda rate: "",
    "elapsed": lambda seconds: "",
}
"""What a live migration tells of itself (:mod:`compute_worker.liveprogress`)."""


def _detail(name: str, value: float | int | str) -> str:
    if name == "status":
        return safe(value)
    words = _LIVE.get(name)
    if words is None or isinstance(value, str):
        return f"{safe(name)} {safe(value)}"
    return words(value)
