"""Whether a guest goes by TLS: decided by both hosts together, never silently plain where one asks for TLS."""

from __future__ import annotations

from pathlib import Path

from compute_worker.config import Settings
from compute_worker.errors import NotSupported

_AUTHORITY = "ca-cert.pem"


def missing(tls_dir: str, role: str) -> str:
    """The certificate file that keeps this host's hypervisor from being ``server`` or ``client``; empty: none does.

    The files are the hypervisor's to read, not the worker's: one in a directory that this worker may not look into
    counts as there, and a hypervisor that lacks it refuses by itself.
    """
    for name in (_AUTHORITY, f"{role}-cert.pem", f"{role}-key.pem"):
        path = Path(tls_dir) / name
        try:
            path.lstat()
        except FileNotFoundError:
            return str(path)
        except PermissionError:
            continue
        except OSError:
            return str(path)
    return ""


def offered(settings: Settings) -> bool:
    """Destination: whether guests come here by TLS.

    :raises NotSupported: they must (``live_migration.tls``), and a certificate is missing.
    """
    return _agreed(settings, "server", True)


def agreed(settings: Settings, offer: bool) -> bool:
    """Source: whether a guest goes by TLS to a destination that offers it, or does not.

    :raises NotSupported: it must, and cannot.
    """
    return _agreed(settings, "client", offer)


def demand(settings: Settings, native_tls: bool) -> None:
    """Destination, once more when the source has decided.

    :raises NotSupported: guests must come by TLS here, and this one does not.
    """
    if settings.live_migration.tls == "required" and not native_tls:
        raise NotSupported(
            f"host {settings.host} takes guests by TLS alone (live_migration.tls = required), and the source does not "
            "send it so: give the source certificates, or allow it there"
        )


def _agreed(settings: Settings, role: str, offer: bool) -> bool:
    wish, lacking = settings.live_migration.tls, missing(settings.transfer.tls_dir, role)
    if wish == "never":
        return False
    if wish == "required" and (lacking or not offer):
        why = f"{lacking} is missing" if lacking else "the destination does not offer it"
        raise NotSupported(
            f"host {settings.host} moves guests by TLS alone (live_migration.tls = required), and cannot: {why}"
        )
    return offer and not lacking
