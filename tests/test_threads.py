"""eventlet stays out of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["oslo_messaging", "oslo_log.log", "compute_worker.rpc.transport"])
def test_oslo_loads_no_eventlet(package: str) -> None:
    code = (
        "import sys; from compute_worker.threads import use_threads; kept_out = use_threads() and use_threads();"
        f" import {package}; print(kept_out, sys.modules.get('eventlet'), 'greenlet' in sys.modules)"
    )
    assert run(code) == "True None False"


def test_it_says_when_it_comes_too_late() -> None:
    code = (
        "import sys, types; sys.modules['eventlet'] = types.ModuleType('eventlet');"
        " from compute_worker.threads import use_threads; print(use_threads())"
    )
    assert run(code) == "False"
