from __future__ import annotations

import threading
import time

from compute_worker.virt.libvirt.transfer.pace import Pace
from tests.virt.jobs import in_thread


def test_no_limit_does_not_wait() -> None:
    stop, begin = threading.Event(), time.monotonic()
    for _ in range(1000):
        Pace(0).take(1 << 30, stop)
    assert time.monotonic() - begin < 1


def test_threads_share_the_limit() -> None:
    pace, stop, begin = Pace(1000), threading.Event(), time.monotonic()
    threads = [in_thread(lambda: [pace.take(100, stop) for _ in range(3)])[0] for _ in range(2)]
    for thread in threads:
        thread.join(5)
    # The first goes at once, the sixth when five have had their time.
    assert 0.45 < time.monotonic() - begin < 4


def test_stop_ends_the_wait() -> None:
    pace, stop = Pace(1), threading.Event()
    pace.take(1000, stop)
    thread, raised = in_thread(pace.take, 1, stop)
    stop.set()
    thread.join(5)
    assert not thread.is_alive() and raised == []
