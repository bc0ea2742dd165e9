from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker.virt.libvirt.transfer import windows
from compute_worker.virt.libvirt.transfer.windows import Arrived


@given(st.sets(st.integers(0, 200)))
def test_runs_are_the_same_numbers(some: set[int]) -> None:
    runs = windows.runs_of(some)
    assert windows.numbers(runs) == some
    assert all(one[1] + 1 < other[0] for one, other in pairwise(runs))


def test_absurd_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="too many"):
        windows.numbers([(0, 1 << 60)])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    arrived = Arrived(10 << 20, 4 << 20, [(0, 1)])
    windows.write(tmp_path / "j", arrived)
    assert windows.read(tmp_path / "j") == arrived
    assert (arrived.count, arrived.done) == (3, {0, 1})


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"size": "x"}', b"\0\0\0", b'{"size":1,"window":1,"runs":[[-1,2]]}']
)
def test_a_journal_that_cannot_be_believed_is_none(tmp_path: Path, content: bytes) -> None:
    assert windows.read(tmp_path / "j") is None
    (tmp_path / "j").write_bytes(content)
    assert windows.read(tmp_path / "j") is None
