from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.transfer import tls


def test_what_is_missing_is_named(tmp_path: Path, pki: str) -> None:
    assert tls.problem("", "server") == "transfer.tls_dir is empty"
    assert "ca-cert.pem is missing" in (tls.problem(str(tmp_path), "client") or "")
    shutil.copy(Path(pki) / "ca-cert.pem", tmp_path)
    assert "server-cert.pem is missing" in (tls.problem(str(tmp_path), "server") or "")
    assert tls.problem(pki, "server") is None and tls.problem(pki, "client") is None


def test_a_client_checks_names_and_wants_a_certificate(pki: str) -> None:
    context = tls.client_context(pki)
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_a_key_of_another_certificate(tmp_path: Path, certificates: Callable[[str, str], str]) -> None:
    one, other = Path(certificates("localhost", "ca")), Path(certificates("elsewhere", "ca"))
    for path in (one / "ca-cert.pem", one / "client-cert.pem", other / "client-key.pem"):
        shutil.copy(path, tmp_path)
    with pytest.raises(errors.Broken, match=r"transfer\.tls_dir"):
        tls.client_context(str(tmp_path))


def test_a_comma_in_the_directory_is_no_option() -> None:
    assert "dir=/a,,verify-peer=no,endpoint" in tls.server_options("/a,verify-peer=no")[1]
