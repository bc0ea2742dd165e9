"""What every message of the AsyncAPI document has in common: oslo.messaging's envelope 2.0, replies, failures."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from compute_worker.objects import RPC_VERSION

Schema = dict[str, Any]

INTRODUCTION = """\
A worker takes commands and queries as AMQP 0-9-1 messages, in the envelope of oslo.messaging.

To send: publish to exchange `compute_worker` (topic, durable) with routing key `compute.<host>`, persistent
(`delivery_mode` 2), `content_type` `application/json`, `content_encoding` `utf-8`, the mandatory flag, and publisher
confirms. The body is a JSON object of two keys: `oslo.version`, always `"2.0"`, and `oslo.message`, the request as JSON
*text* (a string). What stands under `contentSchema` is the schema of that text.

A request without `_msg_id` is a cast: once the broker has confirmed it, it is accepted, and a refusal comes as a
notification. With `_msg_id` and `_reply_q` it is a call: the answer is published to the queue `_reply_q` through the
default exchange, in the same envelope, and carries the same `_msg_id`. An answer whose `ending` is false only says that
the call still runs (asked for by `_timeout`); the one whose `ending` is true has either `result` or `failure`.
`failure` is JSON text as well.

A command has been accepted when its call was answered with an `Accepted` object, or its cast was confirmed. Give every
command an `operation` uuid of your own: the same command sent again with the same uuid is done once. Unknown fields of
objects are ignored; unknown arguments of methods are refused.
"""


def sealed(schema: str) -> Schema:
    """The envelope around a message whose JSON text follows ``schema``."""
    return {
        "type": "object",
        "required": ["oslo.version", "oslo.message"],
        "properties": {
            "oslo.version": {"const": "2.0"},
            "oslo.message": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": f"#/components/schemas/{schema}"},
            },
        },
    }


def request(method: str) -> Schema:
    """The schema of a request for ``method``."""
    return {
        "allOf": [{"$ref": "#/components/schemas/request"}],
        "type": "object",
        "properties": {
            "method": {"const": method},
            "args": {"$ref": f"#/components/schemas/{method}.args"},
        },
    }


def reply(result: Schema) -> Schema:
    """The schema of an answer that holds ``result``."""
    return {
        "allOf": [{"$ref": "#/components/schemas/reply"}],
        "type": "object",
        "properties": {"result": {"anyOf": [result, {"type": "null"}]}},
    }


def host_announced(state: Schema) -> Schema:
    """Schemas of the answer to ``announce``."""
    arguments = {
        "type": "object",
        "additionalProperties": False,
        "required": ["state"],
        "properties": {"state": state},
    }
    return {"host_announced.args": arguments, "host_announced.request": request("host_announced")}


def common(errors: ModuleType, payloads: list[Schema]) -> Schema:
    """Schemas that all messages refer to."""
    notification = _NOTIFICATION | {"properties": _NOTIFICATION["properties"] | {"payload": {"anyOf": payloads}}}
    return {"request": _REQUEST, "reply": _REPLY, "failure": _failure(errors), "notification": notification}


def exchange(name: str, kind: str, lasting: bool = True) -> Schema:
    """AMQP binding of a channel whose address is the routing key."""
    properties: Schema = {"name": name, "type": kind}
    if name:
        properties |= {"durable": lasting, "autoDelete": not lasting}
    return {"is": "routingKey", "exchange": properties, "bindingVersion": "0.3.0"}


def _failure(errors: ModuleType) -> Schema:
    base = errors.ComputeError
    classes: list[Any] = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, base)]
    return {
        "type": "object",
        "required": ["class", "module", "message", "args", "kwargs"],
        "properties": {
            "class": {"type": "string", "enum": sorted(cls.__name__ for cls in classes)},
            "module": {"const": errors.__name__},
            "message": {"type": "string", "description": "for the operator"},
            "args": {"type": "array", "description": "the message again"},
            "kwargs": {
                "type": "object",
                "description": "what the message was made of",
                "properties": {
                    "reschedulable": {"type": "boolean", "description": "another host may take the same command"},
                    "retry_after": {"type": ["number", "null"], "description": "seconds after which this host may"},
                },
            },
            "tb": {"type": "array", "items": {"type": "string"}, "description": "class and message; no traceback"},
        },
        "x-reschedulable": sorted(cls.__name__ for cls in classes if cls.reschedulable),
        "x-parents": {cls.__name__: cls.__base__.__name__ for cls in classes if cls is not base},
    }


_REQUEST: Schema = {
    "type": "object",
    "required": ["method", "args", "version", "_unique_id"],
    "properties": {
        "method": {"type": "string"},
        "args": {"type": "object"},
        "version": {
            "type": "string",
            "pattern": r"^1\.[0-9]+\Z",
            "description": f"version of the messages that is needed; this worker speaks {RPC_VERSION}",
        },
        "namespace": {"type": "null"},
        "_unique_id": {
            "type": "string",
            "pattern": r"^[A-Za-z0-9._:-]{1,255}\Z",
            "description": "new for every message: the worker knows a message by it that the broker delivers twice",
        },
        "_msg_id": {"type": "string", "description": "of a call: repeated in the answer"},
        "_reply_q": {"type": "string", "description": "of a call: queue for the answer"},
        "_timeout": {
            "type": ["integer", "null"],
            "minimum": 2,
            "description": "seconds of silence the caller bears; twice as often the worker says that the call runs",
        },
        "_context_request_id": {"type": "string", "pattern": r"^[A-Za-z0-9._:-]{1,255}\Z"},
        "_context_user_id": {"type": "string"},
        "_context_project_id": {"type": "string"},
    },
    "dependencies": {"_msg_id": ["_reply_q"], "_reply_q": ["_msg_id"]},
}

_REPLY: Schema = {
    "type": "object",
    "required": ["result", "failure", "ending", "_msg_id", "_unique_id"],
    "properties": {
        "result": {},
        "failure": {
            "type": ["string", "null"],
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/failure"},
        },
        "ending": {"type": "boolean"},
        "_msg_id": {"type": "string"},
        "_unique_id": {"type": "string"},
    },
}

_NOTIFICATION: Schema = {
    "type": "object",
    "required": ["message_id", "publisher_id", "event_type", "priority", "payload", "timestamp"],
    "properties": {
        "message_id": {"type": "string"},
        "publisher_id": {"type": "string", "description": "compute.<host>"},
        "event_type": {
            "type": "string",
            "description": "instance.<command>.start|progress|waiting|end|error, instance.power_state, host.state",
        },
        "priority": {"type": "string", "enum": ["INFO", "ERROR"]},
        "payload": {"type": "object"},
        "timestamp": {"type": "string"},
        "_unique_id": {"type": "string"},
    },
}

MESSAGES: Schema = {
    "reply": {"name": "reply", "contentType": "application/json", "payload": sealed("reply")},
    "host_announced": {
        "name": "host_announced",
        "contentType": "application/json",
        "payload": sealed("host_announced.request"),
    },
    "notification": {"name": "notification", "contentType": "application/json", "payload": sealed("notification")},
}

SENT: Schema = {
    "host_announced": {
        "action": "send",
        "channel": {"$ref": "#/channels/announcements"},
        "messages": [{"$ref": "#/channels/announcements/messages/host_announced"}],
    },
    "notify": {
        "action": "send",
        "channel": {"$ref": "#/channels/notifications"},
        "messages": [{"$ref": "#/channels/notifications/messages/notification"}],
    },
}
