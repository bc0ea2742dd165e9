from __future__ import annotations

import logging
import threading

from compute_worker import logcontext


def record(**extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": "x", **extra})
    assert logcontext.ContextFilter().filter(made)
    return made


def test_outside_of_any_request_there_is_nothing_to_say() -> None:
    made = record()
    assert (made.request_id, made.operation, made.instance, made.about) == ("-", "-", "-", "-")


def test_inner_blocks_add_and_are_undone() -> None:
    with logcontext.bound(request_id="req-1"):
        with logcontext.bound(operation="o", instance="i"):
            assert record().about == "req-1 op=o instance=i"
        assert record().about == "req-1"
    assert logcontext.current() == logcontext.LogContext()


def test_a_block_that_fails_is_undone_too() -> None:
    try:
        with logcontext.bound(request_id="req-1"):
            raise ValueError
    except ValueError:
        assert logcontext.current().request_id is None


def test_threads_do_not_see_each_other() -> None:
    seen: list[str | None] = []
    with logcontext.bound(request_id="req-1"):
        thread = threading.Thread(target=lambda: seen.append(logcontext.current().request_id))
        thread.start()
        thread.join()
    assert seen == [None]


def test_what_the_caller_sets_wins() -> None:
    with logcontext.bound(instance="bound"):
        assert record(instance="given").instance == "given"


def test_install_adds_one_filter_however_often() -> None:
    handler = logging.NullHandler()
    logcontext.install([handler])
    logcontext.install([handler])
    assert len(handler.filters) == 1


def test_request_ids_differ() -> None:
    assert logcontext.new_request_id() != logcontext.new_request_id()
