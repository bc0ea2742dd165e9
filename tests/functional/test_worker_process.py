"""The worker as a process: killed, stopped, without a broker; what it resumes, tells and shows."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

from compute_worker import errors
from compute_worker.objects import ExternalEvent, Flavor, ImageMeta, InjectedFile, Instance, Operation, Vif
from compute_worker.rpc.client import ComputeAPI
from compute_worker.rpc.transport import get_transport, set_defaults
from compute_worker.states import OperationState, PowerState, VmState
from tests.functional.daemon import Daemon
from tests.lab.rabbit import Rabbit
from tests.waiting import wait_for

pytestmark = pytest.mark.functional

PASSWORD = "Xyzzy-Plugh-31415"
CONTENT = "QmFzZTY0LXNlY3JldC0yNzE4Mg=="


def guest(**changes: Any) -> Instance:
    flavor = Flavor(vcpus=1, memory_mb=64, root_gb=1)
    return Instance(**({"uuid": str(uuid.uuid4()), "flavor": flavor, "image": ImageMeta(id="img")} | changes))


@pytest.fixture
def daemon(rabbit: Rabbit, tmp_path: Path, name: str) -> Iterator[Daemon]:
    """A worker that was not started yet."""
    if rabbit.process() is None:
        rabbit.start()
    made = Daemon(rabbit.url(), tmp_path, name)
    yield made
    made.close()


VIF = "99999999-9999-4999-8999-999999999999"
WAITS = {"vifs": [Vif(id=VIF, mac="52:54:00:00:00:01", wait_for_plug=True)]}
"""A guest whose build takes until somebody says PLUGGED."""
PLUGGED = [ExternalEvent(name="network-vif-plugged", tag=VIF)]


def build(
    api: ComputeAPI, daemon: Daemon, changes: Mapping[str, Any] | None = None, **options: Any
) -> tuple[str, str]:
    """A build, accepted; instance and operation."""
    instance = guest(**(changes or {}))
    accepted = api.build_and_run_instance(instance, host=daemon.host, **options)
    assert accepted.operation is not None
    return instance.uuid, accepted.operation


def ended(api: ComputeAPI, daemon: Daemon, operation: str, wait: float = 30) -> Operation:
    found = api.get_operation(operation, wait, host=daemon.host)
    assert found.state.final, found
    return found


class Listener:
    """oslo.messaging's own listener of notifications, as a conductor has one: it drops what it has seen."""

    def __init__(self, url: str, topic: str) -> None:
        set_defaults(cfg.CONF)
        self._transport = oslo_messaging.get_notification_transport(cfg.CONF, url=url)
        target = oslo_messaging.Target(topic=topic)
        self._server = oslo_messaging.get_notification_listener(
            self._transport, [target], [self], executor="threading", pool=None
        )
        self.delivered = 0
        self.seen: dict[tuple[str, int], str] = {}
        self.order: list[tuple[str, int]] = []

    def info(self, context: Any, publisher: str, event_type: str, payload: dict[str, Any], metadata: Any) -> None:
        self._take(event_type, payload)

    def error(self, context: Any, publisher: str, event_type: str, payload: dict[str, Any], metadata: Any) -> None:
        self._take(event_type, payload)

    def _take(self, event_type: str, payload: dict[str, Any]) -> None:
        if payload.get("operation") is None:
            return
        self.delivered += 1
        key = (payload["operation"], payload["sequence"])
        assert self.seen.setdefault(key, event_type) == event_type
        if key not in self.order:
            self.order.append(key)

    def of(self, operation: str) -> list[tuple[int, str]]:
        return [(n, self.seen[op, n]) for op, n in list(self.order) if op == operation]

    def ends_of(self, operation: str) -> list[tuple[int, str]]:
        """Without progress, renumbered."""
        told = [event for _, event in self.of(operation) if not event.endswith(".progress")]
        return list(enumerate(told, 1))

    def __enter__(self) -> Listener:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.stop()
        self._server.wait()
        self._transport.cleanup()


WHOLE = [(1, "instance.create.start"), (2, "instance.create.end")]


# --- stopping and going on --------------------------------------------------------------------------------------------


