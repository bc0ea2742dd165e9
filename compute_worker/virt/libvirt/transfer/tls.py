"""Certificates for disks on the way, in the layout of QEMU's ``/etc/pki/qemu``.

Both ends prove themselves: the server's certificate must carry the name of the host it is, and the client's must be
signed by the same authority (``ca-cert.pem``; revoked ones in ``ca-crl.pem`` where there is one).
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from compute_worker import errors

AUTHORITY = "ca-cert.pem"
REVOKED = "ca-crl.pem"


def problem(tls_dir: str, role: str) -> str | None:
    """What keeps this host from being ``server`` or ``client``; ``None``: nothing."""
    if not tls_dir:
        return "transfer.tls_dir is empty"
    for name in (AUTHORITY, f"{role}-cert.pem", f"{role}-key.pem"):
        path = Path(tls_dir) / name
        if not os.access(path, os.R_OK):
            try:
                there = path.exists()
            except OSError:
                there = True
            return f"{path} {'cannot be read by this worker' if there else 'is missing'}"
    return None


def client_context(tls_dir: str) -> ssl.SSLContext:
    """What a client verifies servers with and shows them.

    :raises compute_worker.errors.Broken: a file is not a certificate or key, or they do not belong together.
    """
    directory = Path(tls_dir)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(directory / AUTHORITY)
        if (directory / REVOKED).exists():
            context.load_verify_locations(directory / REVOKED)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    except (OSError, ssl.SSLError) as exc:
        raise errors.Broken(f"certificates in {directory} (transfer.tls_dir) cannot be used: {exc}") from None
    return context


def server_options(tls_dir: str) -> list[str]:
    """Options of ``qemu-nbd`` that make it a server which lets in only whom the authority has signed."""
    # QEMU's option syntax doubles a comma that is meant.
    escaped = tls_dir.replace(",", ",,")
    return [
        "--object",
        f"tls-creds-x509,id=tls0,dir={escaped},endpoint=server,verify-peer=yes",
        "--tls-creds=tls0",
    ]
