"""A bare oslo.messaging RPC server that gives back what it is sent: what accepting a command is compared with.

Arguments: transport URL, "quorum" or "classic". "listening" on standard output says that it takes messages.
"""

from __future__ import annotations

import sys
import threading
import uuid
from typing import Any

from compute_worker.threads import use_threads

use_threads()

import oslo_messaging  # noqa: E402
from oslo_config import cfg  # noqa: E402
from oslo_messaging import server as messaging_server  # noqa: E402

from compute_worker.rpc.transport import set_defaults  # noqa: E402

EXCHANGE, TOPIC, SERVER = "echo", "echo", "bench"
THREADS = 16
"""As many as the worker has for commands."""


class Echo:
    """One method, under the name of the command that it is compared with."""

    target = oslo_messaging.Target(version="1.0")

    @oslo_messaging.expose  # type: ignore[untyped-decorator]
    def build_and_run_instance(self, context: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        """As large an answer as the worker's, and nothing done for it."""
        return {"operation": str(uuid.uuid4()), "host": SERVER, "state": "queued", "repeated": False}


def configuration(quorum: bool) -> cfg.ConfigOpts:
    """The worker's own messaging defaults, on the global configuration that oslo.messaging looks at."""
    conf = cfg.CONF
    set_defaults(conf, EXCHANGE)
    conf.register_opts(messaging_server._pool_opts)
    conf([], project="bench", default_config_files=[])
    conf.set_override("rabbit_quorum_queue", quorum, group="oslo_messaging_rabbit")
    conf.set_override("executor_thread_pool_size", THREADS)
    return conf


def main(url: str, kind: str) -> None:
    """Serve until killed."""
    transport = oslo_messaging.get_rpc_transport(configuration(kind == "quorum"), url=url)
    target = oslo_messaging.Target(exchange=EXCHANGE, topic=TOPIC, server=SERVER)
    server = oslo_messaging.get_rpc_server(
        transport, target, [Echo()], executor="threading", access_policy=oslo_messaging.ExplicitRPCAccessPolicy
    )
    server.start()
    print("listening", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
