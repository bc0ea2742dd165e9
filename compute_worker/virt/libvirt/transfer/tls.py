"""Certificates for disks on the way, in the layout of QEMU's ``/etc/pki/qemu``.

Both ends prove themselves: the server's certificate must carry the name of the host it is, and the client's must be
signed by the same authority (``ca-cert.pem``; revoked ones in ``ca-crl.pem`` where there is one).
"""

from __future__ import annotations

import logging
import os
import ssl
from contextlib import suppress
from pathlib import Path

from compute_worker import errors
from compute_worker.images import files

LOG = logging.getLogger(__name__)
AUTHORITY = "ca-cert.pem"
REVOKED = "ca-crl.pem"
PARAMETERS = "dh-params.pem"
_SERVER = (AUTHORITY, REVOKED, "server-cert.pem", "server-key.pem")
FFDHE3072 = """\
-----BEGIN DH PARAMETERS-----
MIIBjAKCAYEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEfz9zeNVs7ZRkDW7w09N75nAI4YbRvydbmyQd62R0mkff3
7lmMsPrBhtkcrv4TCYUTknC0EwyTvEN5RPT9RFLi103TZPLiHnH1S/9croKrnJ32
nuhtK8UiNjoNq8Uhl5sN6todv5pC1cRITgq80Gv6U93vPBsg7j/VnXwl5B0rZsYu
N///////////AgECAgIBFA==
-----END DH PARAMETERS-----
"""
"""RFC 7919, appendix A.2: a group made for everybody to use."""


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


def server_directory(tls_dir: str, own: Path) -> str:
    """The directory that a ``qemu-nbd`` is to read: ``tls_dir`` where it has parameters for Diffie-Hellman, else
    ``own``, which is made and holds links to the files there, and parameters.

    QEMU (seen with 7.2) makes parameters at each start where it finds none, and lets nobody in meanwhile: 0.4 to 3 s of
    a guest's downtime. Where ``own`` cannot be written it is right, and slow, to do without.
    """
    theirs = Path(tls_dir).absolute()
    if (theirs / PARAMETERS).exists():
        return tls_dir
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        for name in _SERVER:
            _link(own / name, theirs / name)
        parameters = own / PARAMETERS
        if not parameters.exists() or parameters.read_text() != FFDHE3072:
            files.write_atomic(parameters, FFDHE3072.encode())
    except (OSError, errors.ComputeError) as exc:
        LOG.warning("%s cannot be made (%s): connections to this host begin slowly", own, exc)
        return tls_dir
    return str(own)


def _link(path: Path, target: Path) -> None:
    with suppress(OSError):
        if path.readlink() == target:
            return
    made = path.with_name(f"{path.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    made.symlink_to(target)
    made.replace(path)


def server_options(directory: str) -> list[str]:
    """Options of ``qemu-nbd`` that make it a server which lets in only whom the authority has signed.

    :param directory: as :func:`server_directory` tells.
    """
    # QEMU's option syntax doubles a comma that is meant.
    escaped = directory.replace(",", ",,")
    return [
        "--object",
        f"tls-creds-x509,id=tls0,dir={escaped},endpoint=server,verify-peer=yes",
        "--tls-creds=tls0",
    ]
