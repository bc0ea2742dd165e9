"""What is used of oslo.messaging beyond its public interface. A release that changes any of it fails here first."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import oslo_messaging
import pytest
from oslo_messaging import _tracing
from oslo_messaging._drivers import amqp, amqpdriver, common, impl_rabbit
from oslo_messaging.rpc import dispatcher

from compute_worker.rpc.transport import get_transport


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_major_version_is_the_one_this_was_read_in() -> None:
    assert version("oslo.messaging").split(".")[0] == "18"


@pytest.mark.parametrize(
    ("function", "first_parameters"),
    [
        (amqpdriver.AMQPListener.__init__, ["driver", "conn"]),
        (amqpdriver.AMQPListener.__call__, ["message"]),
        (amqpdriver.AMQPDriverBase._get_reply_q, []),
        (impl_rabbit.Connection.__init__, ["conf", "url", "purpose", "retry"]),
        (impl_rabbit.Connection.consume, ["timeout"]),
        (impl_rabbit.Connection.stop_consuming, []),
        (impl_rabbit.Connection.close, []),
        (impl_rabbit.Connection.declare_consumer, ["consumer"]),
        (impl_rabbit.Connection.declare_fanout_consumer, ["topic", "callback"]),
        (impl_rabbit.pool.ConnectionPool.create, ["purpose", "retry"]),
        (dispatcher.RPCDispatcher.__init__, ["endpoints", "serializer", "access_policy"]),
        (dispatcher.RPCDispatcher.dispatch, ["incoming"]),
        (_tracing.trace_receive, ["conf", "message"]),
    ],
)  # fmt: skip
def test_functions_take_what_we_pass(function: Any, first_parameters: list[str]) -> None:
    assert parameters(function)[: len(first_parameters)] == first_parameters


def test_a_consumer_takes_what_we_pass() -> None:
    used = {
        "exchange_name", "queue_name", "routing_key", "type", "durable", "exchange_auto_delete", "queue_auto_delete",
        "callback", "rabbit_ha_queues", "enable_cancel_on_failover", "rabbit_quorum_queue",
        "rabbit_quorum_queue_config", "rabbit_queue_ttl",
    }  # fmt: skip
    assert used <= set(parameters(impl_rabbit.Consumer.__init__))


def test_names_are_where_we_look() -> None:
    assert common.PURPOSE_LISTEN != common.PURPOSE_SEND
    assert issubclass(common.Timeout, Exception)
    assert {opt.name for opt in amqp.amqp_opts} >= {"amqp_durable_queues", "amqp_auto_delete"}
    assert {opt.name for opt in impl_rabbit.rabbit_opts} >= {
        "rabbit_quorum_queue", "rabbit_qos_prefetch_count", "heartbeat_timeout_threshold", "ssl_ca_file",
        "kombu_missing_consumer_retry_timeout", "rabbit_retry_backoff", "rabbit_interval_max",
    }  # fmt: skip
    assert {opt.name for opt in oslo_messaging.transport._transport_opts} >= {"transport_url", "control_exchange"}


def test_a_driver_and_its_connection_have_what_we_read() -> None:
    transport = get_transport("kombu+memory://")
    driver = transport._driver
    assert (driver._reply_q, driver._reply_q_conn, driver._url.transport) == (None, None, "kombu+memory")
    connection = driver._connection_pool.create(common.PURPOSE_LISTEN, retry=0)
    for name in (
        "durable", "amqp_auto_delete", "rabbit_ha_queues", "enable_cancel_on_failover", "rabbit_quorum_queue",
        "rabbit_quorum_queue_config", "_url", "channel",
    ):  # fmt: skip
        assert hasattr(connection, name), name
    assert connection.connection.connected
    assert hasattr(connection.connection, "maybe_close_channel")
    listener = amqpdriver.AMQPListener(driver, connection)
    assert listener.incoming == []
    assert not listener._shutdown.is_set()
    assert listener.poll(timeout=0.01) == []
    listener._shutdown.set()
    assert listener.poll(timeout=10) == []
    connection.close()


def test_an_incoming_message_has_what_we_read() -> None:
    names = parameters(amqpdriver.AMQPIncomingMessage.__init__)
    assert names[:7] == ["listener", "ctxt", "message", "unique_id", "msg_id", "reply_q", "client_timeout"]
    assert parameters(amqpdriver.AMQPIncomingMessage.reply) == ["reply", "failure"]
    assert parameters(amqpdriver.AMQPIncomingMessage.heartbeat) == []
    assert parameters(impl_rabbit.RabbitMessage.__init__) == ["raw_message"]
    assert "self._raw_message = raw_message" in inspect.getsource(impl_rabbit.RabbitMessage.__init__)


def test_the_dispatcher_falls_back_to_a_default_target() -> None:
    made = dispatcher.RPCDispatcher([], None, dispatcher.ExplicitRPCAccessPolicy)
    assert isinstance(made._default_target, oslo_messaging.Target)
    assert "self._default_target" in inspect.getsource(dispatcher.RPCDispatcher.dispatch)


def test_the_wire_has_the_names_that_are_documented() -> None:
    assert (amqp.UNIQUE_ID, common._VERSION_KEY, common._MESSAGE_KEY) == ("_unique_id", "oslo.version", "oslo.message")
    source = inspect.getsource(amqp.unpack_context)
    assert all(name in source for name in ("_context_", "_msg_id", "_reply_q", "_timeout"))


def test_eventlet_stays_out() -> None:
    import sys

    assert sys.modules.get("eventlet") is None


def test_answers_can_be_sent_beside_it() -> None:
    """``rpc.replies`` writes what ``_send_reply`` writes, on a connection of its kind."""
    incoming = inspect.signature(amqpdriver.AMQPIncomingMessage.__init__).parameters
    assert {"msg_id", "reply_q"} <= set(incoming)
    source = inspect.getsource(amqpdriver.AMQPIncomingMessage._send_reply)
    assert "{'result': reply, 'failure': failure, 'ending': ending," in source and "'_msg_id': self.msg_id}" in source
    made = inspect.getsource(impl_rabbit.Connection.__init__)
    assert "self._connection_lock" in made and "self.direct_mandatory_flag" in made
    assert "name=''" in inspect.getsource(impl_rabbit.Connection.direct_send), "the default exchange carries them"
    assert parameters(impl_rabbit.Connection._transport_socket_timeout) == ["timeout"]
