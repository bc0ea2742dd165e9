"""An sshd of one's own on 127.0.0.1, with keys of one's own."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

from tests.waiting import wait_for

# As root sshd wants /run/sshd, which only a running service has made: in a mount namespace of its own.
_PRIVATE_RUN = "mount -t tmpfs none /run && mkdir -m 0755 /run/sshd && exec "


class SshServer:
    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("host", "user"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)]
            subprocess.run(words, check=True, timeout=20)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        config = root / "sshd_config"
        config.write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {root}/host\nAuthorizedKeysFile {root}/user.pub\n"
            f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        command = f"/usr/sbin/sshd -D -e -f {config}"
        words = ["unshare", "--mount", "sh", "-c", _PRIVATE_RUN + command] if os.getuid() == 0 else command.split()
        self._log = open(root / "log", "wb")  # noqa: SIM115 - closed with the server
        self.process = subprocess.Popen(words, stdout=self._log, stderr=self._log)
        wait_for(self._answers, what="sshd to listen")

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    @property
    def options(self) -> str:
        """For ``transfer.ssh_options``."""
        return (
            f"-F /dev/null -i {self.root}/user -p {self.port} -o BatchMode=yes -o ConnectTimeout=5 -o LogLevel=ERROR "
            "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
