"""Which request, operation and instance a log line is about.

A thread binds them with :func:`bound`; :class:`ContextFilter` puts them on every record. Imports nothing of ours.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LogContext:
    """What the current thread works on; ``None``: nothing in particular."""

    request_id: str | None = None
    operation: str | None = None
    instance: str | None = None

    def __str__(self) -> str:
        named = (self.request_id, _tagged("op", self.operation), _tagged("instance", self.instance))
        return " ".join(part for part in named if part) or "-"


_NOTHING = LogContext()
_CURRENT: ContextVar[LogContext] = ContextVar("compute_worker_log_context", default=_NOTHING)


def _tagged(tag: str, value: str | None) -> str | None:
    return f"{tag}={value}" if value else None


def current() -> LogContext:
    """What the calling thread has bound."""
    return _CURRENT.get()


def new_request_id() -> str:
    """A request id for work that came without one."""
    return f"req-{uuid.uuid4()}"


@contextmanager
def bound(
    *, request_id: str | None = None, operation: str | None = None, instance: str | None = None
) -> Iterator[LogContext]:
    """Bind what is given for the block, in this thread; what is not given stays as it was."""
    given = {"request_id": request_id, "operation": operation, "instance": instance}
    context = replace(_CURRENT.get(), **{name: value for name, value in given.items() if value is not None})
    token = _CURRENT.set(context)
    try:
        yield context
    finally:
        _CURRENT.reset(token)


class ContextFilter(logging.Filter):
    """Gives every record ``request_id``, ``operation``, ``instance`` and ``about`` (all three in one word or ``-``).

    What a caller set on the record itself (``extra=``) wins.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true: it adds, and drops nothing."""
        context = _CURRENT.get()
        for name in ("request_id", "operation", "instance"):
            if not getattr(record, name, None):
                setattr(record, name, getattr(context, name) or "-")
        record.about = str(context)
        return True


def install(handlers: Iterable[logging.Handler]) -> None:
    """Make every record that goes through ``handlers`` carry the context."""
    for handler in handlers:
        if not any(isinstance(known, ContextFilter) for known in handler.filters):
            handler.addFilter(ContextFilter())
