"""Who may speak to whom: TLS to the broker, and what a worker's own user of the broker can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import kombu
import pytest
from amqp.exceptions import AccessRefused
from oslo_concurrency import lockutils
from oslo_config import cfg

from compute_worker.rpc import transport as transports
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.discovery import find_hosts
from tests.functional.conftest import worker_user
from tests.lab.rabbit import ADMINISTRATOR, Rabbit, User, broker_url
from tests.rpc.hosts import UUID, Host
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

ONE = UUID.format(1)


def tls_url(rabbit: Rabbit, address: str, authority: Path) -> str:
    url = broker_url("rabbit", ADMINISTRATOR, address, rabbit.ports.tls, rabbit.vhost)
    return f"{url}?ssl=true&ssl_ca_file={quote(str(authority), safe='')}"


def test_a_broker_is_spoken_to_over_tls(rabbit: Rabbit, tmp_path: Path, name: str) -> None:
    authority = rabbit.directory / "ca" / "cacert.pem"
    transport = transports.get_transport(tls_url(rabbit, "127.0.0.1", authority))
    assert transports.tls_problem(transport) is None
    with Host(transport, tmp_path, name):
        assert ComputeAPI(transport).start_instance(ONE, host=name).host == name
    transport.cleanup()


def test_a_broker_with_another_name_is_not_trusted(rabbit: Rabbit) -> None:
    authority = rabbit.directory / "ca" / "cacert.pem"
    with pytest.raises(Exception, match="Hostname mismatch"):
        transports.open_listening(transports.get_transport(tls_url(rabbit, "localhost", authority)))


def test_a_broker_of_another_authority_is_not_trusted(rabbit: Rabbit) -> None:
    # What get_transport takes by default: the authorities of the system.
    url = broker_url("rabbit", ADMINISTRATOR, "127.0.0.1", rabbit.ports.tls, rabbit.vhost) + "?ssl=true"
    with pytest.raises(Exception, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
        transports.open_listening(transports.get_transport(url))


@pytest.fixture
def as_worker(rabbit: Rabbit, tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """A transport as a host's own user, with queue names that carry the host's name."""
    opened: list[Any] = []
    lockutils.set_defaults(str(tmp_path))

    def connect(host: str) -> Any:
        query = f"?use_queue_manager=true&hostname={host}&processname=compute-worker"
        opened.append(transports.get_transport(rabbit.url(worker_user(host)) + query))
        return opened[-1]

    yield connect
    for transport in opened:
        transport.cleanup()
    cfg.CONF.clear_default("lock_path", group="oslo_concurrency")


def test_least_permissions_are_enough(
    as_worker: Callable[[str], Any], rabbit: Rabbit, transport: Any, tmp_path: Path
) -> None:
    mine = as_worker("alpha")
    with Host(mine, tmp_path, "alpha") as host, Host(as_worker("beta"), tmp_path / "b", "beta") as other:
        api = ComputeAPI(transport)
        assert api.start_instance(ONE, host="alpha").host == "alpha"
        assert ComputeAPI(mine).start_instance(ONE, host="beta", cast=True).host == "beta"
        wait_for(lambda: other.notebook.seen, what="the cast from host to host")
        assert ComputeAPI(mine).start_instance(ONE, host="beta").host == "beta"
        heard: list[str] = []
        host.notebook.on_announce = heard.append
        find_hosts(transport, api, timeout=5, enough=lambda found: bool(heard))
        assert heard


def test_a_worker_cannot_read_what_is_for_another(
    as_worker: Callable[[str], Any], rabbit: Rabbit, tmp_path: Path
) -> None:
    with Host(as_worker("beta"), tmp_path, "beta"):
        assert_refused(rabbit, worker_user("alpha"), lambda channel: channel.basic_get("compute.beta"))
        assert_refused(rabbit, worker_user("alpha"), lambda channel: channel.basic_consume("compute.beta"))
        assert_refused(rabbit, worker_user("alpha"), lambda channel: channel.queue_purge("compute.beta"))
        assert_refused(rabbit, worker_user("alpha"), lambda channel: channel.queue_delete("compute.beta"))
        assert_refused(
            rabbit, worker_user("alpha"),
            lambda channel: channel.queue_bind("compute.beta", "compute_worker", "compute.alpha"),
        )  # fmt: skip


def test_a_worker_cannot_have_copies_of_what_is_for_another(
    as_worker: Callable[[str], Any], rabbit: Rabbit, api: ComputeAPI, tmp_path: Path
) -> None:
    # Without topic permissions it could bind its own queue to the other's key.
    rabbit.ctl("set_topic_permissions", "-p", rabbit.vhost, "alpha", "compute_worker", ".*", r"^compute\.alpha$")
    with Host(as_worker("alpha"), tmp_path, "alpha"):
        assert api.start_instance(ONE, host="alpha").host == "alpha"
        for key in ("compute.beta", "#", "compute.*"):
            assert_refused(
                rabbit, worker_user("alpha"),
                lambda channel, key=key: channel.queue_bind("compute.alpha", "compute_worker", key),
            )  # fmt: skip


def assert_refused(rabbit: Rabbit, user: User, act: Callable[[Any], Any]) -> None:
    with kombu.Connection(rabbit.url(user, "amqp")) as connection:
        channel = connection.channel()
        with pytest.raises(AccessRefused):
            act(channel)


def test_a_worker_that_may_not_listen_says_so(as_worker: Callable[[str], Any], tmp_path: Path) -> None:
    host = Host(as_worker("alpha"), tmp_path, "gamma")
    host.server.start()
    wait_for(lambda: "ACCESS_REFUSED" in (host.server.problem or ""), 20, "the problem to be known")
    assert "secret-of" not in (host.server.problem or "")
    assert host.server.stop(5)
    host.database.close()
