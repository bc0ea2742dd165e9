"""From what came over the wire to typed arguments, and from errors to what may go back.

Everything here is pure: bad input ends in one :class:`~compute_worker.errors.InvalidCommand` that names the method, the
argument and the field, and nothing was touched.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from compute_worker import errors, logcontext, objects
from compute_worker.messages import Context, Message, MessageKind, messages_of

UNIQUE_ID = "_unique_id"
SIZE = "_size"
"""Key under which :func:`shrunk` notes how large a message was."""

_WORD = re.compile(r"[A-Za-z0-9._:-]{1,255}\Z")
_UUID = re.compile(objects.UUID_PATTERN)
_VERSION = re.compile(r"[0-9]{1,4}\.[0-9]{1,4}\Z")
_SECRET = re.compile(r"pass|secret|token|user_data|injected_files|content_base64", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_INT64 = 1 << 63
_LONGEST_ARGUMENT_NAME = 64


class Catalogue:
    """The messages that ``endpoints`` answer, by name."""

    def __init__(self, endpoints: Iterable[object]) -> None:
        self._messages: dict[str, Message] = {}
        self._methods: dict[str, Callable[..., Any]] = {}
        for endpoint in endpoints:
            for message, method in messages_of(endpoint):
                if message.name in self._messages:
                    raise ValueError(f"two endpoints answer {message.name}")
                self._messages[message.name] = message
                self._methods[message.name] = method

    def __iter__(self) -> Iterator[Message]:
        return iter(self._messages.values())

    def is_query(self, method: object) -> bool:
        """Whether ``method`` is a known query: nothing that needs to be kept."""
        message = self._messages.get(method) if isinstance(method, str) else None
        return message is not None and message.kind is MessageKind.QUERY

    def find(self, raw: Mapping[str, Any]) -> Message:
        """The message that ``raw`` asks for.

        :raises compute_worker.errors.UnknownMethod: nobody answers it.
        :raises compute_worker.errors.NotSupported: it is of a version this host does not speak.
        """
        method, version = raw.get("method"), raw.get("version", "1.0")
        message = self._messages.get(method) if isinstance(method, str) else None
        if message is None or raw.get("namespace") is not None:
            raise errors.UnknownMethod(method=str(method)[:_LONGEST_ARGUMENT_NAME])
        if not compatible(version, objects.RPC_VERSION):
            raise errors.NotSupported(what=f"version {str(version)[:16]} of the messages")
        return message


def compatible(asked: object, spoken: str) -> bool:
    """Whether who speaks ``spoken`` understands ``asked``: same major part, minor part not above."""
    if not isinstance(asked, str) or not _VERSION.match(asked):
        return False
    (major, minor), (our_major, our_minor) = (map(int, version.split(".")) for version in (asked, spoken))
    return major == our_major and minor <= our_minor


def decode_arguments(message: Message, args: object) -> dict[str, Any]:
    """``args`` (from JSON) as the endpoint's annotations want them.

    :raises compute_worker.errors.InvalidCommand: one is missing, unknown, mistyped or out of bounds.
    """
    if not isinstance(args, dict):
        raise _invalid(message.name, "its arguments are not an object")
    for name in args.keys() - message.arguments.keys():
        raise _invalid(message.name, f"unknown argument {str(name)[:_LONGEST_ARGUMENT_NAME]!r}")
    for name in sorted(message.required - args.keys()):
        raise _invalid(message.name, f"argument {name!r} is missing", name)
    return {name: _decode(message, name, args[name]) for name in message.arguments if name in args}


def _decode(message: Message, name: str, value: Any) -> Any:
    problem = unacceptable(value)
    if problem is None:
        try:
            return objects.decode(value, message.arguments[name], message.name)
        except errors.InvalidCommand as exc:
            problem = str(exc.kwargs.get("problem", exc))
    raise _invalid(message.name, f"argument {name!r}: {problem}", name)


def _invalid(method: str, problem: str, argument: str = "") -> errors.InvalidCommand:
    return errors.InvalidCommand(method=method, problem=problem, argument=argument)


_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False)
_SUSPECT = re.compile(r"\\u[dD]|\d{19}")
"""In JSON's ASCII: half a surrogate pair, or a number that may have more than 64 bits."""


def unacceptable(value: Any) -> str | None:
    """What JSON lets through and nothing behind us can store, in words; ``None``: all fine."""
    # Nearly every message is fine: its text says so, which is faster than to look at each of its values.
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        if not _SUSPECT.search(_ENCODER.encode(value)):
            return None
    return _fault_in(value)


