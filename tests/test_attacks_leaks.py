"""Secrets of tenants and of the broker: in none of the places where an operator, a log collector or a caller looks.

CVE-2014-7230 and 7231 (passwords in logs), CVE-2017-7214 (in notifications of errors), CVE-2019-14433 (in faults).
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from compute_worker import errors, logcontext
from compute_worker.ctl.connect import Client
from compute_worker.operations.database import Tx
from compute_worker.telemetry.logs import JsonFormatter, TextFormatter
from compute_worker.telemetry.metrics import Metrics
from compute_worker.telemetry.redaction import Redactor
from compute_worker.telemetry.service import Snapshot, _of_journal, _OfWorker
from tests.badinput.cell import WatchedCell, new_uuid, plain
from tests.ctl.cell import Result, run
from tests.waiting import wait_for

PASSWORD = "Xyzzy-Plugh-31415"
CONTENT = "-----BEGIN PRIVATE KEY----- 27182"
USER_DATA = "cloud-config-secret-16180"
ENCODED = base64.b64encode(CONTENT.encode()).decode()
SECRETS = (PASSWORD, CONTENT, ENCODED, USER_DATA)
BUILD = "build_and_run_instance"


def full(**changes: Any) -> dict[str, Any]:
    """A build that carries every kind of secret."""
    instance = plain(new_uuid(), user_data=USER_DATA, config_drive=True)
    files = [{"path": "/etc/key", "content_base64": ENCODED}]
    whole = {"instance": instance, "admin_password": PASSWORD, "injected_files": files, "operation": new_uuid()}
    return {**whole, **changes}


REFUSED = {
    "password is a list": full(admin_password=[PASSWORD]),
    "password is an object": full(admin_password={PASSWORD: PASSWORD}),
    "password is too long": full(admin_password=PASSWORD * 5000),
    "another name": full(adminPass=PASSWORD),
    "a name in the instance": full(instance=plain(new_uuid(), user_data=[USER_DATA], adminPass=PASSWORD)),
    "file is text": full(injected_files=CONTENT),
    "files are text": full(injected_files=[CONTENT]),
    "content is no base64": full(injected_files=[{"path": "/etc/key", "content_base64": CONTENT}]),
    "content is an object": full(injected_files=[{"path": "/etc/key", "content_base64": {"a": CONTENT}}]),
    "no path": full(injected_files=[{"content_base64": ENCODED}]),
    "user data is an object": full(instance=plain(new_uuid(), user_data={USER_DATA: USER_DATA})),
    "too much": full(admin_password=PASSWORD + "x" * 2_000_000),
    "no room": full(instance=plain(new_uuid(), user_data=USER_DATA, flavor={"vcpus": 1000, "memory_mb": 64})),
    "expired": full(expires_at=1),
}
FAILING: dict[str, BaseException | None] = {
    "well": None,
    "disk full": errors.DiskFull(path="/x"),
    "unexpected": KeyError("disk"),
}


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedCell]:
    with WatchedCell(tmp_path_factory.mktemp("leaks"), "leaks1", "leaks2") as made:
        yield made


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """Everything that is logged at debug level, as a worker writes it. Its redactor knows none of the secrets."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    redact = Redactor()
    handler.setFormatter(JsonFormatter(redact, "leaks1") if request.param == "json" else TextFormatter(redact))
    logcontext.install([handler])
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)


def told(cell: WatchedCell) -> str:
    """Everything that can be asked of the worker, or that it sends by itself."""
    worker = cell.workers[cell.here]
    operations = cell.api.list_operations(host=cell.here)
    each = [cell.api.get_operation(o.uuid, host=cell.here) for o in operations]
    observed = _OfWorker(worker)
    metrics = Metrics(lambda: Snapshot(host=observed.host_state(), **_of_journal(observed.database)), "1")
    parts = [
        msgspec.json.encode([operations, each, cell.api.get_host_state(host=cell.here)]).decode(),
        json.dumps(cell.heard.seen),
        metrics.text()[0].decode(),
        *(i.fault or "" for i in cell.api.list_instances(0, host=cell.here)),
        *(ctl(cell, "explain", o.uuid, "--host", cell.here).out for o in operations[-3:]),
        ctl(cell, "operations", "--host", cell.here).out,
        ctl(cell, "operations", "--host", cell.here, "--json").out,
    ]
    return "\n".join(parts)


def ctl(cell: WatchedCell, *argv: str) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code = run(argv, lambda args: Client(cell.api, cell.transport, cell.exchange, 0.2), out, err)
    assert code == 0, err.getvalue()
    return Result(int(code), out.getvalue(), err.getvalue())


def clean(text: str) -> None:
    for secret in SECRETS:
        at = text.find(secret)
        assert at < 0, f"{secret} is told: ...{text[max(0, at - 200) : at + 60]}..."


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_repeats_no_secret(cell: WatchedCell, name: str, log: io.StringIO) -> None:
    args = {**REFUSED[name], "operation": new_uuid()}
    with pytest.raises(errors.Refused) as caught:
        cell.call(BUILD, args)
    clean(f"{caught.value.message} {caught.value.kwargs}")
    cell.cast(BUILD, args)
    cell.recorded(args["operation"])
    wait_for(lambda: cell.heard.of(args["operation"]), what="the notification")
    cell.settle()
    clean(told(cell))
    assert "is refused" in log.getvalue()
    clean(log.getvalue())


@pytest.mark.parametrize("name", FAILING)
def test_an_operation_tells_no_secret(cell: WatchedCell, name: str, log: io.StringIO) -> None:
    args = full()
    stall = cell.simulated().faults.stall("fetch_images")
    error = FAILING[name]
    if error is not None:
        cell.simulated().faults.fail("start", error)
    cell.cast(BUILD, args)
    assert stall.entered.wait(10)
    clean(told(cell))
    stall.release()
    ended = cell.api.get_operation(args["operation"], 20, host=cell.here)
    assert ended.state.final and (ended.error is None) is (error is None)
    wait_for(lambda: len(cell.heard.of(args["operation"])) == 2, what="the last notification")
    clean(told(cell))
    assert args["operation"] in log.getvalue()
    clean(log.getvalue())


@pytest.mark.parametrize("name", FAILING)
def test_secrets_leave_the_journal_with_their_operation(cell: WatchedCell, name: str) -> None:
    args = full()
    error = FAILING[name]
    if error is not None:
        cell.simulated().faults.fail("start", error)
    cell.call(BUILD, args)
    assert cell.api.get_operation(args["operation"], 20, host=cell.here).state.final

    def stored(tx: Tx) -> str:
        rows = tx.execute("SELECT args, error, result FROM operations WHERE uuid = ?", (args["operation"],)).fetchall()
        outbox = tx.execute("SELECT payload FROM outbox").fetchall()
        inbox = tx.execute("SELECT body FROM inbox").fetchall()
        return str([tuple(row) for row in (*rows, *outbox, *inbox)])

    said = cell.workers[cell.here].manager.database.read(stored)
    assert args["instance"]["uuid"] in said
    for secret in (PASSWORD, CONTENT, ENCODED):
        assert secret not in said
    # Also without them the same command is known again.
    assert cell.call(BUILD, args)["repeated"]
    with pytest.raises(errors.OperationConflict) as caught:
        cell.call(BUILD, {**args, "admin_password": "another"})
    clean(caught.value.message)
