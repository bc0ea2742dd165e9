from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest

from compute_worker import errors
from compute_worker.config import Rpc
from compute_worker.messages import Inbox
from compute_worker.operations.inbox import DatabaseInbox
from compute_worker.rpc import server as server_module
from compute_worker.rpc.client import ComputeAPI
from tests.rpc.hosts import UUID, Host
from tests.waiting import wait_for

ONE, TWO = UUID.format(1), UUID.format(2)


def raw_client(transport: Any, name: str, **kwargs: Any) -> Any:
    target = oslo_messaging.Target(exchange="compute_worker", topic="compute", server=name)
    return oslo_messaging.get_rpc_client(transport, target, timeout=10, **kwargs)


def stored(message: dict[str, Any]) -> bytes:
    return json.dumps({"version": "1.0", "args": {}, **message}).encode()


def test_a_call_is_answered(host: Host, api: ComputeAPI) -> None:
    accepted = api.start_instance(ONE, host=host.name)
    assert accepted.host == host.name
    (arguments,) = host.notebook.arguments("start_instance")
    assert arguments["operation"] == accepted.operation
    context = host.notebook.seen[0][2]
    assert context.inbox is None
    assert len(context.message_id) == 32


def test_a_cast_is_kept_until_it_was_accepted(host: Host, api: ComputeAPI) -> None:
    host.notebook.gate.clear()
    api.start_instance(ONE, host=host.name, cast=True)
    wait_for(host.open_rows, what="the cast to be in the inbox")
    host.notebook.gate.set()
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")
    (_, _, context) = host.notebook.seen[0]
    assert context.inbox == context.message_id
    assert host.refusals.seen == []


def test_what_the_inbox_holds_is_done_at_start(transport: Any, tmp_path: Path, name: str) -> None:
    host = Host(transport, tmp_path, name)
    for number in range(20):
        body = {"method": "start_instance", "args": {"instance": ONE, "expires_at": number}}
        host.inbox.put(f"m{number}", stored(body))
    host.inbox.put("not-a-message", b"\xff")
    with host:
        wait_for(lambda: not host.open_rows(), what="the inbox to be empty")
        assert [args["expires_at"] for args in host.notebook.arguments("start_instance")] == list(range(20))
        assert [context.message_id for _, _, context in host.notebook.seen] == [f"m{n}" for n in range(20)]


def test_a_second_delivery_is_recognised(transport: Any, tmp_path: Path, name: str, api: ComputeAPI) -> None:
    class DeliveredBefore(Puts):
        def put(self, message_id: str, body: bytes) -> bool:
            self.inbox.put(message_id, body)
            return self.inbox.put(message_id, body)

    with Host(transport, tmp_path, name, inbox=DeliveredBefore) as host:
        api.start_instance(ONE, host=name, cast=True)
        wait_for(host.open_rows, what="the cast to be stored")
        api.start_instance(TWO, host=name)
        assert [args["instance"] for args in host.notebook.arguments("start_instance")] == [TWO]


class Puts:
    """An inbox whose :meth:`put` a test decides."""

    def __init__(self, inbox: DatabaseInbox) -> None:
        self.inbox = inbox

    def open(self) -> list[tuple[str, bytes]]:
        return self.inbox.open()

    def discard(self, message_id: str) -> None:
        self.inbox.discard(message_id)


