from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compute_worker.images.summing import BESIDE_BYTES, Sum
from tests.images.support import sha256
from tests.waiting import wait_for


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 1, 1000, BESIDE_BYTES - 1, BESIDE_BYTES, BESIDE_BYTES + 7]), max_size=6))
def test_the_sum_of_all_pieces_whatever_becomes_of_their_buffer(sizes: list[int]) -> None:
    whole, buffer = bytearray(), bytearray(2 * BESIDE_BYTES)
    with Sum() as total:
        for number, size in enumerate(sizes):
            buffer[:size] = bytes([number + 1]) * size
            whole += buffer[:size]
            with total.beside(memoryview(buffer)[:size]):
                pass
    assert total.hexdigest() == sha256(bytes(whole))


def test_what_fails_beside_it_is_not_swallowed_and_its_thread_ends() -> None:
    before = threading.active_count()
    with pytest.raises(OSError, match="full"), Sum() as total, total.beside(bytes(BESIDE_BYTES)):
        raise OSError("full")
    wait_for(lambda: threading.active_count() <= before, what="the thread to end")
