"""What the host brings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.virt.boot import boot_id
from compute_worker.virt.libvirt import resources
from compute_worker.virt.libvirt.resources import Resources, blocked_at, can_direct_io, groups_of, guest_user

CAPABILITIES = """<capabilities><host>
<secmodel><model>apparmor</model><doi>0</doi></secmodel>
<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>{label}</baselabel></secmodel>
</host></capabilities>"""


def test_resources_of_the_host(host: Any, tmp_path: Path) -> None:
    found = Resources(host, tmp_path).get()
    assert (found.vcpus, found.memory_mb, found.hypervisor_type) == (4, 4096, "TEST")
    assert 0 < found.disk_free_gb <= found.disk_gb
    assert found.boot_id == boot_id()
    assert found.cpu_info["domain_type"] == "test"


def test_they_are_asked_again_after_ten_seconds(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(resources.time, "monotonic", lambda: now[0])
    made = Resources(host, tmp_path)
    asked: list[float] = []
    ask = made._ask
    monkeypatch.setattr(made, "_ask", lambda: asked.append(now[0]) or ask())
    for now[0] in (100.0, 105.0, 110.0, 110.5, 120.0):
        made.get()
    assert asked == [100.0, 110.5]


def test_direct_io_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_direct_io(Path("/dev/shm")) in (True, False)
    real = os.open

    def refuses(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    assert can_direct_io(tmp_path) is False
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.Broken, match="nosuch"):
        can_direct_io(tmp_path / "nosuch")


@pytest.mark.parametrize(
    ("label", "user"), [("+64055:+64055", (64055, 64055)), ("+0:+0", (0, 0)), ("libvirt-qemu:kvm", None), ("", None)]
)
def test_the_user_of_guests(label: str, user: tuple[int, int] | None) -> None:
    assert guest_user(CAPABILITIES.format(label=label)) == user


def test_no_security_model_tells_no_user() -> None:
    assert guest_user("<capabilities><host/></capabilities>") is None


def test_who_may_pass(tmp_path: Path) -> None:
    inner = tmp_path / "state" / "instances"
    inner.mkdir(parents=True)
    for directory in (inner, *inner.parents):
        if directory.is_relative_to(tmp_path.parent.parent):
            directory.chmod(0o755)
    me = os.getuid()
    assert blocked_at(inner, 64055, {64055}) is None
    (tmp_path / "state").chmod(0o700)
    assert blocked_at(inner, 64055, {64055}) == tmp_path / "state"
    assert blocked_at(inner, me, set()) is None
    assert blocked_at(inner, 0, set()) is None
    (tmp_path / "state").chmod(0o710)
    assert blocked_at(inner, 64055, {inner.stat().st_gid}) is None
    # The owner's bits count for the owner, also where others may do more.
    (tmp_path / "state").chmod(0o611)
    if me != 0:
        assert blocked_at(inner, me, set()) == tmp_path / "state"


def test_groups_of_a_user_without_an_account() -> None:
    assert groups_of(4_000_000_000, 7) == {7}
    assert 0 in groups_of(0, 0)
