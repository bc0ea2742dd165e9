"""Messages over a real broker: nothing accepted is lost, whatever ends in between."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kombu
import oslo_messaging
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compute_worker import errors
from compute_worker.objects import Capacity, HostState
from compute_worker.rpc import transport as transports
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.discovery import find_hosts
from tests.lab.rabbit import Rabbit
from tests.rpc.hosts import UUID, Host
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

ONE = UUID.format(1)
DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "doc" / "asyncapi.yaml").read_text())
NOTHING = Capacity(total=0, usable=0)


class Server:
    """A server process that can be killed and started again on the same state."""

    def __init__(self, url: str, directory: Path, host: str) -> None:
        self._argv = [sys.executable, "-m", "tests.functional.serve", url, str(directory), host]
        self.directory = directory
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            self._argv, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def accepted(self) -> list[str]:
        """Operations in order of acceptance, as often as they were accepted."""
        ledger = self.directory / "accepted"
        return [line.split()[0] for line in ledger.read_text().splitlines()] if ledger.exists() else []


@pytest.fixture
def server(rabbit: Rabbit, tmp_path: Path, name: str) -> Iterator[Server]:
    made = Server(rabbit.url(), tmp_path, name)
    made.start()
    yield made
    made.kill()


def test_casts_survive_kills_of_the_worker(server: Server, api: ComputeAPI, name: str) -> None:
    operations = [str(uuid.uuid4()) for _ in range(2000)]
    chance = random.Random(1)
    kill_after = sorted(chance.sample(range(200, 1900), 5))

    def send() -> None:
        for number, operation in enumerate(operations):
            api.start_instance(UUID.format(number % 50), operation=operation, host=name, cast=True)

    sender = threading.Thread(target=send)
    sender.start()
    for enough in kill_after:
        wait_for(lambda enough=enough: len(set(server.accepted())) >= enough, 60, f"{enough} accepted casts")
        server.kill()
        server.start()
    sender.join()
    wait_for(lambda: len(set(server.accepted())) >= len(operations), 60, "all casts to be accepted")
    accepted = server.accepted()
    assert set(accepted) == set(operations)
    # Again only what a kill caught between the two commits of accepting; the operation's key makes it the same one.
    assert len(accepted) - len(operations) <= 16 * len(kill_after)


def test_casts_survive_a_restart_of_the_broker(rabbit: Rabbit, api: ComputeAPI, tmp_path: Path, name: str) -> None:
    server = Server(rabbit.url(), tmp_path, name)
    server.start()
    server.kill()
    operations = [str(uuid.uuid4()) for _ in range(50)]
    for operation in operations:
        api.start_instance(ONE, operation=operation, host=name, cast=True)
    rabbit.kill()
    rabbit.start()
    server.start()
    wait_for(lambda: len(set(server.accepted())) == 50, 30, "the casts of before")
    server.kill()
    assert server.accepted() == operations


def test_a_worker_outlives_its_broker(rabbit: Rabbit, transport: Any, tmp_path: Path, name: str) -> None:
    with Host(transport, tmp_path, name) as host:
        api = ComputeAPI(transport, timeout=20)
        api.start_instance(ONE, host=name)
        rabbit.kill()
        wait_for(lambda: not host.server.connected, 20, "the loss to be noticed")
        assert host.server.problem
        rabbit.start()
        wait_for(lambda: host.server.connected, 30, "the worker to be back")
        api.start_instance(ONE, host=name, cast=True)
        wait_for(lambda: len(host.notebook.seen) == 2, 20, "the cast")
        assert api.start_instance(ONE, host=name).host == name


def test_a_broker_that_is_down_at_start_is_waited_for(rabbit: Rabbit, tmp_path: Path, name: str) -> None:
    rabbit.kill()
    host = Host(transports.get_transport(rabbit.url()), tmp_path, name)
    host.server.start()
    wait_for(lambda: "refused" in (host.server.problem or ""), what="the problem to be known")
    with pytest.raises(errors.PeerUnavailable):
        ComputeAPI(transports.get_transport(rabbit.url()), retry=0).start_instance(ONE, host=name)
    rabbit.start()
    wait_for(lambda: host.server.connected, 30, "the worker to listen")
    assert ComputeAPI(transports.get_transport(rabbit.url())).start_instance(ONE, host=name).host == name
    assert host.server.stop(5)
    host.database.close()


def test_a_lost_connection_is_made_again(rabbit: Rabbit, tmp_path: Path, name: str) -> None:
    with Relay(rabbit.ports.amqp) as relay:
        url = rabbit.url().replace(str(rabbit.ports.amqp), str(relay.port))
        transport = transports.get_transport(url)
        with Host(transport, tmp_path, name) as host:
            api = ComputeAPI(transport, timeout=20)
            for _ in range(3):
                api.start_instance(ONE, host=name)
                relay.cut()
                wait_for(lambda: host.server.connected, 30, "the worker to be back")
            operation = str(uuid.uuid4())
            again(lambda: api.start_instance(ONE, operation=operation, host=name))
            assert operation in [args["operation"] for args in host.notebook.arguments("start_instance")]


def again(call: Any) -> Any:
    """`call`, again with the same key while nobody answers: how a caller gets through an outage."""

    def attempt() -> Any:
        try:
            return call() or True
        except errors.PeerUnavailable:
            return None

    return wait_for(attempt, 60, "an answer")


class Relay:
    """A TCP relay to a port of this machine, whose connections can be cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listening.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection."""
        while self._open:
            one = self._open.pop()
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _accept(self) -> None:
        while True:
            try:
                incoming = self._listening.accept()[0]
                outgoing = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [incoming, outgoing]
            for source, sink in ((incoming, outgoing), (outgoing, incoming)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            source.close()


@contextmanager
def bare(rabbit: Rabbit) -> Iterator[Any]:
    """A channel of a client that knows AMQP and the document, and nothing of oslo.messaging."""
    with kombu.Connection(rabbit.url(scheme="amqp"), transport_options={"confirm_publish": True}) as connection:
        yield connection.channel()


def publish(channel: Any, host: str, request: dict[str, Any]) -> None:
    """As the document says: exchange, key, envelope."""
    binding = DOCUMENT["channels"]["host"]["bindings"]["amqp"]["exchange"]
    key = DOCUMENT["channels"]["host"]["address"].format(host=host)
    exchange = kombu.Exchange(binding["name"], binding["type"], durable=binding["durable"])
    body = {"oslo.version": "2.0", "oslo.message": json.dumps(request)}
    kombu.Producer(channel, exchange, key).publish(body, serializer="json", delivery_mode=2, mandatory=True)


def call(channel: Any, host: str, request: dict[str, Any]) -> dict[str, Any]:
    """Publish, and read the answer from a queue of our own."""
    replies = kombu.Queue(f"reply-{uuid.uuid4()}", durable=False, exclusive=True)(channel)
    replies.declare()
    asked = request | {"_msg_id": uuid.uuid4().hex, "_reply_q": replies.name}
    publish(channel, host, asked)
    message = wait_for(replies.get, 10, "the answer")
    message.ack()
    envelope = json.loads(message.body)
    assert envelope["oslo.version"] == "2.0"
    answer: dict[str, Any] = json.loads(envelope["oslo.message"])
    assert answer["_msg_id"] == asked["_msg_id"]
    assert answer["ending"] is True
    return answer


def request(method: str, **args: Any) -> dict[str, Any]:
    return {"method": method, "args": args, "version": "1.0", "_unique_id": uuid.uuid4().hex}


def test_a_client_without_oslo_messaging_gets_its_answer(host: Host, rabbit: Rabbit) -> None:
    with bare(rabbit) as channel:
        asked = request("start_instance", instance=ONE, operation=UUID.format(2)) | {"_context_request_id": "req-bare"}
        answer = call(channel, host.name, asked)
    assert answer["failure"] is None
    assert answer["result"]["operation"] == UUID.format(2)
    context = host.notebook.seen[0][2]
    assert (context.request_id, context.message_id) == ("req-bare", asked["_unique_id"])


def test_a_client_without_oslo_messaging_gets_its_error(host: Host, rabbit: Rabbit) -> None:
    host.notebook.raises.append(errors.InstanceMoved(instance=ONE, host="node7"))
    with bare(rabbit) as channel:
        failures = [
            json.loads(call(channel, host.name, asked)["failure"])
            for asked in (request("start_instance", instance=ONE), request("nobody"))
        ]
    assert [failure["class"] for failure in failures] == ["InstanceMoved", "UnknownMethod"]
    assert failures[0]["kwargs"]["host"] == "node7"
    for failure in failures:
        assert failure["module"] == "compute_worker.errors"
        assert ".py" not in json.dumps(failure)
        assert failure.keys() >= set(DOCUMENT["components"]["schemas"]["failure"]["required"])


def test_a_message_delivered_twice_is_accepted_once(host: Host, rabbit: Rabbit) -> None:
    host.notebook.gate.clear()
    with bare(rabbit) as channel:
        twice = request("start_instance", instance=ONE)
        publish(channel, host.name, twice)
        publish(channel, host.name, twice)
        publish(channel, host.name, request("start_instance", instance=UUID.format(3)))
        wait_for(lambda: len(host.open_rows()) == 2, what="what was sent after them to be in the inbox with the first")
        host.notebook.gate.set()
        assert call(channel, host.name, request("start_instance", instance=UUID.format(2)))["failure"] is None
    instances = [args["instance"] for args in host.notebook.arguments("start_instance")]
    assert sorted(instances) == sorted([ONE, UUID.format(2), UUID.format(3)])


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff\xfe", b"[]", b'"x"', b"{}", b'{"oslo.version": "2.0"}', b"[" * 100_000, b'{"_context_self": 1}',
        b'{"oslo.version": "9.0", "oslo.message": "{}"}', b'{"oslo.version": "2.0", "oslo.message": "[]"}',
        b'{"method": {"a": 1}, "args": 3}',
    ],
)  # fmt: skip
def test_bodies_that_are_no_message_do_no_harm(host: Host, rabbit: Rabbit, body: bytes) -> None:
    with bare(rabbit) as channel:
        key = f"compute.{host.name}"
        kombu.Producer(channel, kombu.Exchange("compute_worker", "topic", durable=True), key).publish(
            body, content_type="application/json", content_encoding="utf-8"
        )
        assert call(channel, host.name, request("echo", text="x"))["result"] == "x"
    assert host.notebook.arguments("start_instance") == []
    wait_for(lambda: not host.open_rows(), what="the inbox to be empty")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(method=st.sampled_from(["start_instance", "resize", "echo", "nobody", "__class__"]) | JSON,
       args=st.dictionaries(st.sampled_from(["instance", "flavor", "count", "text", "self"]), JSON) | JSON)  # fmt: skip
def test_garbage_gets_one_clear_answer(host: Host, rabbit: Rabbit, method: Any, args: Any) -> None:
    before = len(host.notebook.seen)
    with bare(rabbit) as channel:
        asked = {"method": method, "args": args, "version": "1.0", "_unique_id": uuid.uuid4().hex}
        answer = call(channel, host.name, asked)
    if answer["failure"] is None:
        assert len(host.notebook.seen) == before + 1
    else:
        failure = json.loads(answer["failure"])
        assert failure["class"] in ("InvalidCommand", "UnknownMethod")
        assert len(host.notebook.seen) == before


def test_ten_mebibytes_are_refused(host: Host, transport: Any) -> None:
    target = oslo_messaging.Target(exchange="compute_worker", topic="compute", server=host.name)
    client = oslo_messaging.get_rpc_client(transport, target, timeout=20)
    with pytest.raises(errors.MessageTooLarge):
        client.call({}, "echo", text="x" * (10 << 20))
    client.cast({}, "start_instance", instance=ONE, operation="x" * (10 << 20))
    wait_for(lambda: host.refusals.seen, what="the refusal of the cast")
    assert type(host.refusals.seen[0][3]) is errors.MessageTooLarge
    assert host.notebook.seen == []


def test_a_host_that_never_listened_is_said_at_once(api: ComputeAPI, name: str) -> None:
    started = time.monotonic()
    for cast in (False, True):
        with pytest.raises(errors.MessageUndeliverable):
            api.start_instance(ONE, host=name, cast=cast)
    assert time.monotonic() - started < 5


def test_a_long_call_outlives_a_short_monitor_timeout(host: Host, transport: Any) -> None:
    target = oslo_messaging.Target(exchange="compute_worker", topic="compute", server=host.name)
    client = oslo_messaging.get_rpc_client(transport, target, timeout=20, call_monitor_timeout=2)
    assert client.call({}, "nap", seconds=4.0) == "awake"


def test_every_host_is_found(transport: Any, api: ComputeAPI, tmp_path: Path) -> None:
    names = [f"find-{uuid.uuid4().hex[:6]}" for _ in range(2)]
    with Host(transport, tmp_path / "a", names[0]) as one, Host(transport, tmp_path / "b", names[1]) as two:
        for host in (one, two):
            state = HostState(host=host.name, vcpus=NOTHING, memory_mb=NOTHING, disk_gb=NOTHING)
            host.notebook.on_announce = lambda topic, state=state: api.host_announced(topic, state)
        found = find_hosts(transport, api, timeout=20, enough=lambda found: len(found) >= 2)
    assert {state.host for state in found} == set(names)


def test_many_callers_at_once(host: Host, api: ComputeAPI) -> None:
    """Answers go out on connections of their own: publishing on the consumer's would re-enter it."""
    failed: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(25):
                api.start_instance(str(uuid.uuid4()), host=host.name)
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(host.notebook.seen) == 200


