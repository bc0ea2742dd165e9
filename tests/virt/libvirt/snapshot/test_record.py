from __future__ import annotations

from pathlib import Path

import pytest

from compute_worker.virt.libvirt.snapshot import record
from compute_worker.virt.libvirt.snapshot.decision import Method
from compute_worker.virt.libvirt.snapshot.record import DIRECTORY, Held, Last


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    (tmp_path / DIRECTORY).mkdir()
    held = Held(image="i", origin="o", method=Method.SAVED, thawed=False, size_bytes=7)
    last = Last(image="i", origin="o", store="file", disk_format="raw", token="snapshot-1")
    record.keep(tmp_path, held)
    record.keep_last(tmp_path, last)
    assert (record.held(tmp_path), record.last(tmp_path)) == (held, last)
    record.forget_last(tmp_path)
    record.forget_last(tmp_path)
    assert record.last(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"image": 1}', b'{"image": "i", "origin": "o", "method": "magic"}'])
def test_what_cannot_be_believed_is_not_there(tmp_path: Path, content: bytes) -> None:
    assert record.held(tmp_path) is None and record.last(tmp_path) is None
    (tmp_path / DIRECTORY).mkdir()
    (tmp_path / DIRECTORY / "snapshot.json").write_bytes(content)
    (tmp_path / "snapshots.json").write_bytes(content)
    assert record.held(tmp_path) is None and record.last(tmp_path) is None
