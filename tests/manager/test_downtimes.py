from __future__ import annotations

import pytest

from compute_worker.manager.downtimes import BOUNDS, Downtimes


def test_each_is_counted_in_every_class_that_holds_it() -> None:
    downtimes = Downtimes()
    for seconds in (0.0, 0.05, 0.051, 60.0):
        downtimes.add(seconds)
    counts, total = downtimes.cumulative()
    found = dict(counts)
    assert (found["0.01"], found["0.05"], found["0.1"], found["10.0"], found["+Inf"]) == (1, 2, 3, 3, 4)
    assert total == pytest.approx(60.101) and len(counts) == len(BOUNDS) + 1
