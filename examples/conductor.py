#!/usr/bin/env python3
"""A small scheduler and conductor: picks a host for each instance, and knows at any time what became of it.

    COMPUTE_WORKER_TRANSPORT_URL=rabbit://... examples/conductor.py --count 10 --image IMAGE
    examples/conductor.py --embedded --count 10

Its rules, each of which a scheduler of one's own should have:

- A clear no with ``reschedulable`` leads to the next host; ``retry_after`` says when to ask the first one again.
- Silence is not a no. The same operation uuid goes to the same host again; only when that host has promised (by
  ``cancel_operation``) or must (by ``expires_at``) never to begin does the instance go elsewhere.
- Notifications come at least once, so they are told apart by (host, operation, sequence); after a pause the conductor
  asks each host what changed since the last ``seq`` it saw, instead of believing that it heard everything.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compute_worker.threads import use_threads

use_threads()

import oslo_messaging  # noqa: E402
from oslo_config import cfg  # noqa: E402

from compute_worker import errors  # noqa: E402
from compute_worker.objects import Flavor, HostState, ImageMeta, Instance, Operation  # noqa: E402
from compute_worker.rpc.client import ComputeAPI  # noqa: E402
from compute_worker.rpc.discovery import find_hosts  # noqa: E402
from compute_worker.rpc.transport import get_transport  # noqa: E402

EXPIRY_SECONDS = 600.0
DOUBT_SECONDS = 1.0
PAGE = 1000


@dataclass
class Build:
    """One instance on its way. ``state``: new, sent, in doubt, running, failed."""

    instance: Instance
    state: str = "new"
    host: str | None = None
    operation: str = ""
    expires_at: float = 0.0
    refused_by: dict[str, str] = field(default_factory=dict)
    not_before: float = 0.0
    error: str = ""

    @property
    def settled(self) -> bool:
        """Whether nothing more is to come."""
        return self.state in ("running", "failed")


def candidates(states: Iterable[HostState], flavor: Flavor, avoid: Iterable[str] = ()) -> list[str]:
    """Hosts that can take ``flavor``, most free memory first. A filter and a weigher: this is the scheduler."""
    fit = [
        state
        for state in states
        if state.enabled
        and state.hypervisor_up
        and state.host not in set(avoid)
        and state.vcpus.free >= flavor.vcpus
        and state.memory_mb.free >= flavor.memory_mb
        and state.disk_gb.free >= flavor.root_gb + flavor.ephemeral_gb
    ]
    return [state.host for state in sorted(fit, key=lambda s: (-s.memory_mb.free, s.host))]


class Conductor:
    """Everything it decides happens in the thread that calls :meth:`run`; notifications wait in a queue for it.

    :param expiry: seconds after which a host must not begin a build any more.
    """

    def __init__(
        self,
        api: ComputeAPI,
        transport: Any,
        *,
        exchange: str = "compute_worker",
        topic: str = "compute_notifications",
        url: str | None = None,
        expiry: float = EXPIRY_SECONDS,
        say: Any = print,
    ) -> None:
        self._api = api
        self._transport = transport
        self._exchange = exchange
        self._topic = topic
        self._url = url
        self._expiry = expiry
        self._say = say
        self._events: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._seen: set[tuple[str, str, int]] = set()
        self._listener: Any = None
        self._notifications: Any = None
        self.hosts: dict[str, HostState] = {}
        self.builds: dict[str, Build] = {}
        self.since: dict[str, tuple[str, int]] = {}
        """By host: the journal's id and the last ``seq`` seen in it. Another journal is read from its beginning."""

    # --- hosts --------------------------------------------------------------------------------------------------

    def discover(self, seconds: float = 2.0, expected: int = 0) -> list[str]:
        """Ask who is there; ends early when ``expected`` hosts have answered."""
        enough = lambda found: bool(expected) and len(found) >= expected  # noqa: E731
        for state in find_hosts(self._transport, self._api, seconds, self._exchange, enough):
            self._learn_host(state)
        return sorted(self.hosts)

    def _learn_host(self, state: HostState) -> None:
        self.hosts[state.host] = state
        journal, _ = self.since.get(state.host, ("", 0))
        if journal != state.journal_id:
            self.since[state.host] = (state.journal_id, 0)

    def _refresh(self) -> None:
        """Free resources as the hosts have them now: a claim counts from the moment a build was accepted."""
        for host in list(self.hosts):
            try:
                self._learn_host(self._api.get_host_state(host=host))
            except (errors.PeerUnavailable, errors.MessageUndeliverable):
                self._say(f"{host} does not answer and gets nothing new")
                del self.hosts[host]

    # --- placing ------------------------------------------------------------------------------------------------

    def boot(self, instance: Instance) -> Build:
        """Find a host for an instance. What becomes of it is in the returned object, as :meth:`run` goes on."""
        build = self.builds.setdefault(instance.uuid, Build(instance))
        if build.state == "new":
            self._place(build)
        return build

    def _place(self, build: Build) -> None:
        self._refresh()
        for host in candidates(self.hosts.values(), build.instance.flavor, build.refused_by):
            build.host, build.operation = host, str(uuid.uuid4())
            build.expires_at = time.time() + self._expiry
            if self._send(build):
                return
        self._give_up_for_now(build)

    def _send(self, build: Build) -> bool:
        """Whether the host has it, or may have it. No: the next one may be asked."""
        assert build.host is not None
        try:
            self._api.build_and_run_instance(
                build.instance, host=build.host, operation=build.operation, expires_at=build.expires_at
            )
        except errors.PeerUnavailable as exc:
            self._say(f"{build.instance.name}: {exc.message}: in doubt")
            build.state = "in doubt"
            return True
        except errors.ComputeError as exc:
            self._say(f"{build.instance.name}: {build.host} says no: {exc.message}")
            build.refused_by[build.host] = exc.message
            if exc.retry_after is not None:
                build.not_before = time.time() + exc.retry_after
            if not exc.reschedulable:
                build.state, build.error = "failed", exc.message
                return True
            return False
        build.state = "sent"
        self._say(f"{build.instance.name}: accepted by {build.host} as operation {build.operation}")
        return True

    def _give_up_for_now(self, build: Build) -> None:
        if build.not_before:
            build.state, build.refused_by = "new", {}
            return
        reasons = "; ".join(f"{host}: {reason}" for host, reason in build.refused_by.items())
        build.state, build.error = "failed", f"no host can take it ({reasons or 'no room anywhere'})"
        self._say(f"{build.instance.name}: {build.error}")

    # --- what became of it --------------------------------------------------------------------------------------

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, notifications come in."""
        transport = oslo_messaging.get_notification_transport(cfg.CONF, url=self._url)
        target = oslo_messaging.Target(topic=self._topic, exchange=self._exchange)
        endpoints = [_Ear(self._events, priority) for priority in ("info", "error")]
        listener = oslo_messaging.get_notification_listener(transport, [target], endpoints, executor="threading")
        listener.start()
        try:
            yield
        finally:
            listener.stop()
            listener.wait()
            transport.cleanup()

    def run(self, seconds: float) -> bool:
        """Follow until every build is settled, at most ``seconds``. Whether all are."""
        deadline = time.monotonic() + seconds
        looked = time.monotonic()
        while not all(build.settled for build in self.builds.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                self._hear(*self._events.get(timeout=min(left, 0.1)))
            except queue.Empty:
                self._try_again()
            if time.monotonic() - looked > DOUBT_SECONDS:
                looked = time.monotonic()
                self._settle_doubts()
        return True

    def _hear(self, event_type: str, payload: dict[str, Any]) -> None:
        key = (str(payload.get("host")), str(payload.get("operation")), int(payload.get("sequence", 0)))
        if key in self._seen:
            return
        self._seen.add(key)
        if event_type == "instance.create.progress":
            self._say(f"{payload['instance']}: {payload['progress']['phase']}")
        elif event_type in ("instance.create.end", "instance.create.error"):
            self._ended(payload.get("operation"), str(payload.get("instance")), payload.get("error"))

    def _ended(self, operation: str | None, instance: str, error: dict[str, Any] | None) -> None:
        """The same for a notification and for what was asked: doing it twice changes nothing."""
        build = self.builds.get(instance)
        if build is None or build.operation != operation or build.settled:
            return
        if error is None:
            build.state = "running"
            self._say(f"{build.instance.name}: runs on {build.host}")
        elif error.get("reschedulable"):
            # Undone: that host is as it was, and another may take it.
            self._say(f"{build.instance.name}: undone on {build.host}: {error['message']}")
            build.refused_by[str(build.host)] = str(error["message"])
            self._place(build)
        else:
            build.state, build.error = "failed", str(error["message"])
            self._say(f"{build.instance.name}: failed: {build.error}")

    def catch_up(self) -> int:
        """Ask every host what changed since the last look: what was missed while nobody listened. How much that was."""
        changes = 0
        for host in list(self.hosts):
            journal, since = self.since[host]
            for operation in self._changed(host, since):
                changes += 1
                since = max(since, operation.seq)
                if operation.kind == "build_and_run_instance" and operation.state.final:
                    self._ended(operation.uuid, str(operation.instance), operation.error)
            self.since[host] = (journal, since)
        return changes

    def _changed(self, host: str, since: int) -> Iterator[Operation]:
        while True:
            page = self._api.list_operations(since, host=host)
            yield from page
            if len(page) < PAGE:
                return
            since = page[-1].seq

    # --- silence ------------------------------------------------------------------------------------------------

    def _settle_doubts(self) -> None:
        for build in self.builds.values():
            if build.state == "in doubt":
                self._settle(build)

    def _settle(self, build: Build) -> None:
        """The host may have it: only its own word, or the clock, lets the instance go elsewhere."""
        assert build.host is not None
        try:
            operation = self._api.get_operation(build.operation, host=build.host)
        except errors.OperationNotFound:
            self._call_off(build)
        except errors.ComputeError:
            if time.time() > build.expires_at + 60:
                self._elsewhere(build, "it is silent, and the command has expired there")
        else:
            self._say(f"{build.instance.name}: {build.host} has it after all")
            build.state = "sent"
            if operation.state.final:
                self._ended(operation.uuid, build.instance.uuid, operation.error)

    def _call_off(self, build: Build) -> None:
        """The message may still be under way: a host that was told to cancel it refuses it when it comes."""
        assert build.host is not None
        try:
            self._api.cancel_operation(build.operation, host=build.host)
        except errors.ComputeError as exc:
            self._say(f"{build.instance.name}: {build.host}: {exc.message}")
            return
        self._elsewhere(build, "it never got it, and has promised to refuse it")

    def _elsewhere(self, build: Build, why: str) -> None:
        self._say(f"{build.instance.name}: {build.host}: {why}")
        build.refused_by[str(build.host)] = why
        self._place(build)

    def _try_again(self) -> None:
        for build in self.builds.values():
            if build.state == "new" and time.time() >= build.not_before:
                build.not_before = 0.0
                self._place(build)


class _Ear:
    """Receives notifications of one priority."""

    def __init__(self, events: queue.SimpleQueue[tuple[str, dict[str, Any]]], priority: str) -> None:
        self._events = events
        setattr(self, priority, self._take)

    def _take(self, context: Any, publisher: str, event_type: str, payload: dict[str, Any], metadata: Any) -> None:
        self._events.put((event_type, payload))


def instances(count: int, flavor: Flavor, image: ImageMeta) -> list[Instance]:
    """As many instances of one kind."""
    return [Instance(uuid=str(uuid.uuid4()), name=f"vm{n}", flavor=flavor, image=image) for n in range(1, count + 1)]


def conduct(conductor: Conductor, wanted: list[Instance], seconds: float = 300.0) -> int:
    """Boot them all and follow them; the exit status."""
    with conductor.listening():
        for instance in wanted:
            conductor.boot(instance)
        good = conductor.run(seconds)
    conductor.catch_up()
    by_host: dict[str, int] = {}
    for build in conductor.builds.values():
        if build.state == "running":
            by_host[str(build.host)] = by_host.get(str(build.host), 0) + 1
    running = sum(by_host.values())
    print(f"{running} of {len(wanted)} run: {', '.join(f'{n} on {h}' for h, n in sorted(by_host.items()))}")
    return 0 if good and running == len(wanted) else 1


def _embedded(wanted: list[Instance]) -> int:
    from compute_worker.embedded import EmbeddedCell

    logging.getLogger().setLevel(logging.ERROR)  # the workers run in this process

    with tempfile.TemporaryDirectory() as directory:
        cell = EmbeddedCell(["node1", "node2"], Path(directory), fake={"latency": 0.02})
        for instance in wanted:
            Path(directory, "images", instance.image.id).write_bytes(b"an image")
        with cell:
            topic = cell.settings["node1"].telemetry.notification_topic
            conductor = Conductor(cell.api, cell.transport, exchange=cell.exchange, topic=topic, url=cell.url)
            conductor.discover(expected=2)
            return conduct(conductor, wanted)


def main(arguments: list[str]) -> int:
    """Exit status: 0 all run, 1 some do not, 2 usage."""
    parser = argparse.ArgumentParser(description="Boot instances on the hosts that have room for them.")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--image", default="image", help="its id in the hosts' image store")
    parser.add_argument("--disk-format", default="raw", choices=("raw", "qcow2"))
    parser.add_argument("--embedded", action="store_true", help="against two simulated hosts in this process")
    args = parser.parse_args(arguments)
    flavor = Flavor(vcpus=1, memory_mb=128, root_gb=1)
    wanted = instances(args.count, flavor, ImageMeta(id=args.image, disk_format=args.disk_format))
    if args.embedded:
        return _embedded(wanted)
    url = os.environ.get("COMPUTE_WORKER_TRANSPORT_URL")
    if not url:
        parser.error("set COMPUTE_WORKER_TRANSPORT_URL, or give --embedded")
    transport = get_transport(url)
    conductor = Conductor(ComputeAPI(transport, timeout=15), transport, url=url)
    if not conductor.discover():
        print("no host answers", file=sys.stderr)
        return 1
    return conduct(conductor, wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
