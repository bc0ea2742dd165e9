"""Whether a guest can come by post-copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_worker.virt.libvirt.livemigration_postcopy import problem


@pytest.mark.parametrize(
    ("uid", "allowed", "version", "device", "works"),
    [
        (0, "0", 7_002_000, None, True),
        (None, "0", 7_002_000, None, True),
        (64, "1", 7_002_000, None, True),
        (64, "0", 7_002_000, 0o666, False),
        (64, "0", 8_001_000, 0o666, True),
        (64, "0", 8_001_000, 0o600, False),
        (64, "0", 8_001_000, None, False),
        (64, None, 7_002_000, None, True),
    ],
)
def test_table(
    tmp_path: Path, uid: int | None, allowed: str | None, version: int, device: int | None, works: bool
) -> None:
    if allowed is not None:
        (tmp_path / "sys" / "vm").mkdir(parents=True)
        (tmp_path / "sys" / "vm" / "unprivileged_userfaultfd").write_text(allowed + "\n")
    if device is not None:
        (tmp_path / "userfaultfd").touch()
        (tmp_path / "userfaultfd").chmod(device)
    found = problem(uid, version, tmp_path, tmp_path)
    assert (found == "") is works
    assert works or ("user 64" in found and "unprivileged_userfaultfd" in found)
