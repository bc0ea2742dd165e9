"""The parts together, around a real worker on the simulated host."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from compute_worker import objects
from compute_worker.config import Settings
from compute_worker.embedded import EmbeddedCell, settings_for
from compute_worker.objects import Flavor, ImageMeta, Instance
from compute_worker.telemetry import logs
from compute_worker.telemetry.service import Telemetry
from tests.telemetry.test_sender import Recorder
from tests.waiting import wait_for


@pytest.fixture
def conf() -> Iterator[cfg.ConfigOpts]:
    """A configuration of its own; what it does to the root logger is undone."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level, sys.excepthook, threading.excepthook)
    formatters = {handler: handler.formatter for handler in root.handlers}
    conf = cfg.ConfigOpts()
    logs.register(conf)
    conf([], project="compute-worker", default_config_files=[])
    yield conf
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers[:], root.level, sys.excepthook, threading.excepthook = before
    for handler, formatter in formatters.items():
        handler.setFormatter(formatter)


def settings_of(directory: Path) -> Settings:
    return settings_for("node1", directory, telemetry={"port": 0, "host_state_interval": 600.0})


def get(telemetry: Telemetry, path: str) -> tuple[int, str]:
    assert telemetry.port is not None
    connection = http.client.HTTPConnection("127.0.0.1", telemetry.port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[EmbeddedCell]:
    with EmbeddedCell(["node1"], tmp_path / uuid.uuid4().hex) as cell:
        yield cell


def build(cell: EmbeddedCell) -> str:
    the_worker(cell).manager.core.driver.simulated.images.put("tiny", bytes(65_536))
    image = ImageMeta(id="tiny", disk_format="raw")
    instance = Instance(uuid=str(uuid.uuid4()), flavor=Flavor(vcpus=1, memory_mb=64, root_gb=1), image=image)
    answer = cell.api.build_and_run_instance(instance, host="node1")
    assert answer is not None
    done = cell.api.get_operation(str(answer.operation), wait=20.0, host="node1")
    assert done.state == "done", objects.encode(done)
    return instance.uuid


def the_worker(cell: EmbeddedCell) -> Any:
    return cell.workers["node1"]


def test_a_build_is_notified_counted_and_healthy(
    cell: EmbeddedCell, conf: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "systemd"))
        systemd.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "systemd"))
        broker = Recorder()
        telemetry = Telemetry(settings_of(tmp_path), conf, notifier=lambda: broker)
        # The cell's own would send some of them.
        cell._senders["node1"].stop()
        telemetry.start(the_worker(cell))
        try:
            assert b"READY=1" in systemd.recv(1024)
            uuid_ = build(cell)
            telemetry.operation_finished("build_and_run_instance", "done", 0.5)
            telemetry.journal_commit(0.002)
            wait_for(lambda: any(e.endswith(".end") for _, e, _, _ in broker.sent), what="the last notification")
            mine = [(event, payload) for _, event, _, payload in broker.sent if payload.get("instance") == uuid_]
            assert [event.rsplit(".", 1)[1] for event, _ in mine] == ["start", "end"]
            assert [payload["sequence"] for _, payload in mine] == [1, 2]
            assert any(event == "host.state" for _, event, _, _ in broker.sent)

            status, body = get(telemetry, "/healthz")
            assert (status, json.loads(body)["status"]) == (200, "ok")
            text = get(telemetry, "/metrics")[1]
            assert "compute_worker_instances 1.0" in text
            assert 'compute_worker_live_migration_downtime_seconds_bucket{le="+Inf"} 0.0' in text
            assert "compute_worker_broker_up 1.0" in text
            labels = '{kind="build_and_run_instance",state="done"}'
            assert f"compute_worker_operation_duration_seconds_count{labels} 1.0" in text
            assert 'compute_worker_notifications_sent_total{event="end"} 1.0' in text
        finally:
            telemetry.stopping()
            assert b"STOPPING=1" in systemd.recv(1024)
            telemetry.stop()


def test_it_outlives_the_journal_it_looks_at(cell: EmbeddedCell, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    """As in the daemon, where the worker is stopped first."""
    telemetry = Telemetry(settings_of(tmp_path), conf, notifier=Recorder)
    telemetry.start(the_worker(cell))
    the_worker(cell).stop(5.0)
    try:
        assert get(telemetry, "/metrics")[0] == 200
        assert json.loads(get(telemetry, "/healthz")[1])["checks"]["journal"]["ok"]
    finally:
        telemetry.stop()


def test_before_the_worker_has_started_it_is_not_healthy(conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    telemetry = Telemetry(settings_of(tmp_path), conf, notifier=Recorder)
    assert telemetry._endpoint is not None
    telemetry._endpoint.start()
    try:
        assert get(telemetry, "/healthz")[0] == 503
        assert get(telemetry, "/metrics")[0] == 200
    finally:
        telemetry.stop()


def test_the_brokers_password_is_known_to_the_log(
    conf: cfg.ConfigOpts, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    conf.register_opt(cfg.StrOpt("transport_url", secret=True))
    conf.set_override("transport_url", "rabbit://cw:s3cr3t-Pa55@broker/")
    Telemetry(settings_for("node1", tmp_path), conf, notifier=Recorder)
    logging.getLogger("compute_worker.x").warning("login with s3cr3t-Pa55 failed")
    err = "".join(capfd.readouterr())
    assert "login with *** failed" in err
    assert "s3cr3t" not in err
