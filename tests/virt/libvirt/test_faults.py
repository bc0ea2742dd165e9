"""libvirt's errors as ours."""

import errno

import libvirt
import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.faults import Call, is_disconnect, translate, translated

CALL = Call(doing="starting the guest", host="node1", instance="u-1")


def error(code, domain=libvirt.VIR_FROM_QEMU, message="words", int1=-1):
    exc = libvirt.libvirtError("")
    exc.err = (code, domain, message, 2, "", None, None, int1, -1)
    exc.args = (message,)
    return exc


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (error(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC), errors.HypervisorUnavailable),
        (error(libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC), errors.HypervisorUnavailable),
        (error(libvirt.VIR_ERR_RPC, libvirt.VIR_FROM_REMOTE), errors.HypervisorUnavailable),
        (error(libvirt.VIR_ERR_INVALID_CONN, libvirt.VIR_FROM_NONE), errors.HypervisorUnavailable),
        (error(libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_FROM_REMOTE), errors.HypervisorUnavailable),
        (error(libvirt.VIR_ERR_AUTH_UNAVAILABLE, libvirt.VIR_FROM_REMOTE), errors.HypervisorUnavailable),
        (error(libvirt.VIR_ERR_NO_DOMAIN), errors.InstanceNotFound),
        (error(libvirt.VIR_ERR_OPERATION_TIMEOUT), errors.HypervisorBusy),
        (error(libvirt.VIR_ERR_RESOURCE_BUSY), errors.HypervisorBusy),
        (error(libvirt.VIR_ERR_SYSTEM_ERROR, int1=errno.EBUSY), errors.HypervisorBusy),
        (error(libvirt.VIR_ERR_SYSTEM_ERROR, int1=errno.ENOSPC), errors.DiskFull),
        (error(libvirt.VIR_ERR_SYSTEM_ERROR, int1=errno.ENOENT), errors.GuestFailed),
        (error(libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_FROM_DOMAIN), errors.NotSupported),
        (error(libvirt.VIR_ERR_OPERATION_UNSUPPORTED), errors.NotSupported),
        (error(libvirt.VIR_ERR_AGENT_UNRESPONSIVE), errors.NotSupported),
        (error(libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED), errors.NotSupported),
        (error(libvirt.VIR_ERR_OPERATION_ABORTED), errors.Cancelled),
        (error(libvirt.VIR_ERR_INTERNAL_ERROR), errors.GuestFailed),
        (error(libvirt.VIR_ERR_OPERATION_INVALID), errors.GuestFailed),
        (error(libvirt.VIR_ERR_CONFIG_UNSUPPORTED), errors.GuestFailed),
        (error(libvirt.VIR_ERR_XML_INVALID_SCHEMA), errors.GuestFailed),
        (libvirt.libvirtError(""), errors.GuestFailed),
    ],
)  # fmt: skip
def test_each_error_has_one_meaning(exc, expected):
    assert type(translate(exc, CALL)) is expected


def test_the_message_says_what_was_tried_and_what_libvirt_said_on_one_line():
    told = translate(error(libvirt.VIR_ERR_INTERNAL_ERROR, message="qemu\n  died:\tbad disk"), CALL)
    assert str(told) == "instance u-1: starting the guest: libvirt says: qemu died: bad disk"
    assert told.kwargs == {"instance": "u-1", "reason": "starting the guest: libvirt says: qemu died: bad disk"}


def test_without_an_instance_nothing_is_said_of_one():
    call = Call(doing="listing the guests", host="node1")
    assert str(translate(error(libvirt.VIR_ERR_INTERNAL_ERROR), call)) == "listing the guests: libvirt says: words"
    assert type(translate(error(libvirt.VIR_ERR_INTERNAL_ERROR), call)) is errors.Broken
    assert type(translate(error(libvirt.VIR_ERR_NO_DOMAIN), call)) is errors.NotFound


def test_a_lost_connection_of_the_other_host_is_not_ours():
    lost = error(libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, "client socket is closed")
    assert is_disconnect(lost)
    assert type(translate(lost, CALL, connected=True)) is errors.GuestFailed
    asked = []
    with pytest.raises(errors.GuestFailed), translated(CALL, connected=lambda: not asked.append(1)):
        raise lost
    assert asked == [1]


def test_the_connection_is_not_asked_about_other_errors():
    def fail():
        raise AssertionError("asked")

    with pytest.raises(errors.HypervisorBusy), translated(CALL, connected=fail):
        raise error(libvirt.VIR_ERR_OPERATION_TIMEOUT)


def test_other_exceptions_pass():
    with pytest.raises(ZeroDivisionError), translated(CALL):
        raise ZeroDivisionError
    assert not is_disconnect(ValueError())
    assert type(translate(ValueError("x"), CALL)) is errors.GuestFailed
