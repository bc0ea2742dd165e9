"""The way to the broker: oslo.messaging's RPC transport with defaults under which no accepted command is lost.

What an operator sets in ``[oslo_messaging_rabbit]`` or in the transport URL wins over every default here; what is not
safe then is said by :func:`durability` and :func:`tls_problem`.
"""

from __future__ import annotations

import os
import ssl
from typing import Any

import oslo_messaging
from oslo_config import cfg
from oslo_messaging._drivers import amqp, common, impl_rabbit

from compute_worker import errors

GROUP = "oslo_messaging_rabbit"
ERROR_MODULES = ["compute_worker.errors"]
"""Modules whose exceptions are rebuilt at the caller."""

MEMORY = "kombu+memory"
MEMORY_POLL_SECONDS = 0.002

_DEFAULTS: dict[str, Any] = {
    "amqp_durable_queues": True,
    # Bounds what the broker hands out before it is journalled, not what runs.
    "rabbit_qos_prefetch_count": 64,
    "heartbeat_timeout_threshold": 30,
    "rabbit_retry_backoff": 1,
    "rabbit_interval_max": 5,
    # How long a thread holds on to a reply whose queue has gone: callers declare it again within seconds.
    "kombu_missing_consumer_retry_timeout": 15,
}


def get_transport(url: str | None = None, conf: cfg.ConfigOpts | None = None, exchange: str = "compute_worker") -> Any:
    """An RPC transport.

    :param url: ``rabbit://user:password@host:port/vhost`` or ``kombu+memory://``; default: ``[DEFAULT] transport_url``.
    :param conf: default: the global ``oslo_config.cfg.CONF``, where oslo.messaging 18.3 keeps its tracing options; any
        other must know ``[oslo_messaging_tracing]`` and ``[oslo_messaging_metrics]``.

    Opens no connection. Several hosts of one process may share one, or have one each.
    """
    conf = cfg.CONF if conf is None else conf
    set_defaults(conf, exchange)
    lead_group()
    return oslo_messaging.get_rpc_transport(conf, url=url, allowed_remote_exmods=ERROR_MODULES)


def lead_group() -> None:
    """Lead a process group of our own where ours has lost its leader: a shell that started us and ended.

    oslo.messaging names queues after the group's leader (``use_queue_manager``), and cannot connect without one.
    """
    if not os.path.exists(f"/proc/{os.getpgrp()}/stat"):
        os.setpgid(0, 0)


def set_defaults(conf: cfg.ConfigOpts, exchange: str = "compute_worker") -> None:
    """Register the messaging options of ``conf`` and give them this project's defaults."""
    conf.register_group(cfg.OptGroup(GROUP))
    conf.register_opts(impl_rabbit.rabbit_opts + amqp.amqp_opts, group=GROUP)
    conf.register_opts(oslo_messaging.transport._transport_opts)
    for name, value in _DEFAULTS.items():
        conf.set_default(name, value, group=GROUP)
    conf.set_default("control_exchange", exchange)
    authorities = ssl.get_default_verify_paths().cafile
    if authorities:
        # Without any, TLS to the broker would be encrypted and not verified at all.
        conf.set_default("ssl_ca_file", authorities, group=GROUP)


def durability(transport: Any) -> tuple[bool, str]:
    """Whether an accepted cast outlives the broker's process, and why (not).

    It cannot see whether the broker keeps its disk.
    """
    if is_memory(transport):
        return False, "kombu+memory keeps messages inside this process: they end with it"
    options = _rabbit_options(transport)
    if options.amqp_auto_delete:
        return False, f"[{GROUP}] amqp_auto_delete is true: queues go when their worker does, with what is in them"
    if options.rabbit_quorum_queue:
        return True, "quorum queues"
    if options.amqp_durable_queues:
        return True, "durable classic queues"
    return False, (
        f"[{GROUP}] amqp_durable_queues and rabbit_quorum_queue are both false: a restart of the broker loses"
        " commands that were cast; set one of them to true"
    )


