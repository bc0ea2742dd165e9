"""Whether guests run on KVM."""

import os

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.kvm import choose_domain_type, probe_kvm

YES = (True, "/dev/kvm opens")
NO = (False, "/dev/kvm: No such file or directory")
CAPABLE = (True, "libvirt runs kvm guests")
BOTH = frozenset({"kvm", "qemu"})
GUESTS = (64055, 64055)


@pytest.mark.parametrize(
    ("wish", "offered", "device", "capable", "expected", "reason"),
    [
        ("auto", BOTH, YES, CAPABLE, "kvm", "/dev/kvm opens, and libvirt offers kvm"),
        ("kvm", BOTH, YES, CAPABLE, "kvm", "/dev/kvm opens"),
        ("auto", BOTH, NO, CAPABLE, "qemu", "/dev/kvm: No such file or directory; guests are emulated"),
        ("auto", frozenset({"qemu"}), YES, CAPABLE, "qemu", "libvirt does not offer kvm"),
        ("auto", BOTH, YES, (False, "no capabilities for kvm"), "qemu", "no capabilities for kvm"),
        ("qemu", BOTH, YES, CAPABLE, "qemu", "asked for by virt_type"),
        ("auto", frozenset({"test"}), NO, NO, "test", "test driver"),
    ],
)
def test_the_domain_type_is_chosen_with_a_reason(wish, offered, device, capable, expected, reason):
    chosen, why = choose_domain_type(wish, offered, device, capable)
    assert chosen == expected
    assert reason in why


@pytest.mark.parametrize(
    ("wish", "offered", "device", "message"),
    [
        ("kvm", BOTH, NO, "virt_type is kvm, which does not work here: /dev/kvm: No such file"),
        ("kvm", frozenset({"qemu"}), YES, "libvirt does not offer kvm"),
        ("auto", frozenset({"xen"}), YES, "neither kvm nor qemu guests here, only: xen"),
        ("qemu", frozenset(), YES, "only: none"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(wish, offered, device, message):
    with pytest.raises(errors.Broken, match=message):
        choose_domain_type(wish, offered, device, CAPABLE)


@pytest.fixture
def device(tmp_path):
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o666)
    return device


def test_no_device(tmp_path):
    for user in (None, GUESTS):
        assert probe_kvm(user, str(tmp_path / "none")) == (False, f"{tmp_path}/none: No such file or directory")


def test_a_device_that_does_not_work(device, monkeypatch):
    def refuse(path, flags):
        raise OSError(6, "No such device or address")

    monkeypatch.setattr(os, "open", refuse)
    assert probe_kvm(GUESTS, str(device)) == (False, f"{device}: No such device or address")


def test_a_device_that_is_open_to_whom_runs_guests(device):
    found, words = probe_kvm(GUESTS, str(device))
    assert found and words == f"{device} opens, open to user 64055, who runs guests"
    device.chmod(0o600)
    assert probe_kvm((0, 0), str(device))[0], "root runs guests"


def test_a_device_that_is_closed_to_whom_runs_guests(device):
    """libvirt offers kvm, the worker may be root: a guest would not start."""
    device.chmod(0o660)
    found, words = probe_kvm(GUESTS, str(device))
    assert not found
    assert words == (
        f"{device} is closed to user 64055, who runs guests: make it a member of group {device.stat().st_gid}"
    )
    assert probe_kvm((64055, device.stat().st_gid), str(device))[0]


def closed_to_us(monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)


def test_a_device_that_is_closed_to_us_alone(device, monkeypatch):
    closed_to_us(monkeypatch)
    found, words = probe_kvm(GUESTS, str(device))
    assert found and "is there, open to user 64055" in words


def test_nobody_says_who_runs_guests(device, monkeypatch):
    assert probe_kvm(None, str(device)) == (True, f"{device} opens")
    closed_to_us(monkeypatch)
    found, words = probe_kvm(None, str(device))
    assert not found and "libvirt does not say which user" in words