def test_an_exchange_that_is_not_durable_is_told(rabbit: Rabbit, transport: Any, tmp_path: Path, name: str) -> None:
    from compute_worker.config import Rpc

    exchange = f"x{uuid.uuid4().hex[:8]}"
    with bare(rabbit) as channel:
        kombu.Exchange(exchange, "topic", durable=False)(channel).declare()
    host = Host(transport, tmp_path, name, Rpc(exchange=exchange))
    host.server.start()
    problem = wait_for(lambda: "inequivalent arg 'durable'" in (host.server.problem or "") and host.server.problem,
                       20, "the problem to be known")  # fmt: skip
    assert exchange in problem
    assert "delete it" in problem
    assert not host.server.connected
    assert host.server.stop(5)
    host.database.close()


def test_quorum_queues_work(rabbit: Rabbit, tmp_path: Path, name: str) -> None:
    from compute_worker.config import Rpc

    transport = transports.get_transport(rabbit.url() + "?rabbit_quorum_queue=true")
    assert transports.durability(transport) == (True, "quorum queues")
    rpc = Rpc(exchange="quorum", topic="quorum")
    with Host(transport, tmp_path, name, rpc) as host:
        api = ComputeAPI(transport, exchange="quorum", topic="quorum")
        assert api.start_instance(ONE, host=name).host == name
        api.start_instance(ONE, host=name, cast=True)
        wait_for(lambda: len(host.notebook.seen) == 2, 20, "the cast")
    transport.cleanup()
