from __future__ import annotations

import base64
import shutil
import ssl
import subprocess
from collections.abc import Callable
from decimal import Decimal, localcontext
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


def loaded(directory: str) -> str:
    """What QEMU says of the parameters that it loads for a server with this directory; empty: it needs none."""
    _, credentials, _ = tls.server_options(directory)
    words = ["qemu-img", "--trace", "qcrypto_tls_creds_load_dh", "info", "-f", "raw", "--object", credentials]
    done = subprocess.run([*words, __file__], capture_output=True, text=True, timeout=60, check=True)
    return next((line for line in (done.stdout + done.stderr).splitlines() if "load_dh" in line), "")


def test_qemu_need_not_make_parameters(tmp_path: Path, pki: str) -> None:
    makes_them = "<generated>" in loaded(pki)
    for _ in range(2):
        own = tls.server_directory(pki, tmp_path / "a,b")
        assert own == str(tmp_path / "a,b")
        assert loaded(own).endswith(f"filename={own}/dh-params.pem") or not makes_them
    assert (tmp_path / "a,b").stat().st_mode & 0o777 == 0o700


def test_it_follows_the_directory(tmp_path: Path, certificates: Callable[[str, str], str]) -> None:
    """Certificates that are renewed count at once, and another directory after a restart."""
    one, other = certificates("localhost", "ca"), certificates("elsewhere", "ca")
    own = Path(tls.server_directory(one, tmp_path / "own"))
    (own / tls.PARAMETERS).write_text("torn by a power failure")
    assert Path(tls.server_directory(other, own)) == own
    assert (own / "server-key.pem").readlink() == Path(other) / "server-key.pem"
    assert (own / tls.PARAMETERS).read_text() == tls.FFDHE3072
    assert not (own / tls.REVOKED).exists() and (own / tls.REVOKED).is_symlink(), "nobody is revoked, so far"


def test_parameters_of_the_operator_come_first(tmp_path: Path) -> None:
    (tmp_path / tls.PARAMETERS).write_text("theirs")
    assert tls.server_directory(str(tmp_path), tmp_path / "own") == str(tmp_path)
    assert not (tmp_path / "own").exists()


def test_a_directory_that_cannot_be_made_is_done_without(tmp_path: Path, pki: str) -> None:
    assert tls.server_directory(pki, tmp_path / "missing" / "own") == pki


def test_the_group_is_the_one_of_the_rfc() -> None:
    """p = 2^3072 - 2^3008 + ([2^2942 * e] + 2625351) * 2^64 - 1, and g = 2."""
    with localcontext() as context:
        context.prec = 1000
        p = 2**3072 - 2**3008 + (int(Decimal(2) ** 2942 * Decimal(1).exp()) + 2625351) * 2**64 - 1
    told = base64.b64decode("".join(tls.FFDHE3072.splitlines()[1:-1]))
    assert told[4:8] == b"\x02\x82\x01\x81" and int.from_bytes(told[8:393], "big") == p
    assert told[393:396] == b"\x02\x01\x02"
