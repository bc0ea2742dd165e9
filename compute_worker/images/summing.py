"""The sha256 of what passes, computed on another processor while the same bytes are written or sent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

BESIDE_BYTES = 256 << 10
"""Less is summed at once: handing it over would take longer."""


class Sum:
    """A running sha256. Use it as a context: its thread ends with it. A piece may be changed once :meth:`beside` has
    ended."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def __enter__(self) -> Sum:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    @contextmanager
    def beside(self, data: bytes | bytearray | memoryview) -> Iterator[None]:
        """Sum ``data`` while the context is open."""
        if len(data) < BESIDE_BYTES:
            self._digest.update(data)
            yield
            return
        summed = self._pool.submit(self._digest.update, data)
        try:
            yield
        finally:
            summed.result()

    def hexdigest(self) -> str:
        """Of everything so far."""
        return self._digest.hexdigest()
