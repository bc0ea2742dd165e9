from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.certs import make_certificate
from tests.virt.libvirt.transfer.sshserver import SshServer
from tests.virt.libvirt.transfer.support import DESTINATION, Pair


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """Makes QEMU's certificate directory for a host name, signed by the authority of that name."""
    root = tmp_path_factory.mktemp("pki")

    def make(host: str, authority: str = "ca") -> str:
        directory = root / f"{authority}-{host}"
        if not directory.exists():
            made = root / f"{authority}-{host}-made"
            make_certificate(root / authority, made, host, "192.0.2.1")
            directory.mkdir()
            os.link(made / "CA" / "cacert.pem", directory / "ca-cert.pem")
            for role in ("server", "client"):
                os.link(made / "cert.pem", directory / f"{role}-cert.pem")
                os.link(made / "key.pem", directory / f"{role}-key.pem")
        return str(directory)

    return make


@pytest.fixture
def pki(certificates: Callable[[str, str], str]) -> str:
    """Certificates of the destination (and of a source: its own name does not matter)."""
    return certificates(DESTINATION, "ca")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Makes a pair of hosts; what listens is ended after the test."""
    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        root = tmp_path / f"pair{len(made)}"
        root.mkdir()
        made.append(Pair(root, **options))
        return made[-1]

    yield make
    for one in made:
        one.receiver.stop_all()


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    server = SshServer(tmp_path_factory.mktemp("ssh"))
    yield server
    server.close()