def test_sigterm_in_a_long_build_loses_nothing(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    instance, operation = build(api, daemon, WAITS)
    cast = build(api, daemon, cast=True)
    wait_for(lambda: api.get_operation(operation, host=daemon.host).phase == "wait_for_vifs", what="its long step")
    assert ended(api, daemon, cast[1]).state is OperationState.DONE
    asked = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - asked < 3
    assert "steps that still ran" not in daemon.log()
    daemon.start()
    assert api.get_operation(operation, host=daemon.host).phase == "wait_for_vifs"
    api.external_instance_event(instance, PLUGGED, host=daemon.host)
    assert ended(api, daemon, operation).state is OperationState.DONE
    assert api.get_instance(instance, host=daemon.host).vm_state is VmState.ACTIVE


def test_sigterm_in_steps_that_do_not_end_keeps_its_time(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.configure("fake", latency=1.5)
    daemon.configure("compute", graceful_shutdown_timeout=0.5)
    daemon.start()
    builds = [build(api, daemon)[1], build(api, daemon, cast=True)[1]]
    wait_for(lambda: api.get_operation(builds[0], host=daemon.host).phase != "queued", what="its first step")
    asked = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - asked < 0.5 + 2.5
    assert "steps that still ran go on" in daemon.log()
    daemon.configure("fake", latency=0)
    daemon.start()
    assert [ended(api, daemon, one).state for one in builds] == [OperationState.DONE] * 2


def test_sigterm_does_not_wait_for_who_waits(rabbit: Rabbit, daemon: Daemon, api: ComputeAPI) -> None:
    daemon.configure("compute", graceful_shutdown_timeout=20)
    daemon.start()
    _, operation = build(api, daemon, WAITS)
    transport = get_transport(rabbit.url())
    answers: list[Operation] = []
    waiter = threading.Thread(
        target=lambda: answers.append(ComputeAPI(transport).get_operation(operation, 50, host=daemon.host))
    )
    waiter.start()
    wait_for(lambda: api.get_operation(operation, host=daemon.host).phase == "wait_for_vifs", what="its long step")
    asked = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - asked < 6
    waiter.join(10)
    assert [answer.state for answer in answers] == [OperationState.RUNNING]
    transport.cleanup()


def test_open_operations_go_on_within_two_seconds_of_the_start(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    builds = [build(api, daemon, WAITS) for _ in range(5)]
    wait_for(lambda: sum("wait_for_vifs" in line for line in running(daemon)), what="their long step")
    daemon.kill()
    daemon.start()
    resumed = [e["message"] for e in daemon.entries() if "operations go on" in e["message"]][-1]
    assert resumed.startswith(f"host {daemon.host}: 5 operations go on")
    ready = [re.search(r"is ready after ([0-9.]+) s", e["message"]) for e in daemon.entries()]
    assert float([found for found in ready if found][-1][1]) < 2
    for instance, operation in builds:
        api.external_instance_event(instance, PLUGGED, host=daemon.host)
        assert ended(api, daemon, operation).state is OperationState.DONE


def test_a_host_stays_disabled_over_a_restart(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    api.disable_host("its fan is broken", host=daemon.host)
    for end in (daemon.stop, daemon.kill):
        end()
        daemon.start()
        state = api.get_host_state(host=daemon.host)
        assert (state.enabled, state.disabled_reason) == (False, "its fan is broken")
        with pytest.raises(errors.HostDisabled, match="its fan is broken"):
            build(api, daemon)
    api.enable_host(host=daemon.host)
    daemon.kill()
    daemon.start()
    assert ended(api, daemon, build(api, daemon)[1]).state is OperationState.DONE


# --- the broker comes and goes ----------------------------------------------------------------------------------------


def test_it_waits_for_a_broker_that_is_not_there_yet(rabbit: Rabbit, daemon: Daemon) -> None:
    rabbit.kill()
    try:
        daemon.start(ready=False)
        said = wait_for(daemon.health, 30, "health")
        assert said["status"] == "failing" and not said["checks"]["broker"]["ok"]
    finally:
        rabbit.start()
    daemon.wait_ready()
    transport = get_transport(rabbit.url())
    api = ComputeAPI(transport, timeout=20)
    assert ended(api, daemon, build(api, daemon)[1]).state is OperationState.DONE
    transport.cleanup()


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_build_ends_while_the_broker_is_away_and_is_told_when_it_is_back(
    rabbit: Rabbit, daemon: Daemon, how: str
) -> None:
    daemon.configure("fake", latency=0.3)
    transport = get_transport(rabbit.url())
    api = ComputeAPI(transport, timeout=20)
    daemon.start()
    with Listener(rabbit.url(), daemon.topic) as listener:
        _, operation = build(api, daemon)
        getattr(rabbit, how)()
        try:
            wait_for(lambda: not running(daemon), 30, "the build's end")
            wait_for(lambda: sample(daemon, "broker_up") == 0, 10, "the loss to be noticed")
            assert not daemon.well()
        finally:
            rabbit.start()
        daemon.wait_ready(60)
        wait_for(lambda: listener.ends_of(operation) == WHOLE, 30, "the notifications")
        assert ended(api, daemon, operation).state is OperationState.DONE
        _, after = build(api, daemon, cast=True)
        wait_for(lambda: listener.ends_of(after) == WHOLE, 30, "those of a build after it")
    transport.cleanup()


def test_notifications_arrive_once_and_in_order_whatever_dies(rabbit: Rabbit, daemon: Daemon) -> None:
    transport = get_transport(rabbit.url())
    api = ComputeAPI(transport, timeout=20)
    daemon.start()
    operations: list[str] = []
    with Listener(rabbit.url(), daemon.topic) as listener:
        for number in range(5):
            operations += [build(api, daemon, cast=True)[1] for _ in range(8)]
            if number == 2:
                rabbit.kill()
                rabbit.start()
            daemon.kill()
            daemon.start()
        wait_for(lambda: all(len(listener.of(o)) == 2 for o in operations), 60, "every notification")
        assert [listener.of(o) for o in operations] == [WHOLE] * len(operations)
        wait_for(lambda: sample(daemon, "outbox_notifications") == 0, 10, "an empty outbox")
        assert len(api.list_instances(host=daemon.host)) == len(operations)
    transport.cleanup()


# --- looking ----------------------------------------------------------------------------------------------------------


def sample(daemon: Daemon, name: str, labels: str = "") -> float | None:
    """One number of ``/metrics``."""
    found = re.search(rf"^compute_worker_{name}{re.escape(labels)} (\S+)$", daemon.get("metrics"), re.MULTILINE)
    return float(found[1]) if found else None


def running(daemon: Daemon) -> list[str]:
    """Open operations as ``/metrics`` shows them."""
    return [line for line in daemon.get("metrics").splitlines() if line.startswith("compute_worker_operations{")]


def test_health_and_metrics(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    health = daemon.health()
    assert health is not None and health["host"] == daemon.host
    assert health["checks"].keys() == {"broker", "hypervisor", "journal", "notifications"}
    assert all(check == {"ok": True} for check in health["checks"].values())

    _, operation = build(api, daemon)
    ended(api, daemon, operation)
    wait_for(lambda: sample(daemon, "instances") == 1, what="the instance to be counted")
    labels = '{kind="build_and_run_instance",state="done"}'
    assert sample(daemon, "operation_duration_seconds_count", labels) == 1
    wait_for(lambda: sample(daemon, "notifications_sent_total", '{event="end"}') == 1, what="its end to be told")
    for name in ("broker_up", "hypervisor_up", "enabled"):
        assert sample(daemon, name) == 1
    for name in ("outbox_notifications", "inbox_messages"):
        assert sample(daemon, name) == 0
    assert (sample(daemon, "journal_commit_seconds_count") or 0) >= 5
    assert (sample(daemon, "journal_bytes") or 0) > 4096
    assert sample(daemon, "resource_claimed", '{resource="memory_mb"}') == 64
    assert sample(daemon, "resource_total", '{resource="vcpus"}') == 16

    api.disable_host("x", host=daemon.host)
    assert sample(daemon, "enabled") == 0


def test_an_open_operation_is_in_the_metrics(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    build(api, daemon, WAITS)
    labels = '{kind="build_and_run_instance",phase="wait_for_vifs",state="running"}'
    wait_for(lambda: sample(daemon, "operations", labels) == 1, what="the build to be shown")


def test_a_conductor_that_was_away_catches_up(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    first, operation = build(api, daemon)
    ended(api, daemon, operation)
    instances = max(i.seq for i in api.list_instances(host=daemon.host))
    operations = max(o.seq for o in api.list_operations(host=daemon.host))
    assert api.list_instances(instances, host=daemon.host) == []
    assert api.list_operations(operations, host=daemon.host) == []

    second, made = build(api, daemon)
    ended(api, daemon, made)
    refused = str(uuid.uuid4())
    api.pause_instance(str(uuid.uuid4()), operation=refused, host=daemon.host, cast=True)
    gone = api.terminate_instance(first, host=daemon.host).operation
    assert gone is not None
    ended(api, daemon, gone)
    daemon.kill()
    daemon.start()

    changed = {i.uuid: i.vm_state for i in api.list_instances(instances, host=daemon.host)}
    assert changed == {first: VmState.DELETED, second: VmState.ACTIVE}
    since = {o.uuid: o.state for o in api.list_operations(operations, host=daemon.host)}
    assert since == {made: OperationState.DONE, refused: OperationState.REFUSED, gone: OperationState.DONE}
    assert [o.uuid for o in api.list_operations(instance=second, host=daemon.host)] == [made]


def test_an_outcome_can_be_waited_for(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    instance, operation = build(api, daemon, WAITS)
    assert not api.get_operation(operation, 0.2, host=daemon.host).state.final
    plug = threading.Timer(0.5, lambda: api.external_instance_event(instance, PLUGGED, host=daemon.host))
    plug.start()
    began = time.monotonic()
    found = api.get_operation(operation, 30, host=daemon.host)
    assert found.state is OperationState.DONE and 0.5 <= time.monotonic() - began < 15
    plug.join()
    assert [step.name for step in found.steps][-1] == "resume_guest"
    assert api.get_operation(operation, 30, host=daemon.host).state is OperationState.DONE


# --- what it says by itself -------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(daemon: Daemon, tmp_path: Path) -> Iterator[socket.socket]:
    """What systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        path = f"/tmp/cw-{uuid.uuid4().hex[:8]}"
        ear.bind(path)
        ear.settimeout(30)
        daemon.environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "600000"}
        yield ear
        os.unlink(path)


def test_systemd_is_told(daemon: Daemon, systemd: socket.socket) -> None:
    daemon.start()
    ready = systemd.recv(1000).decode().splitlines()
    assert ready == ["READY=1", f"STATUS=takes commands as {daemon.host}"]
    assert [systemd.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    said = wait_for(lambda: next((s for s in [systemd.recv(1000)] if s != b"WATCHDOG=1"), None), what="STOPPING")
    assert said == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=20000000"
    assert daemon.process.wait(20) == 0


def test_a_worker_that_hangs_puts_off_no_watchdog(daemon: Daemon, systemd: socket.socket) -> None:
    daemon.start()
    assert daemon.process is not None
    systemd.recv(1000)
    systemd.recv(1000)
    daemon.process.send_signal(signal.SIGSTOP)
    systemd.settimeout(0.05)
    with pytest.raises(TimeoutError):
        while True:
            systemd.recv(1000)
    systemd.settimeout(1.5)
    with pytest.raises(TimeoutError):
        systemd.recv(1000)
    daemon.process.send_signal(signal.SIGCONT)
    assert systemd.recv(1000) == b"WATCHDOG=1"


def test_log_lines_say_what_they_are_about_and_no_secret(rabbit: Rabbit, daemon: Daemon, api: ComputeAPI) -> None:
    daemon.configure("DEFAULT", debug=True)
    daemon.start()
    instance, operation = guest(user_data="user-data-16180", config_drive=True), str(uuid.uuid4())
    files = [InjectedFile(path="/etc/key", content_base64=CONTENT)]
    transport = get_transport(rabbit.url())
    with Listener(rabbit.url(), daemon.topic) as listener:
        conductor = ComputeAPI(transport, timeout=20)
        conductor.build_and_run_instance(instance, files, PASSWORD, operation=operation, host=daemon.host, cast=True)
        wait_for(lambda: listener.of(operation) == WHOLE, 20, "its end")
    failing = guest(image=ImageMeta(id="nosuch"))
    lost = conductor.build_and_run_instance(failing, files, PASSWORD, host=daemon.host).operation
    assert lost is not None and ended(api, daemon, lost).state is OperationState.UNDONE
    with pytest.raises(errors.InstanceExists):
        conductor.build_and_run_instance(instance, files, PASSWORD, host=daemon.host)
    assert daemon.process is not None
    argv = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
    pages = daemon.get("metrics") + daemon.get("healthz")
    shown = str(api.list_operations(host=daemon.host)) + str(ended(api, daemon, lost))
    assert daemon.stop() == 0

    entries = daemon.entries()
    assert len(entries) == len(daemon.log().splitlines()), "a line of the log is no JSON"
    done = [e for e in entries if e.get("operation") == operation]
    assert {e["instance"] for e in done} == {instance.uuid}
    requests = {e["request_id"] for e in done}
    assert len(requests) == 1 and requests.pop().startswith("req-")
    assert any("is done" in e["message"] for e in done)
    assert any(e["level"] == "DEBUG" for e in entries)
    credentials = re.escape(rabbit.url().partition("://")[2].partition("@")[0])
    for text in (daemon.log(), argv, pages, shown):
        for secret in (PASSWORD, CONTENT, "user-data-16180"):
            assert secret not in text
        assert not re.search(credentials, text)
    transport.cleanup()


def test_a_guest_that_stops_while_the_worker_is_down_is_found(daemon: Daemon, api: ComputeAPI) -> None:
    daemon.start()
    instance, operation = build(api, daemon)
    ended(api, daemon, operation)
    daemon.kill()
    daemon.start()
    record = api.get_instance(instance, host=daemon.host)
    assert (record.vm_state, record.power_state) == (VmState.ACTIVE, PowerState.RUNNING)
    assert json.loads(daemon.get("healthz"))["status"] == "ok"
