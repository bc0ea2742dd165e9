"""A real image service: Glance from its package in a virtualenv of its own, with SQLite and a file store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import wait_for

VENV_VARIABLE = "LAB_GLANCE_VENV"
"""A virtualenv that has it already; else one is made, which takes minutes."""
PACKAGES = ("glance==33.0.0", "waitress")
CONFIG = """[DEFAULT]
enabled_backends = file:file
log_file = {state}/api.log
[database]
connection = sqlite:///{state}/glance.sqlite
[glance_store]
default_backend = file
[file]
filesystem_store_datadir = {state}/images
[os_glance_staging_store]
filesystem_store_datadir = {state}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {state}/tasks
[paste_deploy]
config_file = {state}/glance-api-paste.ini
"""
# The service trusts what its authentication filter says; there is none, so this says it instead.
APPLICATION = """from glance.wsgi.api import application as service

ANYBODY = {"HTTP_X_IDENTITY_STATUS": "Confirmed", "HTTP_X_USER_ID": "lab", "HTTP_X_PROJECT_ID": "lab",
           "HTTP_X_ROLES": "admin,member,reader"}


def application(environ, start_response):
    return service({**environ, **ANYBODY}, start_response)
"""


def _install(directory: Path) -> Path:
    given = os.environ.get(VENV_VARIABLE)
    if given:
        return Path(given)
    venv = directory / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    pip = [str(venv / "bin" / "pip"), "install", "-q", *PACKAGES]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        pytest.fail(f"Glance cannot be installed: {done.stderr[-2000:]}")
    return venv


def _configure(venv: Path, state: Path) -> None:
    for name in ("images", "staging", "tasks"):
        (state / name).mkdir()
    (state / "glance-api.conf").write_text(CONFIG.format(state=state))
    paste = (venv / "etc" / "glance" / "glance-api-paste.ini").read_text()
    (state / "glance-api-paste.ini").write_text(
        paste.replace("context:UnauthenticatedContextMiddleware", "context:ContextMiddleware")
    )
    (state / "lab_glance.py").write_text(APPLICATION)
    manage = [str(venv / "bin" / "glance-manage"), "--config-file", str(state / "glance-api.conf"), "db", "sync"]
    subprocess.run(manage, check=True, capture_output=True, timeout=120)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(directory: Path) -> Iterator[str]:
    """Its address while the context is open. Logs are ``api.log`` and ``out.log`` in ``directory``."""
    venv = _install(directory)
    _configure(venv, directory)
    port = _free_port()
    serve = [str(venv / "bin" / "waitress-serve"), f"--listen=127.0.0.1:{port}", "lab_glance:application"]
    environment = {**os.environ, "OS_GLANCE_CONFIG_DIR": str(directory), "PYTHONPATH": str(directory)}
    with (directory / "out.log").open("w") as log:
        server = subprocess.Popen(serve, env=environment, cwd=directory, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(lambda: _answers(server, url), deadline=60, what="Glance to answer")
            yield url
        finally:
            server.terminate()
            server.wait(20)


def _answers(server: subprocess.Popen[bytes], url: str) -> bool:
    assert server.poll() is None, "Glance ended: see its out.log"
    try:
        with urllib.request.urlopen(f"{url}/v2/images", timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
