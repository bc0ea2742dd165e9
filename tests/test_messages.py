"""How endpoints declare messages."""

from __future__ import annotations

from typing import Any

from compute_worker.messages import Context, MessageKind, command, messages_of, query
from compute_worker.objects import Accepted, Instance, Uuid


class Endpoint:
    @command
    def start(self, context: Context, instance: Uuid, check_only: bool = False) -> Accepted:
        """Start it.

        At length.
        """
        return Accepted(operation=None, host="h")

    @query
    def look(self, context: Context) -> list[Instance]:
        return []

    def helper(self, context: Context) -> None:
        raise AssertionError("not a message")

    value = 3


class Child(Endpoint):
    @query
    def more(self, context: Context, since: int) -> int:
        """More."""
        return since


def found(endpoint: object) -> dict[str, Any]:
    return {message.name: message for message, _ in messages_of(endpoint)}


def test_only_decorated_methods_are_messages() -> None:
    assert list(found(Endpoint())) == ["look", "start"]
    assert list(found(Child())) == ["look", "more", "start"]


def test_kinds() -> None:
    messages = found(Endpoint())
    assert (messages["start"].kind, messages["look"].kind) == (MessageKind.COMMAND, MessageKind.QUERY)


def test_arguments_without_self_and_context() -> None:
    start = found(Endpoint())["start"]
    assert start.arguments == {"instance": Uuid, "check_only": bool}
    assert start.required == {"instance"}
    assert start.returns is Accepted
    assert start.doc == "Start it.\n\nAt length."
    assert found(Endpoint())["look"].doc == ""


def test_class_and_object_say_the_same() -> None:
    assert found(Endpoint) == found(Endpoint())


def test_method_comes_along_and_works() -> None:
    methods = {message.name: method for message, method in messages_of(Child())}
    assert methods["more"](Context("r", "m"), since=4) == 4


def test_exposed_to_the_access_policy() -> None:
    assert Endpoint.start.exposed is True  # type: ignore[attr-defined]
    assert not hasattr(Endpoint.helper, "exposed")
