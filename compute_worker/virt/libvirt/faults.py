"""libvirt's errors as ours: the one place that knows libvirt's error numbers."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import libvirt

from compute_worker import errors


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked of libvirt, for the message. ``instance`` is empty for a question about the host."""

    doing: str
    host: str
    instance: str = ""

    def sentence(self, exc: BaseException) -> str:
        """What happened in one line."""
        text = " ".join(str(exc).split()) or type(exc).__name__
        return f"{self.doing}: libvirt says: {text}"


# An RPC error is one of the transport, not of the hypervisor: [1/7] "client socket is closed", [38/7] on connecting.
_TRANSPORT_DOMAINS = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})
_TRANSPORT_CODES = frozenset(
    {libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_NO_CONNECT}
)
_NO_ENTRY_CODES = frozenset(
    {
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    }
)


def code_of(exc: BaseException) -> int:
    """libvirt's number for the error; -1 when it has none."""
    return exc.get_error_code() if isinstance(exc, libvirt.libvirtError) else -1


def is_disconnect(exc: BaseException) -> bool:
    """Whether the error is of a connection to some libvirtd: ours, or, in a migration, the other host's."""
    if not isinstance(exc, libvirt.libvirtError):
        return False
    code, domain = exc.get_error_code(), exc.get_error_domain()
    return code in _NO_ENTRY_CODES or (code in _TRANSPORT_CODES and domain in _TRANSPORT_DOMAINS)


def _errno_of(exc: libvirt.libvirtError) -> int:
    return (exc.get_int1() or 0) if code_of(exc) == libvirt.VIR_ERR_SYSTEM_ERROR else 0


def _failed(call: Call, reason: str) -> errors.ComputeError:
    return errors.GuestFailed(instance=call.instance, reason=reason) if call.instance else errors.Broken(reason)


def _not_found(call: Call, reason: str) -> errors.ComputeError:
    return errors.InstanceNotFound(instance=call.instance, host=call.host) if call.instance else errors.NotFound(reason)


def _busy(_: Call, reason: str) -> errors.ComputeError:
    return errors.HypervisorBusy(reason=reason)


def _not_supported(_: Call, reason: str) -> errors.ComputeError:
    return errors.NotSupported(message=f"not supported by this host: {reason}")


def _agent(call: Call, reason: str) -> errors.ComputeError:
    return errors.NotSupported(message=f"instance {call.instance}: its guest agent does not answer: {reason}")


_Build = Callable[[Call, str], errors.ComputeError]

# A guest without an agent is "argument unsupported" (74); one whose agent is silent is "agent unresponsive" (86).
_BY_CODE: Mapping[int, _Build] = {
    libvirt.VIR_ERR_NO_DOMAIN: _not_found,
    libvirt.VIR_ERR_OPERATION_TIMEOUT: _busy,
    libvirt.VIR_ERR_RESOURCE_BUSY: _busy,
    libvirt.VIR_ERR_NO_SUPPORT: _not_supported,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: _not_supported,
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: _not_supported,
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: _agent,
    libvirt.VIR_ERR_AGENT_UNSYNCED: _agent,
    # Newer libvirts tell an agent that took a command and does not answer from one that is silent.
    getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", libvirt.VIR_ERR_AGENT_UNRESPONSIVE): _agent,
    libvirt.VIR_ERR_OPERATION_ABORTED: lambda call, reason: errors.Cancelled(reason),
}

_BY_ERRNO: Mapping[int, _Build] = {
    errno.ENOSPC: lambda call, reason: errors.DiskFull(message=f"no space left on host {call.host}: {reason}"),
    errno.EDQUOT: lambda call, reason: errors.DiskFull(message=f"disk quota reached on host {call.host}: {reason}"),
    errno.EBUSY: _busy,
    errno.EAGAIN: _busy,
    errno.ENOMEM: _busy,
}


def translate(exc: BaseException, call: Call, *, connected: bool = False) -> errors.ComputeError:
    """The error of ours that says what ``exc`` means.

    :param connected: our own connection is known to live, so that a lost one is another host's.
    """
    reason = call.sentence(exc)
    if is_disconnect(exc):
        if connected:
            return _failed(call, reason)
        return errors.HypervisorUnavailable(reason=reason)
    if not isinstance(exc, libvirt.libvirtError):
        return _failed(call, reason)
    build = _BY_ERRNO.get(_errno_of(exc)) or _BY_CODE.get(code_of(exc), _failed)
    return build(call, reason)


@contextmanager
def translated(call: Call, *, connected: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise ours instead of libvirt's. ``connected`` is asked only when the error is one of a connection."""
    try:
        yield
    except libvirt.libvirtError as exc:
        raise translate(exc, call, connected=is_disconnect(exc) and connected()) from exc
