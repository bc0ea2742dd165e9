"""The way from the command line to the workers: broker address, transport, and asking several hosts at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from compute_worker.ctl.exits import NobodyAnswers, UsageError
from compute_worker.errors import ComputeError
from compute_worker.objects import HostState, Operation

if TYPE_CHECKING:
    from compute_worker.rpc.client import ComputeAPI

T = TypeVar("T")

URL_VARIABLE = "COMPUTE_WORKER_TRANSPORT_URL"
ANSWER_SECONDS = 15.0
"""How long one question may take: a worker answers in milliseconds, the rest is the broker's."""
AT_ONCE = 16
PAGE = 1000
"""Operations that one answer to list_operations holds at most."""


@dataclass(frozen=True)
class Client:
    """What every subcommand works with.

    :param discover: seconds to wait for hosts to announce themselves.
    """

    api: ComputeAPI
    transport: Any
    exchange: str = "compute_worker"
    discover: float = 2.0

    def hosts(self, enough: Callable[[list[HostState]], bool] = lambda found: False) -> list[HostState]:
        """Every host that answers.

        :raises PeerUnavailable: the broker cannot be reached.
        """
        from compute_worker.rpc.discovery import find_hosts

        return find_hosts(self.transport, self.api, self.discover, self.exchange, enough)

    def host_names(self, host: str | None) -> list[str]:
        """``host`` alone where it is given, else every host that answers.

        :raises NobodyAnswers: no host does.
        """
        if host is not None:
            return [host]
        found = [state.host for state in self.hosts()]
        if not found:
            raise NobodyAnswers(seconds=self.discover)
        return found

    def everywhere(
        self, hosts: Sequence[str], ask: Callable[[str], T]
    ) -> tuple[dict[str, T], dict[str, ComputeError]]:
        """Ask several hosts at once: answers and errors, by host, in the order of ``hosts``."""
        answers: dict[str, T] = {}
        problems: dict[str, ComputeError] = {}
        with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
            futures = {host: pool.submit(ask, host) for host in hosts}
            for host, future in futures.items():
                try:
                    answers[host] = future.result()
                except ComputeError as exc:
                    problems[host] = exc
        return answers, problems

    def operations(
        self, host: str, since: int | None = None, instance: str | None = None, open_only: bool = False
    ) -> list[Operation]:
        """Operations of one host in order of change, however many."""
        found: list[Operation] = []
        while True:
            page = self.api.list_operations(since, instance, open_only, host=host)
            found += page
            if len(page) < PAGE:
                return found
            since = page[-1].seq


def connect(config_file: str | None, discover: float, environment: Mapping[str, str] = os.environ) -> Client:
    """A client of the broker that ``--config-file``, else the environment, else the usual configuration file names.

    No connection is opened yet.

    :raises UsageError: the configuration cannot be read, or none of the three names a broker.
    """
    from compute_worker.threads import use_threads

    use_threads()
    from oslo_config import cfg

    from compute_worker import config
    from compute_worker.rpc.client import ComputeAPI
    from compute_worker.rpc.transport import get_transport, set_defaults

    logging.getLogger().setLevel(logging.CRITICAL)
    conf = cfg.CONF
    config.register(conf)
    set_defaults(conf)
    try:
        conf(["--config-file", config_file] if config_file else [], project="compute-worker")
        settings = config.load(conf)
        address = None if config_file else environment.get(URL_VARIABLE)
        if address is None and conf.transport_url in (None, "rabbit://"):
            raise UsageError(
                f"no broker: set transport_url in a configuration file (--config-file), or {URL_VARIABLE} in the"
                " environment"
            )
        transport = get_transport(address, exchange=settings.rpc.exchange)
    except cfg.Error as exc:
        raise UsageError(f"configuration: {exc}") from None
    except UsageError:
        raise
    except Exception as exc:
        # Whatever kombu or oslo.messaging say of an address may hold it, and with it a password.
        raise UsageError(f"the broker's address cannot be used ({type(exc).__name__}): see transport_url") from None
    api = ComputeAPI(
        transport, exchange=settings.rpc.exchange, topic=settings.rpc.topic, timeout=ANSWER_SECONDS, retry=1
    )
    return Client(api, transport, settings.rpc.exchange, discover)
