"""The HTTP port: what it answers, and that nobody can hold it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator

import pytest

from compute_worker.errors import Broken
from compute_worker.telemetry.endpoint import MOST_CONNECTIONS, Endpoint, Health
from compute_worker.telemetry.metrics import Metrics, Snapshot
from compute_worker.telemetry.redaction import Redactor
from tests.waiting import wait_for


class Switch:
    """A check that is told what to say."""

    reason: str | None = None

    def __call__(self) -> str | None:
        return self.reason


@pytest.fixture
def broker() -> Switch:
    return Switch()


@pytest.fixture
def endpoint(broker: Switch) -> Iterator[Endpoint]:
    health = Health("node1", {"broker": broker, "journal": lambda: None}, Redactor())
    server = Endpoint("127.0.0.1", 0, health, Metrics(Snapshot, "1").text)
    server.start()
    yield server
    server.stop()


def get(endpoint: Endpoint, path: str, method: str = "GET") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def test_health_says_ok_then_why_not(endpoint: Endpoint, broker: Switch) -> None:
    status, content_type, body = get(endpoint, "/healthz")
    assert (status, content_type, json.loads(body)["status"]) == (200, "application/json", "ok")
    broker.reason = "cannot reach amqp://cw:s3cr3t-Pa55@broker"
    status, _, body = get(endpoint, "/healthz")
    said = json.loads(body)
    assert (status, said["status"], said["host"]) == (503, "failing", "node1")
    assert said["checks"]["journal"] == {"ok": True}
    assert said["checks"]["broker"]["reason"] == "cannot reach amqp://cw:***@broker"


def test_a_check_that_fails_is_a_reason() -> None:
    def broken() -> str | None:
        raise OSError("disk is gone")

    well, said = Health("node1", {"journal": broken}, Redactor()).report()
    assert not well
    assert said["checks"]["journal"] == {"ok": False, "reason": "OSError: disk is gone"}


def test_metrics_are_prometheus_text(endpoint: Endpoint) -> None:
    status, content_type, body = get(endpoint, "/metrics?x=1")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert b"compute_worker_journal_commit_seconds_count 0.0" in body


@pytest.mark.parametrize(("path", "method", "status"), [("/", "GET", 404), ("/metrics", "POST", 501)])
def test_anything_else_is_refused(endpoint: Endpoint, path: str, method: str, status: int) -> None:
    assert get(endpoint, path, method)[0] == status


def test_head_has_no_body(endpoint: Endpoint) -> None:
    assert get(endpoint, "/healthz", "HEAD")[::2] == (200, b"")


def test_a_page_that_fails_is_a_500_and_the_next_is_answered() -> None:
    fail = [True]

    def text() -> tuple[bytes, str]:
        if fail:
            fail.clear()
            raise RuntimeError("no")
        return b"x 1\n", "text/plain"

    server = Endpoint("127.0.0.1", 0, Health("n", {}, Redactor()), text)
    server.start()
    try:
        assert [get(server, "/metrics")[0], get(server, "/metrics")[0]] == [500, 200]
    finally:
        server.stop()


def test_silent_clients_hold_a_few_places_and_no_more(endpoint: Endpoint) -> None:
    idle = [socket.create_connection(("127.0.0.1", endpoint.port), timeout=5) for _ in range(MOST_CONNECTIONS)]

    def refused() -> bool:
        try:
            return get(endpoint, "/healthz")[0] == 0
        except (http.client.HTTPException, OSError):
            return True

    wait_for(refused, deadline=5, what="all places to be taken")
    for connection in idle:
        connection.close()
    wait_for(lambda: not refused(), deadline=5, what="places to be free again")


def test_a_port_that_is_taken_is_one_clear_error(endpoint: Endpoint) -> None:
    with pytest.raises(Broken, match=r"port \d+ for metrics .*change \[telemetry\] listen or port"):
        Endpoint("127.0.0.1", endpoint.port, Health("n", {}, Redactor()), None)


@pytest.mark.parametrize("stop", [Endpoint.stop])
def test_stop_before_start_does_not_hang(stop: Callable[[Endpoint], None]) -> None:
    stop(Endpoint("::1" if socket.has_ipv6 and _has_ipv6() else "127.0.0.1", 0, Health("n", {}, Redactor()), None))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