def tls_problem(transport: Any) -> str | None:
    """What weakens TLS to the broker, in words; ``None``: nothing, or there is no TLS."""
    options = _rabbit_options(transport)
    if is_memory(transport) or not options.ssl:
        return None
    if not options.ssl_ca_file:
        return f"[{GROUP}] ssl_ca_file is empty: the broker's certificate is not verified"
    if len(transport._driver._url.hosts) > 1:
        return "oslo.messaging does not check the broker's host name when transport_url names several brokers"
    return None


def is_memory(transport: Any) -> bool:
    """Whether it is the broker inside this process."""
    return bool(transport._driver._url.transport == MEMORY)


def open_listening(transport: Any) -> Any:
    """A connection to consume on.

    :raises Exception: kombu's OperationalError when the broker cannot be reached; it is tried once.
    """
    driver = transport._driver
    return calmed(driver._connection_pool.create(common.PURPOSE_LISTEN, retry=0))


def calmed(connection: Any) -> Any:
    """``connection``; where it is to the broker in this process it no longer spins while it waits."""
    if connection._url.startswith("memory://"):
        connection.connection.transport.polling_interval = MEMORY_POLL_SECONDS
    return connection


def open_replies(transport: Any, retry: int) -> None:
    """Make sure that answers can come back, or fail: oslo.messaging itself would wait for ever.

    :param retry: how often a broker that cannot be reached is tried again.
    :raises Exception: kombu's OperationalError or oslo.messaging's MessageDeliveryFailure.
    """
    driver = transport._driver
    if driver._reply_q is None:
        driver._connection_pool.create(common.PURPOSE_LISTEN, retry=retry).close()
        driver._get_reply_q()
        calmed(driver._reply_q_conn.connection)


def has_queue(transport: Any, exchange: str, key: str) -> bool:
    """Whether the broker inside this process has a queue for ``key``; true where the broker itself says so.

    RabbitMQ answers the mandatory flag; kombu's memory broker swallows what nobody listens to.
    """
    if not is_memory(transport):
        return True
    from kombu.transport.memory import Transport

    return bool(Transport.global_state.has_binding(key, exchange, key))


def check_exchange(connection: Any, consumer: Any) -> None:
    """Declare what ``consumer`` will declare, without oslo.messaging's silent fallback to what is not durable.

    :raises compute_worker.errors.NotSupported: the broker has it with other properties, saying what to do.
    """
    from amqp.exceptions import PreconditionFailed
    from kombu import Exchange, Queue

    exchange = Exchange(consumer.exchange_name, consumer.type, durable=consumer.durable,
                        auto_delete=consumer.exchange_auto_delete)
    queue = Queue(consumer.queue_name, exchange, consumer.routing_key, durable=consumer.durable,
                  auto_delete=consumer.queue_auto_delete, queue_arguments=consumer.queue_arguments)
    channel = connection.connection.channel()
    try:
        queue(channel).declare()
    except PreconditionFailed as exc:
        raise errors.NotSupported(
            what=f"exchange {consumer.exchange_name} or queue {consumer.queue_name} as the broker has it"
            f" ({exc.reply_text}): delete it there, use a virtual host of its own, or change [rpc] exchange; it"
        ) from None
    finally:
        connection.connection.maybe_close_channel(channel)


def topic_consumer(connection: Any, exchange: str, queue: str, callback: Any) -> Any:
    """What oslo.messaging declares for a topic ``queue`` on ``connection``."""
    return impl_rabbit.Consumer(
        exchange_name=exchange,
        queue_name=queue,
        routing_key=queue,
        type="topic",
        durable=connection.durable,
        exchange_auto_delete=connection.amqp_auto_delete,
        queue_auto_delete=connection.amqp_auto_delete,
        callback=callback,
        rabbit_ha_queues=connection.rabbit_ha_queues,
        enable_cancel_on_failover=connection.enable_cancel_on_failover,
        rabbit_quorum_queue=connection.rabbit_quorum_queue,
        rabbit_quorum_queue_config=connection.rabbit_quorum_queue_config,
    )


def _rabbit_options(transport: Any) -> Any:
    return getattr(transport._driver.conf, GROUP)
