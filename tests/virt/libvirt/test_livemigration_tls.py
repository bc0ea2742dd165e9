"""Whether a guest goes by TLS."""

from __future__ import annotations

from pathlib import Path

import pytest

from compute_worker.config import LiveMigration, Settings, Transfer
from compute_worker.errors import NotSupported
from compute_worker.virt.libvirt import livemigration_tls


def settings(tmp_path: Path, wish: str, *roles: str) -> Settings:
    directory = tmp_path / ("-".join(roles) or "none")
    directory.mkdir(exist_ok=True)
    for role in roles:
        for name in ("ca-cert.pem", f"{role}-cert.pem", f"{role}-key.pem"):
            (directory / name).touch()
    return Settings(live_migration=LiveMigration(tls=wish), transfer=Transfer(tls_dir=str(directory)))


@pytest.mark.parametrize(
    ("dest", "dest_has", "source", "source_has", "secured"),
    [
        ("auto", True, "auto", True, True),
        ("auto", False, "auto", True, False),
        ("auto", True, "auto", False, False),
        ("never", True, "auto", True, False),
        ("auto", True, "never", True, False),
        ("required", True, "auto", True, True),
        ("auto", True, "required", True, True),
        ("required", False, "auto", True, None),
        ("auto", False, "required", True, None),
        ("auto", True, "required", False, None),
        ("required", True, "auto", False, None),
        ("required", True, "never", True, None),
        ("never", True, "required", True, None),
    ],
)
def test_both_decide(
    tmp_path: Path, dest: str, dest_has: bool, source: str, source_has: bool, secured: bool | None
) -> None:
    """``None``: the guest stays where it is. Never is it plain where one of them asks for TLS."""
    there = settings(tmp_path, dest, *(["server"] if dest_has else []))
    here = settings(tmp_path, source, *(["client"] if source_has else []))

    def decide() -> bool:
        found = livemigration_tls.agreed(here, livemigration_tls.offered(there))
        livemigration_tls.demand(there, found)
        return found

    if secured is None:
        with pytest.raises(NotSupported, match="tls = required"):
            decide()
    else:
        assert decide() is secured


@pytest.mark.parametrize("lacking", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
def test_each_file_counts(tmp_path: Path, lacking: str) -> None:
    made = settings(tmp_path, "auto", "server")
    (Path(made.transfer.tls_dir) / lacking).unlink()
    assert livemigration_tls.missing(made.transfer.tls_dir, "server").endswith(lacking)
    assert not livemigration_tls.offered(made)


def test_no_directory_is_no_certificate(tmp_path: Path) -> None:
    assert livemigration_tls.missing(str(tmp_path / "none"), "client")
    (tmp_path / "file").touch()
    assert livemigration_tls.missing(str(tmp_path / "file"), "client")
