"""Log lines: their form, their context, and what is not in them."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from compute_worker import logcontext
from compute_worker.telemetry import logs
from compute_worker.telemetry.redaction import Redactor

SECRET = "s3cr3t-Pa55"


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    logger = logging.Logger("compute_worker.test")
    logger.addHandler(logging.StreamHandler(stream))
    yield logger, stream


def fail_with_secret() -> None:
    raise OSError(f"amqp://cw:{SECRET}@broker refused")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_neither_message_nor_argument_nor_traceback_shows_a_secret(
    written: tuple[logging.Logger, io.StringIO], log_format: str
) -> None:
    logger, stream = written
    logs.dress(logger, log_format, "node1", Redactor([SECRET]))
    logger.info("got %s", {"admin_password": "other-secret", "name": "n"})
    try:
        fail_with_secret()
    except OSError:
        logger.exception("cannot reach %s with %s", f"amqp://cw:{SECRET}@broker", SECRET)
    text = stream.getvalue()
    assert SECRET not in text
    assert "other-secret" not in text
    assert "fail_with_secret" in text


def test_a_json_line_has_context_and_is_one_line(written: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = written
    logs.dress(logger, "json", "node1", Redactor())
    with logcontext.bound(request_id="req-1", operation="op-1", instance="i-1"):
        logger.warning("first\nsecond")
    (line,) = stream.getvalue().splitlines()
    said = json.loads(line)
    assert (said["request_id"], said["operation"], said["instance"]) == ("req-1", "op-1", "i-1")
    assert (said["level"], said["message"], said["host"]) == ("WARNING", "first\nsecond", "node1")
    assert said["time"].endswith("Z")


def test_a_text_line_has_context_and_cannot_be_forged(written: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = written
    logs.dress(logger, "text", "node1", Redactor())
    with logcontext.bound(request_id="req-1", operation="op-1"):
        logger.info("name is %s", "a\n2026-01-01 00:00:00.000 1 CRITICAL forged\x1b[2J")
    (line,) = stream.getvalue().splitlines()
    assert "[req-1 op=op-1]" in line
    assert "a\\n2026" in line
    assert "\\x1b[2J" in line


def test_arguments_that_do_not_fit_do_not_lose_the_line(written: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = written
    logs.dress(logger, "text", "node1", Redactor())
    logger.info("%d guests", "many")
    assert "%d guests (its arguments do not fit" in stream.getvalue()


def test_setup_dresses_what_oslo_log_opened(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, sys.excepthook, threading.excepthook)
    conf = cfg.ConfigOpts()
    logs.register(conf)
    conf(["--log-file", str(tmp_path / "worker.log")], project="compute-worker", default_config_files=[])
    try:
        logs.setup(conf, "json", "node1", Redactor([SECRET]))
        logging.getLogger("compute_worker.x").info("with %s", SECRET)
        broken = threading.Thread(target=fail_with_secret, name="broken")
        broken.start()
        broken.join()
        lines = [json.loads(line) for line in (tmp_path / "worker.log").read_text().splitlines()]
    finally:
        for handler in set(root.handlers) - set(before[0]):
            handler.close()
        root.handlers[:], root.level, sys.excepthook, threading.excepthook = before
    assert [(said["level"], said["message"]) for said in lines] == [
        ("INFO", "with ***"),
        ("CRITICAL", "thread broken died"),
    ]
    assert SECRET not in json.dumps(lines)
