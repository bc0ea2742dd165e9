from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg
from oslo_messaging._metrics import client as metrics
from oslo_messaging._tracing import client as tracing

from compute_worker import errors
from compute_worker.rpc import transport as transports
from tests.waiting import wait_for

URL = "rabbit://user:password@127.0.0.1:1/vhost"


def conf(**rabbit: Any) -> cfg.ConfigOpts:
    """Options of its own, as an operator would set them in a file."""
    made = cfg.ConfigOpts()
    made.register_opts(tracing.oslo_messaging_tracing, group="oslo_messaging_tracing")
    made.register_opts(metrics.oslo_messaging_metrics, group="oslo_messaging_metrics")
    made([], project="compute-worker-test", default_config_files=[])
    transports.set_defaults(made)
    for name, value in rabbit.items():
        made.set_override(name, value, group=transports.GROUP)
    return made


def transport(url: str = URL, **rabbit: Any) -> Any:
    return transports.get_transport(url, conf(**rabbit))


@pytest.mark.parametrize(
    ("url", "options", "durable", "says"),
    [
        (URL, {}, True, "durable classic"),
        (URL, {"rabbit_quorum_queue": True}, True, "quorum"),
        (URL, {"amqp_durable_queues": False}, False, "set one of them to true"),
        (URL, {"amqp_durable_queues": False, "rabbit_quorum_queue": True}, True, "quorum"),
        (URL, {"amqp_auto_delete": True}, False, "amqp_auto_delete"),
        (URL + "?amqp_durable_queues=false", {}, False, "amqp_durable_queues"),
        ("kombu+memory://", {}, False, "inside this process"),
    ],
)
def test_durability_is_said_plainly(url: str, options: dict[str, Any], durable: bool, says: str) -> None:
    found, reason = transports.durability(transport(url, **options))
    assert found is durable
    assert says in reason


def test_what_the_operator_sets_wins() -> None:
    assert transport(heartbeat_timeout_threshold=7).conf.oslo_messaging_rabbit.heartbeat_timeout_threshold == 7
    assert transport().conf.oslo_messaging_rabbit.heartbeat_timeout_threshold == 30


def test_the_exchange_is_our_own() -> None:
    assert transport().conf.control_exchange == "compute_worker"


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        (URL, {}, None),
        ("kombu+memory://", {"ssl": True}, None),
        (URL, {"ssl": True, "ssl_ca_file": "/ca.pem"}, None),
        (URL, {"ssl": True, "ssl_ca_file": ""}, "not verified"),
        ("rabbit://u:p@a:1,u:p@b:1/x", {"ssl": True, "ssl_ca_file": "/ca.pem"}, "host name"),
    ],
)
def test_weak_tls_is_said_plainly(url: str, options: dict[str, Any], says: str | None) -> None:
    problem = transports.tls_problem(transport(url, **options))
    assert problem is None if says is None else says in (problem or "")


def test_a_broker_that_is_not_there_is_tried_once() -> None:
    with pytest.raises(Exception, match="refused"):
        transports.open_listening(transport())


def test_answers_without_a_broker_fail_instead_of_waiting(caplog: pytest.LogCaptureFixture) -> None:
    made = transport()
    with pytest.raises(Exception, match="refused"), caplog.at_level(logging.ERROR):
        transports.open_replies(made, 0)
    assert made._driver._reply_q is None


def test_several_transports_in_one_process_share_the_memory_broker() -> None:
    one, two = transports.get_transport("kombu+memory://"), transports.get_transport("kombu+memory://")
    connection = transports.open_listening(one)
    connection.declare_consumer(transports.topic_consumer(connection, "compute_worker", "compute.shared", print))
    assert transports.has_queue(two, "compute_worker", "compute.shared")
    assert not transports.has_queue(two, "compute_worker", "compute.nobody")
    connection.close()


def test_the_memory_broker_is_polled_without_spinning() -> None:
    connection = transports.open_listening(transports.get_transport("kombu+memory://"))
    assert connection.connection.transport.polling_interval == transports.MEMORY_POLL_SECONDS
    connection.close()


def test_rabbit_answers_itself_whether_a_queue_is_there() -> None:
    assert transports.has_queue(transport(), "compute_worker", "compute.nobody")


def test_errors_may_be_rebuilt_at_the_caller() -> None:
    assert transport()._driver._allowed_remote_exmods == [errors.__name__]


def test_a_group_that_lost_its_leader_is_led(tmp_path: Path) -> None:
    """Started in the background by a shell that has ended: there is no process of the group's number any more."""
    program = (
        "import os, sys, time\n"
        "from compute_worker.rpc.transport import lead_group\n"
        "deadline = time.monotonic() + 10\n"
        "while os.path.exists(f'/proc/{os.getpgrp()}') and time.monotonic() < deadline: pass\n"
        "orphaned = not os.path.exists(f'/proc/{os.getpgrp()}')\n"
        "lead_group()\n"
        "open(sys.argv[1], 'w').write(f'{orphaned} {os.getpgrp() == os.getpid()}')\n"
    )
    out = tmp_path / "out"
    shell = ["sh", "-c", '"$0" -c "$1" "$2" & exit 0', sys.executable, program, str(out)]
    subprocess.run(shell, check=True, start_new_session=True, timeout=20)
    assert wait_for(lambda: out.exists() and out.read_text(), deadline=20, what="the program") == "True True"
