"""Whatever happens in between, the guest is thawed; who cannot be thawed is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.guest import Guest
from compute_worker.virt.libvirt.snapshot.freezing import frozen, thaw
from tests.virt.libvirt.snapshot.fakeguest import FakeGuest
from tests.virt.libvirt.snapshot.support import UUID
from tests.waiting import wait_for


@pytest.fixture
def fake(tmp_path: Path) -> FakeGuest:
    return FakeGuest(UUID, tmp_path / "disk", "raw")


def guest(fake: FakeGuest) -> Guest:
    return cast(Guest, fake)


def test_frozen_within_and_thawed_after(fake: FakeGuest) -> None:
    with frozen(guest(fake), 5) as told:
        assert fake.frozen and not told.thawed
    assert not fake.frozen and told.thawed and told.describe() == "2 file systems were held still"


def test_thawed_when_the_inside_fails(fake: FakeGuest) -> None:
    with pytest.raises(errors.GuestFailed), frozen(guest(fake), 5):
        raise errors.GuestFailed(instance=UUID, reason="no")
    assert not fake.frozen


def test_thawed_when_it_takes_too_long(fake: FakeGuest) -> None:
    with frozen(guest(fake), 0.05) as told:
        wait_for(lambda: not fake.frozen, what="the thaw")
    assert "had to go on" in told.describe() and told.thawed


@pytest.mark.parametrize(("reason", "thaws"), [("QEMU guest agent is not connected", 0), ("no answer in 5 s", 1)])
def test_an_agent_that_does_not_answer(fake: FakeGuest, reason: str, thaws: int) -> None:
    """One that was never there froze nothing; one that fell silent may have."""
    fake.refuse["fs_freeze"] = errors.NotSupported(message=reason)
    with frozen(guest(fake), 5) as told:
        assert reason in told.describe() and told.describe().startswith("as after a power failure")
    assert fake.calls.count("fs_thaw") == thaws and told.thawed


def test_what_somebody_else_froze_is_left_frozen(fake: FakeGuest) -> None:
    fake.refuse["fs_freeze"] = errors.GuestFailed(instance=UUID, reason="the command has been disabled: frozen")
    with frozen(guest(fake), 5) as told:
        assert told.describe().startswith("as after a power failure")
    assert "fs_thaw" not in fake.calls and told.thawed


def test_an_agent_that_hangs_for_good_is_told(fake: FakeGuest) -> None:
    fake.refuse["fs_freeze"] = fake.refuse["fs_thaw"] = errors.NotSupported(message="no answer in 5 s")
    with frozen(guest(fake), 5) as told:
        assert not told.thawed
    assert not told.thawed and not thaw(guest(fake))


def test_not_wanted(fake: FakeGuest) -> None:
    with frozen(guest(fake), 0) as told:
        assert fake.calls == []
    assert "snapshot_freeze_timeout is 0" in told.describe()


def test_a_guest_that_is_gone_has_nothing_frozen(fake: FakeGuest) -> None:
    fake.refuse["fs_thaw"] = errors.InstanceNotFound(instance=UUID, host="node1")
    assert thaw(guest(fake))


def test_no_thread_is_left(fake: FakeGuest) -> None:
    before: Any = threading.active_count()
    with frozen(guest(fake), 60):
        assert threading.active_count() == before + 1
    wait_for(lambda: threading.active_count() == before, what="the timer's end")
