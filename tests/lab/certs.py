"""A certificate authority of the cell, and certificates in libvirt's and QEMU's places."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

CA_TEMPLATE = 'cn = "lab CA"\nca\ncert_signing_key\nexpiration_days = 3650\n'


def _certtool(*arguments: str) -> None:
    # RSA: with EC keys libvirt says "usage does not permit key encipherment".
    argv = ["certtool", "--key-type", "rsa", "--sec-param", "medium", *arguments]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


def make_authority(directory: Path) -> None:
    """cacert.pem and cakey.pem in `directory`, once, however many ask."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / "cacert.pem").exists():
            return
        template = directory / "template"
        template.write_text(CA_TEMPLATE)
        _certtool("--generate-privkey", "--outfile", str(directory / "cakey.pem"))
        _certtool("--generate-self-signed", "--load-privkey", str(directory / "cakey.pem"),
                  "--template", str(template), "--outfile", str(directory / "new.pem"))
        (directory / "new.pem").rename(directory / "cacert.pem")


def make_certificate(authority: Path, pki: Path, host: str, address: str) -> None:
    """pki/key.pem and pki/cert.pem for `host` at `address`, signed by the authority."""
    make_authority(authority)
    pki.mkdir(parents=True, exist_ok=True)
    template = pki / "template"
    template.write_text(
        f'organization = lab\ncn = "{host}"\ndns_name = "{host}"\nip_address = "{address}"\n'
        "tls_www_server\ntls_www_client\nsigning_key\nencryption_key\nexpiration_days = 3650\n"
    )
    _certtool("--generate-privkey", "--outfile", str(pki / "key.pem"))
    _certtool("--generate-certificate", "--load-privkey", str(pki / "key.pem"),
              "--load-ca-certificate", str(authority / "cacert.pem"),
              "--load-ca-privkey", str(authority / "cakey.pem"),
              "--template", str(template), "--outfile", str(pki / "cert.pem"))
    (pki / "CA").mkdir(exist_ok=True)
    shutil.copyfile(authority / "cacert.pem", pki / "CA" / "cacert.pem")


def install_for_host(pki: Path, qemu_gid: int) -> None:
    """Copies under the names libvirtd and QEMU (as group `qemu_gid`) look for in /etc/pki."""
    private = pki / "libvirt" / "private"
    private.mkdir(parents=True, exist_ok=True)
    qemu = pki / "qemu"
    qemu.mkdir(exist_ok=True)
    shutil.copyfile(pki / "CA" / "cacert.pem", qemu / "ca-cert.pem")
    for role in ("server", "client"):
        shutil.copyfile(pki / "cert.pem", pki / "libvirt" / f"{role}cert.pem")
        shutil.copyfile(pki / "cert.pem", qemu / f"{role}-cert.pem")
        shutil.copyfile(pki / "key.pem", private / f"{role}key.pem")
        os.chmod(private / f"{role}key.pem", 0o600)
        shutil.copyfile(pki / "key.pem", qemu / f"{role}-key.pem")
        os.chown(qemu / f"{role}-key.pem", 0, qemu_gid)
        os.chmod(qemu / f"{role}-key.pem", 0o640)
