"""``compute-worker --check``: what of this host and configuration would keep the worker from working, in words."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from compute_worker import errors
from compute_worker.config import Settings
from compute_worker.telemetry.redaction import Redactor, passwords_of

Finding = tuple[str, str | None]
"""What was looked at, and what is wrong with it; ``None``: nothing."""

_NEEDED = {"libvirt": ("qemu-img", "mkfs.ext4", "mkswap")}
_OLDEST_SANE = 1_767_225_600.0  # 2026-01-01: a clock before it was never set
_LEAST_FREE_BYTES = 100 << 20


def report(settings: Settings, out: TextIO | None = None) -> int:
    """Print every finding; 0 when nothing is wrong, else 1."""
    from oslo_config import cfg

    redact = Redactor(passwords_of(cfg.CONF.transport_url))
    wrong = 0
    for what, problem in findings(settings):
        wrong += problem is not None
        print(f"{'WRONG' if problem else 'ok':5}  {what}{': ' + redact(problem) if problem else ''}", file=out)
    print(f"{wrong} of these must be mended before compute-worker can work here" if wrong else "all well", file=out)
    return 1 if wrong else 0


def findings(settings: Settings) -> Iterator[Finding]:
    """Look at everything. Changes nothing but for a probe file in each directory, which is removed again."""
    yield "host name", _caught(lambda: host_problem(settings))
    yield f"state directory {settings.compute.state_path}", directory_problem(settings.compute.state_path)
    yield f"instances directory {settings.instances_path}", directory_problem(settings.instances_path)
    yield "clock", clock_problem(settings, time.time())
    for program in _NEEDED.get(settings.compute.compute_driver, ()):
        yield f"program {program}", None if _which(program) else "not found in PATH: install it"
    yield f"driver {settings.compute.compute_driver}", _caught(lambda: driver_problem(settings))
    yield "broker", _caught(lambda: broker_problem(settings))
    yield "durability of commands", _caught(durability_problem)


def _caught(look: Callable[[], str | None]) -> str | None:
    try:
        return look()
    except Exception as exc:
        return str(exc) or type(exc).__name__


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


def host_problem(settings: Settings) -> str | None:
    """Whether the worker's name can be a name on the wire."""
    from compute_worker import objects

    objects.decode(settings.host, objects.HostName, "[compute] host")
    return None


def directory_problem(path: str) -> str | None:
    """Whether this user can write there (its nearest parent, while it is still to be made) and has room."""
    where = Path(path)
    while not where.exists() and where != where.parent:
        where = where.parent
    probe = where / f".compute-worker-check-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(where).free
    except OSError as exc:
        return f"cannot be written by uid {os.getuid()} ({exc.strerror}): change its owner, or the option"
    if free < _LEAST_FREE_BYTES:
        return f"only {free >> 20} MiB are free: make room"
    return None


def clock_problem(settings: Settings, now: float) -> str | None:
    """Whether time goes forward: commands expire and keys are kept by this host's clock."""
    if now < _OLDEST_SANE:
        return f"it says {time.strftime('%Y-%m-%d', time.gmtime(now))}: set it"
    journal = Path(settings.compute.state_path) / "journal.sqlite"
    if not journal.exists():
        return None
    try:
        database = sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=5)
        newest = database.execute("SELECT max(updated_at) FROM operations").fetchone()[0]
        database.close()
    except sqlite3.Error as exc:
        return f"cannot be compared with the journal: {exc}"
    if newest is not None and newest > now + 60:
        return f"it is {newest - now:.0f} s behind the newest entry of the journal: set it"
    return None


def driver_problem(settings: Settings) -> str | None:
    """Whether the driver loads and the hypervisor answers."""
    from compute_worker.worker import load_driver

    driver = load_driver(settings)
    try:
        driver.init_host(settings.host)
        deadline = time.monotonic() + 10
        while True:
            try:
                driver.get_available_resource()
                return None
            except errors.Retryable as exc:
                if time.monotonic() > deadline:
                    return str(exc)
                time.sleep(0.2)
    finally:
        driver.cleanup_host()


def broker_problem(settings: Settings) -> str | None:
    """Whether the broker lets this worker in."""
    from compute_worker.rpc.transport import get_transport, open_listening

    transport = get_transport(exchange=settings.rpc.exchange)
    open_listening(transport).close()
    return None


def durability_problem() -> str | None:
    """Whether accepted casts outlive the broker."""
    from compute_worker.rpc.transport import durability, get_transport, tls_problem

    transport = get_transport()
    durable, reason = durability(transport)
    return tls_problem(transport) if durable else reason
