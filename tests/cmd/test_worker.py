from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.waiting import wait_for


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def config(tmp_path):
    """A configuration whose broker is not there."""

    def write(**groups):
        options = {
            "DEFAULT": {"transport_url": f"rabbit://user:sesame@127.0.0.1:{free_port()}/"},
            "compute": {"host": "node1", "state_path": tmp_path / "state", "compute_driver": "fake"},
            "images": {"file_path": tmp_path / "images"},
            "telemetry": {"port": free_port()},
        }
        for group, changed in groups.items():
            options.setdefault(group, {}).update(changed)
        lines = []
        for group, values in options.items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in values.items())]
        path = tmp_path / "worker.conf"
        path.write_text("\n".join(lines))
        return path, options

    return write


def command(path, *more):
    return [sys.executable, "-m", "compute_worker.cmd.worker", "--config-file", str(path), *more]


def health(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as exc:
        return json.load(exc)
    except OSError:
        return None


def test_broker_that_is_not_there_is_waited_for_and_sigterm_ends_it(config, tmp_path):
    path, options = config()
    with open(tmp_path / "log", "w+") as log:
        worker = subprocess.Popen(command(path), stdout=log, stderr=log)
        try:
            said = wait_for(lambda: health(options["telemetry"]["port"]), deadline=20, what="health")
            assert said["status"] == "failing" and not said["checks"]["broker"]["ok"]
            assert said["checks"]["hypervisor"]["ok"] and said["checks"]["journal"]["ok"]
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=15) == 0
        finally:
            worker.kill()
            worker.wait()
        log.seek(0)
        text = log.read()
    assert "no connection to the broker" in text and "stopped" in text
    assert "sesame" not in text
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "journal.sqlite").stat().st_mode & 0o777 == 0o600


def test_sigterm_that_another_thread_gets_ends_it(config):
    path, options = config()
    worker = subprocess.Popen(command(path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: health(options["telemetry"]["port"]), deadline=20, what="health")
        other = max(int(thread) for thread in os.listdir(f"/proc/{worker.pid}/task"))
        assert other != worker.pid
        # The kernel does so where the main thread is held by a tracer.
        assert ctypes.CDLL(None).tgkill(worker.pid, other, signal.SIGTERM) == 0
        assert worker.wait(timeout=15) == 0
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.parametrize(
    ("groups", "status", "word"),
    [
        ({"compute": {"max_concurrent_builds": 0}}, 2, "max_concurrent_builds"),
        ({"compute": {"host": "a/../b"}}, 1, "host"),
        ({"compute": {"compute_driver": "nosuch"}}, 1, "nosuch"),
    ],
)
def test_what_cannot_work_says_so_and_ends(config, groups, status, word):
    path, _ = config(**groups)
    ended = subprocess.run(command(path), capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == status
    assert word in ended.stderr


def test_check_names_what_is_wrong(config, tmp_path):
    path, _ = config()
    ended = subprocess.run(command(path, "--check"), capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    lines = {line[7:].partition(":")[0]: line[:5].strip() for line in ended.stdout.splitlines()[:-1]}
    assert lines["broker"] == "WRONG"
    assert {what for what, verdict in lines.items() if verdict != "ok"} == {"broker"}
    assert "sesame" not in ended.stdout + ended.stderr
    assert not list((tmp_path).glob("**/.compute-worker-check*"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root has directories that it may not write and another user may")
def test_check_finds_a_directory_that_the_user_cannot_write(tmp_path):
    from compute_worker.cmd.check import directory_problem

    assert directory_problem(str(tmp_path)) is None
    assert "cannot be written" in directory_problem("/proc/nothing")


def test_check_finds_a_clock_that_went_back(tmp_path):
    from compute_worker.cmd.check import clock_problem
    from compute_worker.embedded import settings_for
    from tests.manager.machine import Machine, make_instance

    machine = Machine(tmp_path)
    machine.do("build_and_run_instance", make_instance())
    machine.close()
    settings = settings_for("node1", tmp_path)
    assert clock_problem(settings, time.time()) is None
    assert "behind" in clock_problem(settings, time.time() - 3600)
    assert "set it" in clock_problem(settings, 5.0)
