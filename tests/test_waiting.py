"""wait_for: a value, a deadline, a name."""

from __future__ import annotations

import time

import pytest

from tests.waiting import wait_for


def test_returns_the_first_true_value() -> None:
    values = iter([0, "", None, "there"])
    assert wait_for(lambda: next(values)) == "there"


def test_names_what_it_waited_for_and_what_it_saw() -> None:
    with pytest.raises(AssertionError, match=r"0\.1 s for the tide; last seen: 'ebb'"):
        wait_for(lambda: "" if time.monotonic() < 0 else _Ebb(), 0.1, "the tide")


class _Ebb:
    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "'ebb'"


def test_asks_at_least_once_even_without_time() -> None:
    assert wait_for(lambda: True, 0) is True


def test_errors_of_the_predicate_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 // 0, 5)
