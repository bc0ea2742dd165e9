#!/usr/bin/env python3
"""Driving a worker by bare AMQP: kombu and JSON, nothing of compute_worker or oslo.messaging.

    COMPUTE_WORKER_AMQP_URL=amqp://user:password@broker:5672/vhost examples/bare_amqp.py IMAGE [DISK_FORMAT [resize]]

finds the hosts, boots an instance on the one with the most free memory, reads its console, stops it (with ``resize``:
gives it another size on another host, and confirms that), deletes it, and prints the notifications that came meanwhile.
Every message there is: doc/asyncapi.yaml.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import kombu

EXCHANGE = kombu.Exchange("compute_worker", "topic", durable=True)
NOTIFICATIONS = "compute_notifications"
FINAL = ("done", "undone", "refused")


class Refused(Exception):
    """A worker said no: ``kind`` is the error's class, ``details`` what it knows (``host``, ``retry_after``, ...)."""

    def __init__(self, failure: dict[str, Any]) -> None:
        super().__init__(f"{failure['class']}: {failure['message']}")
        self.kind: str = failure["class"]
        self.details: dict[str, Any] = failure.get("kwargs", {})


class NoSuchHost(Exception):
    """The broker has no queue for it: no worker ever listened by that name."""


class Bare:
    """One connection: commands out, answers in."""

    def __init__(self, url: str) -> None:
        # Publisher confirms: a command that is cast counts as accepted once the broker has confirmed it.
        self._connection = kombu.Connection(url, transport_options={"confirm_publish": True})
        self._channel = self._connection.channel()
        self._replies = kombu.Queue(f"reply-{uuid.uuid4()}", durable=False, exclusive=True)(self._channel)
        self._replies.declare()

    def close(self) -> None:
        """End; the queue of answers goes with the connection."""
        self._connection.release()

    def cast(self, host: str, method: str, **args: Any) -> None:
        """Send a command and wait for the broker's confirm; a refusal comes as a notification."""
        self._publish(EXCHANGE, f"compute.{host}", _request(method, args))

    def call(self, host: str, method: str, timeout: float = 30.0, **args: Any) -> Any:
        """Send a command or query and wait for its answer.

        :raises Refused: the worker said no.
        :raises NoSuchHost: nobody listens as ``host``.
        :raises TimeoutError: no answer; whether a command was accepted is not known: send it again with the same
            ``operation``, and it is done once.
        """
        asked = _request(method, args) | {"_msg_id": uuid.uuid4().hex, "_reply_q": self._replies.name}
        self._publish(EXCHANGE, f"compute.{host}", asked)
        deadline = time.monotonic() + timeout
        for answer in self._read(self._replies, deadline):
            if answer["_msg_id"] != asked["_msg_id"] or not answer["ending"]:
                continue
            if answer["failure"]:
                raise Refused(json.loads(answer["failure"]))
            return answer["result"]
        raise TimeoutError(f"host {host} does not answer {method}")

    def find_hosts(self, seconds: float = 1.0) -> list[dict[str, Any]]:
        """The state of every host that answers a fanout."""
        topic = f"hosts.{uuid.uuid4()}"
        queue = kombu.Queue(topic, EXCHANGE, topic, durable=False, exclusive=True)(self._channel)
        queue.declare()
        everybody = kombu.Exchange("compute_worker_fanout", "fanout", durable=False, auto_delete=True)
        self._publish(everybody, "", _request("announce", {"reply_topic": topic}), mandatory=False)
        found = [message["args"]["state"] for message in self._read(queue, time.monotonic() + seconds)]
        queue.delete()
        return found

    def end_of(self, host: str, operation: str, timeout: float = 120.0) -> dict[str, Any]:
        """The operation once it has ended."""
        deadline = time.monotonic() + timeout
        while True:
            found: dict[str, Any] = self.call(host, "get_operation", operation=operation, wait=5)
            if found["state"] in FINAL:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"operation {operation} is still in {found['phase']}")

    def notifications(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What the workers tell, for some seconds; each at least once, to be told apart by ``message_id``.

        Whoever else reads these queues gets what this one does not: bind a queue of your own to share.
        """
        for priority in ("info", "error"):
            name = f"{NOTIFICATIONS}.{priority}"
            queue = kombu.Queue(name, EXCHANGE, name, durable=True)(self._channel)
            queue.declare()
            yield from self._read(queue, time.monotonic() + seconds)

    def _publish(self, exchange: kombu.Exchange, key: str, request: dict[str, Any], mandatory: bool = True) -> None:
        body = {"oslo.version": "2.0", "oslo.message": json.dumps(request)}
        producer = kombu.Producer(self._channel, exchange, key)
        # Mandatory: the broker gives back what reaches no queue, so that a wrong host name is known at once.
        try:
            producer.publish(body, serializer="json", delivery_mode=2, mandatory=mandatory)
        except self._connection.channel_errors as exc:
            raise NoSuchHost(f"{key}: {exc}") from None

    def _read(self, queue: kombu.Queue, deadline: float) -> Iterator[dict[str, Any]]:
        """Messages of a queue, unwrapped, until ``deadline``."""
        arrived: list[kombu.Message] = []
        with kombu.Consumer(self._channel, [queue], on_message=arrived.append, accept=["json"]):
            while (left := deadline - time.monotonic()) > 0:
                try:
                    self._connection.drain_events(timeout=left)
                except TimeoutError:
                    return
                while arrived:
                    message = arrived.pop(0)
                    message.ack()
                    yield json.loads(json.loads(message.body)["oslo.message"])


def _request(method: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "args": args, "version": "1.0", "_unique_id": uuid.uuid4().hex}


def story(bare: Bare, image: str, disk_format: str, say: Any = print, resize: bool = False) -> list[dict[str, Any]]:
    """Boot, console, stop, delete, and a resize where it is wanted. Returns the notifications that came."""
    hosts = bare.find_hosts()
    if not hosts:
        raise SystemExit("no host answers")
    best = max(hosts, key=lambda state: state["memory_mb"]["usable"] - state["memory_mb"]["used"])
    host = best["host"]
    say(f"{len(hosts)} hosts answer; {host} has most free memory")

    instance = {
        "uuid": str(uuid.uuid4()),
        "name": "bare",
        "flavor": {"vcpus": 1, "memory_mb": 128, "root_gb": 1},
        "image": {"id": image, "disk_format": disk_format},
    }
    operation = str(uuid.uuid4())
    boot = {"instance": instance, "operation": operation, "expires_at": time.time() + 3600}
    accepted = bare.call(host, "build_and_run_instance", **boot)
    again = bare.call(host, "build_and_run_instance", **boot)
    say(f"accepted as operation {accepted['operation']}; sent once more: repeated={again['repeated']}")
    ended = bare.end_of(host, operation)
    say(f"build: {ended['state']}; steps: {', '.join(step['name'] for step in ended['steps'])}")

    console = bare.call(host, "get_console_output", instance=instance["uuid"])
    say(f"console: {console.splitlines()[-1] if console else 'empty so far'}")

    stopped = str(uuid.uuid4())
    bare.cast(host, "stop_instance", instance=instance["uuid"], operation=stopped)
    while True:
        try:
            say(f"stop, by cast: {bare.end_of(host, stopped)['state']}")
            break
        except Refused as refused:
            # The broker has confirmed it and the worker has not read it yet.
            if refused.kind != "OperationNotFound":
                raise
            time.sleep(0.1)

    if resize:
        elsewhere = [state["host"] for state in hosts if state["host"] != host]
        host = move(bare, bare.call(host, "get_instance", instance=instance["uuid"]), elsewhere, say)

    deleted = bare.call(host, "terminate_instance", instance=instance["uuid"], operation=str(uuid.uuid4()))
    say(f"delete: {bare.end_of(host, deleted['operation'])['state']}")
    try:
        bare.call(host, "start_instance", instance=instance["uuid"], operation=str(uuid.uuid4()))
    except Refused as refused:
        say(f"start after delete: {refused}")

    told = [n for n in bare.notifications(1.0) if n["payload"].get("instance") == instance["uuid"]]
    say(f"notifications: {', '.join(n['event_type'] for n in told)}")
    return told


def move(bare: Bare, instance: dict[str, Any], hosts: list[str], say: Any = print) -> str:
    """Give an instance another size on one of ``hosts``, and confirm it. Returns the host that has it then."""
    operation = str(uuid.uuid4())
    migration = {
        "uuid": str(uuid.uuid4()),
        "instance": instance["uuid"],
        "migration_type": "resize",
        "source_host": instance["host"],
        "dest_host": hosts[0],
        "alternates": hosts[1:],
        "new_flavor": instance["flavor"] | {"memory_mb": 256, "root_gb": 2},
    }
    resize = {"instance": instance, "migration": migration, "operation": operation, "expires_at": time.time() + 3600}
    bare.call(hosts[0], "prep_resize", **resize)
    # Should that host fail, the next one of alternates has the operation by the time the first has ended its part.
    for host in hosts:
        ended = bare.end_of(host, operation)
        say(f"resize on {host}: {ended['state']}; steps: {', '.join(step['name'] for step in ended['steps'])}")
        if ended["state"] == "done" and ended["kind"] == "prep_resize":
            break
    else:
        raise SystemExit(f"it stays on {instance['host']}: {ended['error']['message']}")
    confirm = {"instance": instance["uuid"], "migration": migration["uuid"], "operation": str(uuid.uuid4())}
    accepted = bare.call(host, "confirm_resize", **confirm)
    say(f"confirmation: {bare.end_of(host, accepted['operation'])['state']}")
    return host


def main(arguments: list[str]) -> int:
    """Exit status: 0 all went well, 2 usage."""
    url = os.environ.get("COMPUTE_WORKER_AMQP_URL")
    if not url or len(arguments) not in (1, 2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    bare = Bare(url)
    try:
        story(bare, arguments[0], "".join(arguments[1:2]) or "qcow2", resize=arguments[2:] == ["resize"])
    finally:
        bare.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
