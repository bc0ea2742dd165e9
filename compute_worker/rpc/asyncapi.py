"""The messages as an AsyncAPI 3 document, generated from the endpoints' annotations.

::

    python -m compute_worker.rpc.asyncapi > doc/asyncapi.yaml
    python -m compute_worker.rpc.asyncapi --check doc/asyncapi.yaml

With it a client in any language can be written on bare AMQP.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml  # type: ignore[import-untyped]

from compute_worker import errors, objects
from compute_worker.config import Rpc, Telemetry
from compute_worker.messages import Message, MessageKind, messages_of
from compute_worker.rpc import envelope

ENDPOINTS = "compute_worker.manager.service:ENDPOINTS"
PAYLOADS = (
    "compute_worker.telemetry.notifications:Payload",
    "compute_worker.telemetry.notifications:HostStatePayload",
)
"""Found by name when the program runs: this package imports nothing of manager and telemetry."""

BROADCAST = frozenset({"announce"})
REF = "#/components/schemas/{name}"

Schema = dict[str, Any]


def describe(endpoints: Iterable[object], payloads: Iterable[type], rpc: Rpc, notification_topic: str) -> Schema:
    """The document. Fields appear in a stable order, so that two runs are equal byte by byte.

    :param payloads: what a notification may hold.
    """
    found = [pair for endpoint in endpoints for pair in messages_of(endpoint)]
    found.sort(key=lambda pair: pair[0].name)
    types = [type_ for message, _ in found for type_ in [*message.arguments.values(), message.returns]]
    types += [objects.HostState, *payloads]
    schemas, components = msgspec.json.schema_components(types, ref_template=REF)
    of_type = dict(zip(map(repr, types), schemas, strict=True))
    components |= envelope.common(errors, [of_type[repr(payload)] for payload in payloads])
    for message, method in found:
        components |= _message_schemas(message, method, of_type)
    components |= envelope.host_announced(of_type[repr(objects.HostState)])
    document = {
        "asyncapi": "3.0.0",
        "info": {"title": "compute_worker", "version": objects.RPC_VERSION, "description": envelope.INTRODUCTION,
                 "license": {"name": "Apache-2.0"}},
        "defaultContentType": "application/json",
        "channels": _channels([message for message, _ in found], rpc, notification_topic),
        "operations": {message.name: _operation(message) for message, _ in found} | envelope.SENT,
        "components": {
            "messages": {message.name: _message(message) for message, _ in found} | envelope.MESSAGES,
            "schemas": dict(sorted(components.items())),
        },
    }  # fmt: skip
    plain: Schema = _portable(document)
    return plain


def _message_schemas(message: Message, method: Callable[..., Any], of_type: Mapping[str, Schema]) -> Schema:
    parameters = inspect.signature(method).parameters
    properties = {}
    for name, type_ in message.arguments.items():
        properties[name] = dict(of_type[repr(type_)])
        if name not in message.required:
            properties[name]["default"] = objects.encode(parameters[name].default)
    arguments: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    if message.required:
        arguments["required"] = sorted(message.required)
    returned = of_type[repr(message.returns)]
    return {
        f"{message.name}.args": arguments,
        f"{message.name}.request": envelope.request(message.name),
        f"{message.name}.reply": envelope.reply(returned),
    }


def _message(message: Message) -> Schema:
    kind = "A command: by call or by cast." if message.kind is MessageKind.COMMAND else "A query."
    return {
        "name": message.name,
        "title": message.name,
        "summary": " ".join(message.doc.split("\n\n")[0].split()).replace("``", "`") or message.name,
        "description": kind,
        "contentType": "application/json",
        "payload": envelope.sealed(f"{message.name}.request"),
    }


def _operation(message: Message) -> Schema:
    channel = "everybody" if message.name in BROADCAST else "host"
    operation: Schema = {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{message.name}"}],
    }
    if message.name not in BROADCAST:
        operation["reply"] = {
            "address": {"location": "$message.payload#/oslo.message/_reply_q",
                        "description": "Inside the JSON text of oslo.message; absent: a cast, nothing is answered."},
            "channel": {"$ref": "#/channels/replies"},
            "messages": [{"$ref": "#/channels/replies/messages/reply"}],
        }  # fmt: skip
        operation["x-result"] = {"$ref": f"#/components/schemas/{message.name}.reply"}
    return operation


def _channels(messages: list[Message], rpc: Rpc, notification_topic: str) -> Schema:
    def named(*names: str) -> Schema:
        return {name: {"$ref": f"#/components/messages/{name}"} for name in names}

    direct = [message.name for message in messages if message.name not in BROADCAST]
    return {
        "host": {
            "address": rpc.topic + ".{host}",
            "description": "The queue of one host. Publish with the mandatory flag and wait for the confirm: a message"
            " that comes back found no such host; a confirmed cast is accepted.",
            "parameters": {"host": {"description": "name the worker listens as"}},
            "messages": named(*direct),
            "bindings": {"amqp": envelope.exchange(rpc.exchange, "topic")},
        },
        "everybody": {
            "address": f"{rpc.exchange}_fanout",
            "description": "Every host gets a copy. The exchange is not durable and deleted with its last queue.",
            "messages": named(*sorted(BROADCAST)),
            "bindings": {"amqp": envelope.exchange(f"{rpc.exchange}_fanout", "fanout", lasting=False)},
        },
        "replies": {
            "address": None,
            "description": "A queue that the caller declares, of any name; reached through the default exchange.",
            "messages": named("reply"),
            "bindings": {"amqp": envelope.exchange("", "default")},
        },
        "announcements": {
            "address": "{reply_topic}",
            "description": f"A queue that who asked has bound to exchange {rpc.exchange} with its own name as key.",
            "parameters": {"reply_topic": {"description": "what `announce` named"}},
            "messages": named("host_announced"),
            "bindings": {"amqp": envelope.exchange(rpc.exchange, "topic")},
        },
        "notifications": {
            "address": notification_topic + ".{priority}",
            "description": "Durable queues that the worker declares. Sent at least once and in order for one host:"
            " drop what you have seen by message_id, or by (host, operation, sequence).",
            "parameters": {"priority": {"enum": ["info", "error"]}},
            "messages": named("notification"),
            "bindings": {"amqp": envelope.exchange(rpc.exchange, "topic")},
        },
    }


def _portable(value: Any) -> Any:
    """``value`` with regular expressions as every language has them: Python's ``\\Z`` is their ``$``."""
    if isinstance(value, dict):
        return {
            key: item.replace(r"\Z", "$") if key == "pattern" and isinstance(item, str) else _portable(item)
            for key, item in value.items()
        }
    return [_portable(item) for item in value] if isinstance(value, list | tuple) else value


class _Plain(yaml.SafeDumper):  # type: ignore[misc]
    """Writes everything out, anchors would only puzzle readers, and text of several lines as it reads."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True

    def represent_text(self, text: str) -> Any:
        """As a block where it has lines."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _Plain.represent_text)


def render(document: Schema) -> str:
    """The document as YAML."""
    head = "# Generated: python -m compute_worker.rpc.asyncapi > doc/asyncapi.yaml\n"
    body: str = yaml.dump(document, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)
    return head + body


def main(arguments: list[str] | None = None) -> int:
    """Print the document, or check that a file holds it (status 1 when it does not)."""
    parser = argparse.ArgumentParser(prog="python -m compute_worker.rpc.asyncapi", description=main.__doc__)
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with FILE and print nothing")
    options = parser.parse_args(arguments)
    payloads = [pkgutil.resolve_name(name) for name in PAYLOADS]
    text = render(describe(pkgutil.resolve_name(ENDPOINTS), payloads, Rpc(), Telemetry().notification_topic))
    if options.check is None:
        sys.stdout.write(text)
        return 0
    if options.check.is_file() and options.check.read_text() == text:
        return 0
    sys.stderr.write(f"{options.check} is stale: python -m compute_worker.rpc.asyncapi > {options.check}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
