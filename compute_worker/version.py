"""Which release this is."""

from __future__ import annotations

import functools


@functools.cache
def worker_version() -> str:
    """The installed release; ``unknown`` where the package was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("compute-worker")
    except PackageNotFoundError:
        return "unknown"
