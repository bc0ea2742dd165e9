"""The files a host is given: accounts, libvirt, ssh.  Pure text in, files out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.lab.settings import STATE_PATH, WORKER_UID, WORKER_USER, Settings

LIBVIRT_GROUP = "libvirt"

SSH_CONFIG = """\
Host *
  IdentityFile /etc/ssh/lab_%u_id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
"""


def host_uuid(index: int) -> str:
    return f"7c1ab000-0000-4000-8000-{index:012d}"


def libvirtd_conf(settings: Settings, index: int) -> str:
    return f"""\
host_uuid = "{host_uuid(index)}"
unix_sock_group = "{LIBVIRT_GROUP}"
unix_sock_rw_perms = "0770"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tcp = 1
listen_tls = {int(settings.tls)}
auth_tcp = "none"
auth_tls = "none"
listen_addr = "{settings.address(index)}"
keepalive_interval = {settings.keepalive_interval}
keepalive_count = 5
log_outputs = "{settings.libvirt_log_level}:file:/var/log/libvirt/libvirtd.log"
"""


def qemu_conf(settings: Settings, index: int) -> str:
    tls = """\
default_tls_x509_cert_dir = "/etc/pki/qemu"
migrate_tls_x509_verify = 1
nbd_tls = 1
"""
    return f"""\
user = "{WORKER_USER}"
group = "{WORKER_USER}"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "logd"
migration_address = "{settings.address(index)}"
migration_host = "node{index}"
keepalive_interval = {settings.keepalive_interval}
{tls if settings.tls else ""}"""


def virtlogd_conf(settings: Settings) -> str:
    return f"""\
max_size = {settings.console_log_bytes}
max_backups = 3
log_outputs = "3:file:/var/log/libvirt/virtlogd.log"
"""


def sshd_config(settings: Settings, index: int) -> str:
    return f"""\
ListenAddress {settings.address(index)}
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/lab_authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
UseDNS no
PidFile /run/sshd.pid
MaxStartups 50
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
"""


def write_accounts(etc: Path) -> None:
    """The machine's accounts plus the worker's own, a member of the libvirt group.

    `etc` is the upper layer of the host's /etc.  The account is not locked ("*", not "!"):
    sshd without PAM would refuse it.
    """
    home = STATE_PATH
    gid = WORKER_UID
    added = {
        "passwd": f"{WORKER_USER}:x:{WORKER_UID}:{gid}:compute worker:{home}:/bin/sh",
        "shadow": f"{WORKER_USER}:*:19000:0:99999:7:::",
        "group": f"{WORKER_USER}:x:{gid}:",
    }
    for name, line in added.items():
        source = Path("/etc") / name
        lines = source.read_text().splitlines()
        if name == "group":
            lines = [_with_member(entry, LIBVIRT_GROUP, WORKER_USER) for entry in lines]
        target = etc / name
        target.write_text("\n".join([*lines, line]) + "\n")
        shutil.copystat(source, target)
        os.chown(target, source.stat().st_uid, source.stat().st_gid)


def _with_member(entry: str, group: str, user: str) -> str:
    if not entry.startswith(group + ":"):
        return entry
    head, members = entry.rsplit(":", 1)
    return f"{head}:{','.join([*filter(None, members.split(',')), user])}"


def write_libvirt(directory: Path, settings: Settings, index: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "libvirtd.conf").write_text(libvirtd_conf(settings, index))
    (directory / "qemu.conf").write_text(qemu_conf(settings, index))
    (directory / "virtlogd.conf").write_text(virtlogd_conf(settings))
    (directory / "libvirt.conf").write_text('uri_default = "qemu:///system"\n')


def write_ssh(directory: Path, keys: Path, settings: Settings, index: int) -> None:
    """Keys and client options system-wide in the host's own /etc/ssh: nothing in ~/.ssh."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ssh_config").write_text(SSH_CONFIG)
    (directory / "sshd_config").write_text(sshd_config(settings, index))
    _private(keys / "hostkey", directory / "ssh_host_ed25519_key", 0)
    _private(keys / "id", directory / "lab_root_id", 0)
    _private(keys / "id", directory / f"lab_{WORKER_USER}_id", WORKER_UID)
    shutil.copyfile(keys / "id.pub", directory / "lab_authorized_keys")


def _private(source: Path, target: Path, owner: int) -> None:
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target, follow_symlinks=False)
    os.chmod(target, 0o600)
    os.chown(target, owner, owner)
