"""How an endpoint method says that it is a message: decorated, annotated, found by :func:`messages_of`.

The manager's endpoints use the decorators, :mod:`compute_worker.rpc` reads them: the server decodes arguments by the
annotations, the AsyncAPI description is generated from them. Neither imports the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar, get_type_hints

F = TypeVar("F", bound=Callable[..., Any])


class MessageKind(StrEnum):
    """``COMMAND``: accepted durably, answered with ``Accepted``; by call or cast. ``QUERY``: answered when done."""

    COMMAND = "command"
    QUERY = "query"


@dataclass(frozen=True, slots=True)
class Context:
    """What came with a message. ``request_id`` follows it through every log line and to every host."""

    request_id: str
    message_id: str
    """Unique to the message; a redelivered one carries the same."""
    inbox: str | None = None
    """Row of the durable inbox that holds the message: set for a cast, deleted by whoever accepts or refuses it."""
    user: str | None = None
    project: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message as its endpoint method declares it: arguments by name, what is required, what comes back."""

    name: str
    kind: MessageKind
    arguments: Mapping[str, Any]
    required: frozenset[str]
    returns: Any
    doc: str = field(default="", repr=False)


class Inbox(Protocol):
    """Where casts are kept from before they are acknowledged until they are accepted or refused."""

    def put(self, message_id: str, body: bytes) -> bool:
        """Store durably; false when it was there already. If the process dies inside, the broker sends it again."""

    def open(self) -> list[tuple[str, bytes]]:
        """What is still to be accepted, oldest first."""

    def discard(self, message_id: str) -> None:
        """Forget one that was accepted or refused."""


def command(func: F) -> F:
    """Mark an endpoint method as a command."""
    return _mark(func, MessageKind.COMMAND)


def query(func: F) -> F:
    """Mark an endpoint method as a query."""
    return _mark(func, MessageKind.QUERY)


def _mark(func: F, kind: MessageKind) -> F:
    func.message_kind = kind  # type: ignore[attr-defined]
    func.exposed = True  # type: ignore[attr-defined]  # what oslo.messaging's ExplicitRPCAccessPolicy looks for
    return func


def messages_of(endpoint: object) -> Iterator[tuple[Message, Callable[..., Any]]]:
    """Every message of an endpoint (an object or a class), by name, with the method that answers it."""
    for name in sorted(dir(endpoint)):
        method = getattr(endpoint, name, None)
        kind = getattr(method, "message_kind", None)
        if kind is None or method is None:
            continue
        yield _describe(name, kind, method), method


def _describe(name: str, kind: MessageKind, method: Callable[..., Any]) -> Message:
    hints = get_type_hints(method, include_extras=True)
    names = [n for n in inspect.signature(method).parameters if n not in ("self", "context")]
    required = {n for n in names if inspect.signature(method).parameters[n].default is inspect.Parameter.empty}
    return Message(
        name=name,
        kind=kind,
        arguments={n: hints[n] for n in names},
        required=frozenset(required),
        returns=hints.get("return"),
        doc=inspect.getdoc(method) or "",
    )
