"""The account of guests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute_worker.virt.libvirt.accounts import blocked_at, groups_of, guest_user, may

CAPABILITIES = """<capabilities><host>
<secmodel><model>apparmor</model><doi>0</doi></secmodel>
<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>{label}</baselabel></secmodel>
</host></capabilities>"""


@pytest.mark.parametrize(
    ("label", "user"), [("+64055:+64055", (64055, 64055)), ("+0:+0", (0, 0)), ("libvirt-qemu:kvm", None), ("", None)]
)
def test_the_user_of_guests(label: str, user: tuple[int, int] | None) -> None:
    assert guest_user(CAPABILITIES.format(label=label)) == user


def test_no_security_model_tells_no_user() -> None:
    assert guest_user("<capabilities><host/></capabilities>") is None


@pytest.fixture
def open_path() -> Iterator[Path]:
    """pytest's own directories are closed to other users."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_who_may_pass(open_path: Path) -> None:
    state = open_path / "state"
    inner = state / "instances"
    inner.mkdir(parents=True)
    for directory in (state, inner):
        directory.chmod(0o755)
    me = os.getuid()
    assert blocked_at(inner, 64055, {64055}) is None
    state.chmod(0o700)
    assert blocked_at(inner, 64055, {64055}) == state
    assert blocked_at(inner, me, set()) is None
    assert blocked_at(inner, 0, set()) is None
    state.chmod(0o710)
    assert blocked_at(inner, 64055, {inner.stat().st_gid}) is None
    # The owner's bits count for the owner, also where others may do more.
    state.chmod(0o611)
    if me != 0:
        assert blocked_at(inner, me, set()) == state


def test_groups_of_a_user_without_an_account() -> None:
    assert groups_of(4_000_000_000, 7) == {7}
    assert 0 in groups_of(0, 0)


@pytest.mark.parametrize(
    ("mode", "uid", "gids", "allowed"),
    [
        (0o600, 7, (), False),
        (0o666, 7, (), True),
        (0o660, 7, (), False),
        (0o640, 7, (None,), False),
        (0o600, 0, (), True),
    ],
)
def test_who_may_read_and_write(
    tmp_path: Path, mode: int, uid: int, gids: tuple[int | None, ...], allowed: bool
) -> None:
    device = tmp_path / "device"
    device.touch()
    device.chmod(mode)
    found = device.stat()
    assert may(6, found, uid, [found.st_gid if gid is None else gid for gid in gids]) is allowed
    device.chmod(0o660)
    assert may(6, device.stat(), 7, [found.st_gid])