def _fault_in(value: Any) -> str | None:
    todo: list[Iterable[Any]] = [[value]]
    while todo:
        for item in todo.pop():
            kind = type(item)
            if kind is str:
                if not item.isascii() and _SURROGATE.search(item):
                    return "it holds text that is not valid unicode"
            elif kind is dict:
                todo += (item, item.values())
            elif kind is list:
                todo.append(item)
            elif kind is float:
                if not math.isfinite(item):
                    return "it holds a number that is not finite"
            elif kind is int and not -_INT64 <= item < _INT64:
                return "it holds a number beyond 64 bits"
    return None


def context_of(envelope: Mapping[str, Any], message_id: str, *, inbox: bool) -> Context:
    """The context that travelled as ``envelope``, the parts that could spoil a log line replaced or left out."""
    request_id = word(envelope.get("request_id"))
    return Context(
        request_id=request_id or logcontext.new_request_id(),
        message_id=message_id,
        inbox=message_id if inbox else None,
        user=word(envelope.get("user_id") or envelope.get("user")),
        project=word(envelope.get("project_id") or envelope.get("project")),
    )


def word(value: object) -> str | None:
    """``value`` if it is one word that can do no harm in a log line or as a key, else ``None``."""
    return value if isinstance(value, str) and _WORD.match(value) else None


def message_id_of(raw: Mapping[str, Any]) -> str:
    """The sender's unique id of a message; one of our own where it has none that can be used."""
    return word(raw.get(UNIQUE_ID)) or uuid.uuid4().hex


def instance_of(args: object) -> str | None:
    """The uuid of the instance that ``args`` are about, unchecked, to keep its commands in order."""
    instance = args.get("instance") if isinstance(args, dict) else None
    if isinstance(instance, dict):
        instance = instance.get("uuid")
    return instance if isinstance(instance, str) and len(instance) <= 64 else None


def method_of(raw: Mapping[str, Any]) -> str:
    """The name of the method that ``raw`` asks for, short and harmless in a log line, a record or a notification."""
    method = str(raw.get("method"))[:_LONGEST_ARGUMENT_NAME]
    return method if _WORD.match(method) else repr(method)


def uuid_in(args: object, name: str) -> str | None:
    """The uuid in argument ``name`` (or in the ``uuid`` of the object there), ``None`` unless it is one."""
    value = args.get(name) if isinstance(args, dict) else None
    if isinstance(value, dict):
        value = value.get("uuid")
    return value if isinstance(value, str) and _UUID.match(value) else None


def operation_of(args: object) -> str | None:
    """The operation that ``args`` name, unchecked, for log lines."""
    return word(args.get("operation")) if isinstance(args, dict) else None


def shrunk(raw: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A message that is too large, without what makes it so: enough to refuse it and to say what it was about."""
    args = raw.get("args")
    about = {"instance": instance_of(args), "operation": operation_of(args)}
    kept = {key: value for key, value in raw.items() if isinstance(value, str) and len(value) <= 255}
    return kept | {"args": {key: value for key, value in about.items() if value}, SIZE: size}


def redacted(args: object, depth: int = 4) -> Any:
    """``args`` for journal and log: without secrets, and short."""
    if isinstance(args, dict):
        if depth == 0:
            return "..."
        return {
            str(name)[:_LONGEST_ARGUMENT_NAME]: "***" if _SECRET.search(str(name)) else redacted(value, depth - 1)
            for name, value in list(args.items())[:64]
        }
    if isinstance(args, list):
        return [redacted(value, depth - 1) for value in args[:16]] if depth else "..."
    if isinstance(args, str):
        return args.encode("utf-8", "backslashreplace").decode()[:256]
    return args


def sendable(error: BaseException, host: str, method: str, request_id: str) -> errors.ComputeError:
    """What the caller may see of ``error``: ours as they are, anything else as an internal error.

    That one says where to look; no traceback, path or value of ours goes with it.
    """
    if not isinstance(error, errors.ComputeError):
        return errors.ComputeError(
            f"internal error in {method[:_LONGEST_ARGUMENT_NAME]}; see the log of host {host} for request {request_id}"
        )
    kwargs = {name: value for name, value in error.kwargs.items() if _is_plain(value)}
    # A class of another module could not be rebuilt at the caller: its nearest base can.
    cls = next(cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    sent: errors.ComputeError = cls(error.message, **kwargs)
    for hint in ("reschedulable", "retry_after"):
        if getattr(error, hint) != getattr(sent, hint):
            sent.kwargs[hint] = getattr(error, hint)
    return sent


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
