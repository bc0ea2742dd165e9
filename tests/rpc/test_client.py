from __future__ import annotations

import inspect
import time
import types
import typing
from typing import Any

import msgspec
import pytest

from compute_worker import errors, logcontext
from compute_worker.manager.service import ENDPOINTS
from compute_worker.messages import Message, MessageKind, messages_of
from compute_worker.objects import Flavor, ImageMeta, InjectedFile, Instance
from compute_worker.rpc import client
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.options import CommandOptions
from compute_worker.rpc.transport import get_transport
from tests.rpc.hosts import UUID, Host

MESSAGES = [message for endpoint in ENDPOINTS for message, _ in messages_of(endpoint)]
BROADCAST = {"announce"}
ONE = UUID.format(1)


class Recorder(ComputeAPI):
    """Sends nothing: keeps what would be sent."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(get_transport("kombu+memory://"), **kwargs)
        self.sent: list[tuple[str, str, dict[str, Any], bool]] = []
        self.answer: Any = {"operation": None, "host": "node1"}

    def _send(self, prepared: Any, host: str, method: str, args: dict[str, Any], cast: bool = False) -> Any:
        self.sent.append((host, method, args, cast))
        return self.answer


def essence(annotation: Any) -> Any:
    """A type without its bounds, a sequence as a list: what a caller of either side would write."""
    annotation = msgspec.inspect.type_info(annotation)
    return _plain(annotation)


def _plain(info: Any) -> Any:
    match info:
        case msgspec.inspect.Metadata():
            return _plain(info.type)
        case msgspec.inspect.UnionType():
            return frozenset(map(_plain, info.types))
        case msgspec.inspect.ListType():
            return ("list", _plain(info.item_type))
        case msgspec.inspect.StructType():
            return info.cls
        case msgspec.inspect.LiteralType():
            return msgspec.inspect.StrType
        case _:
            return type(info)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_the_client_has_a_method_for_every_message(message: Message) -> None:
    method = getattr(ComputeAPI, message.name)
    hints = typing.get_type_hints(method, include_extras=True)
    parameters = dict(inspect.signature(method).parameters)
    del parameters["self"]
    if message.name in BROADCAST:
        assert "host" not in parameters
    else:
        assert parameters.pop("host").kind is inspect.Parameter.KEYWORD_ONLY
    options = parameters.pop("options", None)
    arguments = dict(message.arguments)
    if message.kind is MessageKind.COMMAND:
        assert options is not None and hints["options"] == typing.Unpack[CommandOptions]
        for option in ("operation", "expires_at", "check_only"):
            assert option not in message.required
            arguments.pop(option)
    assert list(parameters) == list(arguments)
    required = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    assert required == set(message.required)
    for name, annotation in arguments.items():
        assert essence(_listed(hints[name])) == essence(annotation), name
    if message.returns is not type(None):
        assert essence(hints["return"]) == essence(message.returns)


def _listed(annotation: Any) -> Any:
    """``Sequence[X]`` is how a caller says ``list[X]``."""
    origin = typing.get_origin(annotation)
    if origin is not None and getattr(origin, "__name__", "") == "Sequence":
        return types.GenericAlias(list, typing.get_args(annotation))
    return annotation


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_defaults_of_client_and_endpoint_agree(endpoint: type) -> None:
    for message, method in messages_of(endpoint):
        ours = inspect.signature(getattr(ComputeAPI, message.name)).parameters
        theirs = inspect.signature(method).parameters
        for name in message.arguments.keys() & ours.keys():
            default = ours[name].default
            assert (list(default) if default == () else default) == theirs[name].default, f"{message.name}({name})"


def test_the_client_sends_nothing_that_no_endpoint_answers() -> None:
    public = {name for name in vars(ComputeAPI) if not name.startswith("_")}
    assert public - {message.name for message in MESSAGES} == {"host_announced"}


def build() -> Instance:
    return Instance(uuid=ONE, flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="cirros"))


def test_commands_always_carry_an_operation_and_builds_expire() -> None:
    api = Recorder()
    api.build_and_run_instance(build(), [InjectedFile(path="/a", content_base64="")], host="node1")
    api.stop_instance(ONE, host="node1")
    (_, _, built, _), (_, _, stopped, _) = api.sent
    assert len(built["operation"]) == 36 and built["operation"] != stopped["operation"]
    assert built["expires_at"] == pytest.approx(time.time() + 3600, abs=60)
    assert stopped["expires_at"] is None
    assert (built["check_only"], built["admin_password"]) == (False, None)


def test_what_the_caller_says_is_sent() -> None:
    api = Recorder()
    api.build_and_run_instance(build(), host="node1", operation=ONE, expires_at=5.0, check_only=True)
    sent = api.sent[0][2]
    assert (sent["operation"], sent["expires_at"], sent["check_only"]) == (ONE, 5.0, True)


def test_a_cast_answers_what_the_broker_has_accepted() -> None:
    api = Recorder()
    accepted = api.start_instance(ONE, host="node1", cast=True)
    assert api.sent[0][3] is True
    assert (accepted.operation, accepted.host) == (api.sent[0][2]["operation"], "node1")


def test_a_check_cannot_be_cast() -> None:
    with pytest.raises(errors.InvalidCommand, match="check_only"):
        Recorder().start_instance(ONE, host="node1", cast=True, check_only=True)


@pytest.mark.parametrize("host", ["", "../x", "a b", "node1\0", "-x", "*", "#", "compute.*", "x" * 300])
def test_bad_host_names_are_not_sent_to(host: str) -> None:
    api = Recorder()
    with pytest.raises(errors.InvalidCommand, match="host"):
        api.get_host_state(host=host)
    assert api.sent == []


def test_a_pinned_client_refuses_what_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SINCE", {"pause_instance": "1.2"})
    with pytest.raises(errors.NotSupported, match=r"pause_instance \(version 1.2, this client is pinned to 1.1\)"):
        Recorder(version_cap="1.1").pause_instance(ONE, host="node1")
    Recorder(version_cap="1.2").pause_instance(ONE, host="node1")
    Recorder(version_cap="1.1").unpause_instance(ONE, host="node1")


def test_an_answer_that_is_not_what_was_asked_for_is_an_error() -> None:
    api = Recorder()
    api.answer = {"uuid": 3}
    with pytest.raises(errors.ComputeError):
        api.get_instance(ONE, host="node1")


def test_nobody_listening_is_said_at_once(api: ComputeAPI, name: str) -> None:
    for cast in (False, True):
        with pytest.raises(errors.MessageUndeliverable) as caught:
            api.start_instance(ONE, host=name, cast=cast)
        assert (caught.value.kwargs["host"], caught.value.reschedulable) == (name, True)


def test_errors_come_as_their_own_class(host: Host, api: ComputeAPI) -> None:
    host.notebook.raises.append(errors.InstanceMoved(instance=ONE, host="node7"))
    with pytest.raises(errors.InstanceMoved) as caught:
        api.start_instance(ONE, host=host.name)
    assert type(caught.value) is errors.InstanceMoved
    assert str(caught.value) == f"instance {ONE} has moved to host node7: ask there"
    assert caught.value.kwargs["host"] == "node7"
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_no_answer_is_said_after_the_timeout(host: Host, transport: Any) -> None:
    host.notebook.gate.clear()
    with pytest.raises(errors.PeerUnavailable, match=f"host {host.name} does not answer"):
        ComputeAPI(transport, timeout=0.3).start_instance(ONE, host=host.name)


def test_no_broker_is_said_after_the_retries() -> None:
    api = ComputeAPI(get_transport("rabbit://u:hunter2@127.0.0.1:1/x"), retry=0)
    for cast in (False, True):
        with pytest.raises(errors.PeerUnavailable, match="no broker") as caught:
            api.start_instance(ONE, host="node1", cast=cast)
        assert "hunter2" not in str(caught.value)


def test_the_request_id_of_the_thread_goes_along(host: Host, transport: Any) -> None:
    api = ComputeAPI(transport, identity={"user_id": "u", "project_id": "p"})
    with logcontext.bound(request_id="req-42"):
        api.start_instance(ONE, host=host.name)
    api.start_instance(ONE, host=host.name)
    first, second = (context for _, _, context in host.notebook.seen)
    assert (first.request_id, first.user, first.project) == ("req-42", "u", "p")
    assert second.request_id.startswith("req-") and second.request_id != "req-42"