def test_a_journal_that_cannot_be_written_loses_nothing(
    transport: Any, tmp_path: Path, name: str, api: ComputeAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compute_worker.rpc.listener.KEEP_TRYING_SECONDS", 0.0)

    class Failing(Puts):
        failures = 3

        def put(self, message_id: str, body: bytes) -> bool:
            if self.failures:
                self.failures -= 1
                raise OSError(28, "No space left on device")
            return self.inbox.put(message_id, body)

    with Host(transport, tmp_path, name, inbox=Failing) as host:
        api.start_instance(ONE, host=name, cast=True)
        wait_for(lambda: host.notebook.arguments("start_instance"), what="the cast to be accepted in the end")
        assert host.inbox.failures == 0


def test_a_cast_that_cannot_be_understood_is_refused_and_recorded(host: Host, transport: Any) -> None:
    client = raw_client(transport, host.name)
    client.cast({"request_id": "req-7"}, "start_instance", instance="../x", admin_password="hunter2")
    wait_for(lambda: host.refusals.seen, what="the refusal")
    context, method, args, error = host.refusals.seen[0]
    assert (context.request_id, method, type(error)) == ("req-7", "start_instance", errors.InvalidCommand)
    assert args == {"instance": "../x", "admin_password": "***"}
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")
    assert host.notebook.seen == []


def test_a_cast_of_an_unknown_method_is_refused_and_recorded(host: Host, transport: Any) -> None:
    raw_client(transport, host.name).cast({}, "not_exposed")
    wait_for(lambda: host.refusals.seen, what="the refusal")
    assert type(host.refusals.seen[0][3]) is errors.UnknownMethod
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")


def test_a_refused_cast_is_recorded(host: Host, api: ComputeAPI) -> None:
    host.notebook.raises.append(errors.InstanceNotFound(instance=ONE, host=host.name))
    api.start_instance(ONE, host=host.name, cast=True)
    wait_for(lambda: host.refusals.seen, what="the refusal")
    assert type(host.refusals.seen[0][3]) is errors.InstanceNotFound
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")


def test_a_refusal_that_cannot_be_recorded_is_tried_again(
    host: Host, api: ComputeAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RETRY_SECONDS", (0.01,))
    host.refusals.failures = 3
    host.notebook.raises += [errors.InvalidState()] * 4
    api.start_instance(ONE, host=host.name, cast=True)
    wait_for(lambda: host.refusals.seen, what="the refusal")
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")


@pytest.mark.parametrize("error", [errors.StoreBusy(), errors.HypervisorUnavailable(reason="down"), KeyError("bug")])
def test_a_cast_that_cannot_be_accepted_now_is_kept_and_tried_again(
    host: Host, api: ComputeAPI, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(server_module, "RETRY_SECONDS", (0.01,))
    host.notebook.raises += [error] * 4
    api.start_instance(ONE, host=host.name, cast=True)
    api.start_instance(ONE, host=host.name, cast=True, expires_at=1.0)
    wait_for(lambda: len(host.notebook.seen) == 6 and not host.open_rows(), what="both casts to be accepted")
    assert [args["expires_at"] for args in host.notebook.arguments("start_instance")] == [None] * 5 + [1.0]
    assert host.refusals.seen == []


def test_a_cast_that_always_fails_unexpectedly_is_refused_in_the_end(
    host: Host, api: ComputeAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RETRY_SECONDS", (0.01,))
    host.notebook.raises += [KeyError("/etc/shadow")] * 100
    api.start_instance(ONE, host=host.name, cast=True)
    wait_for(lambda: host.refusals.seen, what="the refusal")
    error = host.refusals.seen[0][3]
    assert type(error) is errors.ComputeError
    assert "shadow" not in str(error)
    assert len(host.notebook.seen) == server_module.INTERNAL_ATTEMPTS
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")


def test_a_stopped_host_leaves_what_it_could_not_accept_in_the_inbox(
    transport: Any, tmp_path: Path, name: str, api: ComputeAPI
) -> None:
    host = Host(transport, tmp_path, name)
    host.notebook.raises += [errors.StoreBusy()] * 1000
    host.__enter__()
    api.start_instance(ONE, host=name, cast=True)
    wait_for(lambda: host.notebook.seen, what="the first attempt")
    assert host.server.stop(5)
    assert len(host.open_rows()) == 1
    host.database.close()
    with Host(transport, tmp_path, name) as second:
        wait_for(lambda: second.notebook.arguments("start_instance"), what="the cast to be taken up")


def test_commands_for_one_instance_keep_their_order(host: Host, api: ComputeAPI) -> None:
    for number in range(200):
        api.start_instance(UUID.format(number % 5), expires_at=float(number), host=host.name, cast=True)
    wait_for(lambda: len(host.notebook.seen) == 200, what="all casts", deadline=20)
    for instance in range(5):
        asked = host.notebook.arguments("start_instance")
        numbers = [args["expires_at"] for args in asked if args["instance"] == UUID.format(instance)]
        assert numbers == sorted(numbers)


def test_a_message_that_is_too_large_is_refused(transport: Any, tmp_path: Path, name: str) -> None:
    with Host(transport, tmp_path, name, Rpc(max_message_bytes=16_384)) as host:
        client = raw_client(transport, name)
        with pytest.raises(errors.MessageTooLarge, match=r"message of \d+ bytes is larger than 16384"):
            client.call({}, "echo", text="x" * 20_000)
        client.cast({}, "start_instance", instance=ONE, operation="x" * 20_000)
        wait_for(lambda: host.refusals.seen, what="the refusal of the cast")
        assert host.refusals.seen[0][2] == {"instance": ONE}
        assert type(host.refusals.seen[0][3]) is errors.MessageTooLarge
        assert host.notebook.seen == []
        assert client.call({}, "echo", text="x" * 10_000) == "x" * 10_000
        wait_for(lambda: not host.open_rows(), what="the inbox to be empty")


def test_a_query_that_is_cast_is_not_kept(host: Host, api: ComputeAPI, transport: Any) -> None:
    host.notebook.gate.clear()
    raw_client(transport, host.name).cast({}, "echo", text="x")
    wait_for(lambda: host.server._queries.backlog == 1, what="the query to run")
    assert host.open_rows() == []
    host.notebook.gate.set()
    wait_for(lambda: host.notebook.arguments("echo"), what="the query")
    assert host.notebook.seen[0][2].inbox is None


def test_a_slow_query_holds_up_no_command(host: Host, api: ComputeAPI, transport: Any) -> None:
    client = raw_client(transport, host.name)
    threads = [threading.Thread(target=lambda: client.call({}, "nap", seconds=1.0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: host.server._queries.backlog == 8, what="the queries to run")
    assert api.start_instance(ONE, host=host.name).host == host.name
    assert host.server._queries.backlog == 8
    for thread in threads:
        thread.join()


def test_a_long_call_outlives_a_short_monitor_timeout(host: Host, transport: Any) -> None:
    client = raw_client(transport, host.name, call_monitor_timeout=2)
    assert client.call({}, "nap", seconds=3.0) == "awake"


def test_errors_reach_the_caller_typed_and_without_traceback(host: Host, transport: Any) -> None:
    client = raw_client(transport, host.name)
    host.notebook.raises.append(errors.InsufficientResources(host="n", resource="vcpus", requested=3, free=1))
    with pytest.raises(errors.InsufficientResources) as caught:
        client.call({}, "start_instance", instance=ONE)
    assert (caught.value.kwargs["free"], caught.value.reschedulable) == (1, True)
    assert "Traceback" not in str(caught.value) and ".py" not in str(caught.value)


def test_unexpected_errors_reach_the_log_and_not_the_caller(
    host: Host, transport: Any, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        raise OSError("/var/lib/secret/path")
    except OSError as exc:
        bug = KeyError("hunter2")
        bug.__cause__ = exc
        host.notebook.raises.append(bug)
    with pytest.raises(errors.ComputeError) as caught, caplog.at_level(logging.ERROR):
        raw_client(transport, host.name).call({"request_id": "req-9"}, "start_instance", instance=ONE)
    text = str(caught.value)
    assert f"internal error in start_instance; see the log of host {host.name} for request req-9" in text
    assert not any(word in text for word in ("hunter2", "secret", "Traceback", ".py"))
    assert "hunter2" in caplog.text


@pytest.mark.parametrize(
    ("method", "args", "error"),
    [
        ("nobody", {}, errors.UnknownMethod),
        ("not_exposed", {}, errors.UnknownMethod),
        ("start_instance", {}, errors.InvalidCommand),
        ("start_instance", {"instance": ONE, "x": 1}, errors.InvalidCommand),
        ("start_instance", {"instance": {"$ref": 1}}, errors.InvalidCommand),
        ("echo", {"text": 3}, errors.InvalidCommand),
    ],
)
def test_bad_calls_are_refused_with_a_typed_error(
    host: Host, transport: Any, method: str, args: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        raw_client(transport, host.name).call({}, method, **args)
    assert host.notebook.seen == []
    assert host.open_rows() == []


def test_an_unknown_method_with_a_call_monitor_leaves_no_thread(host: Host, transport: Any) -> None:
    with pytest.raises(errors.UnknownMethod):
        raw_client(transport, host.name, call_monitor_timeout=30).call({}, "nobody")
    assert not [thread for thread in threading.enumerate() if "_watchdog" in repr(thread)]


def test_another_version_is_refused(host: Host, transport: Any) -> None:
    with pytest.raises(errors.NotSupported, match=r"version 1\.99"):
        raw_client(transport, host.name).prepare(version="1.99").call({}, "echo")


def test_log_lines_carry_the_request(host: Host, transport: Any, caplog: pytest.LogCaptureFixture) -> None:
    from compute_worker.logcontext import ContextFilter

    caplog.handler.addFilter(ContextFilter())
    with pytest.raises(errors.InvalidCommand), caplog.at_level(logging.INFO):
        raw_client(transport, host.name).call({"request_id": "req-5"}, "start_instance", instance=ONE, x=1)
    (line,) = [record for record in caplog.records if "is refused" in record.message]
    assert (line.request_id, line.instance) == ("req-5", ONE)


def test_health_says_whether_the_broker_can_be_heard(transport: Any, tmp_path: Path, name: str) -> None:
    host = Host(transport, tmp_path, name)
    assert (host.server.connected, host.server.problem) == (False, "not started")
    with host:
        assert host.server.problem is None
        assert host.server.stop_consuming(5)
        assert (host.server.connected, host.server.problem) == (False, "stopped")


def test_after_stop_consuming_messages_stay_with_the_broker(
    transport: Any, tmp_path: Path, name: str, api: ComputeAPI
) -> None:
    with Host(transport, tmp_path, name) as host:
        assert host.server.stop_consuming(5)
        api.start_instance(ONE, host=name, cast=True)
        assert host.server.stop(5)
        assert host.notebook.seen == []
    with Host(transport, tmp_path, name) as second:
        wait_for(lambda: second.notebook.seen, what="the cast")


def test_a_broker_that_is_not_there_is_waited_for(tmp_path: Path, name: str) -> None:
    from compute_worker.rpc.transport import get_transport

    host = Host(get_transport("rabbit://u:hunter2@127.0.0.1:1/x"), tmp_path, name)
    host.inbox.put("m", stored({"method": "start_instance", "args": {"instance": ONE}}))
    host.server.start()
    wait_for(lambda: "refused" in (host.server.problem or ""), what="the problem to be known")
    assert not host.server.connected
    assert "hunter2" not in (host.server.problem or "")
    wait_for(lambda: not host.open_rows(), what="the inbox to be done without a broker")
    assert host.server.stop(5)
    host.database.close()


def test_inboxes_follow_the_protocol(tmp_path: Path, transport: Any, name: str) -> None:
    host = Host(transport, tmp_path, name)
    inbox: Inbox = host.inbox
    assert inbox.put("a", b"1")
    assert not inbox.put("a", b"2")
    assert inbox.open() == [("a", b"1")]
    host.database.close()
