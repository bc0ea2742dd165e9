"""A private RabbitMQ: in the cell's hub, or on 127.0.0.1 of the machine with ports of its own.

Either way it lives in a process namespace, so that nothing of it (epmd, port helpers) can stay.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from tests.lab import certs
from tests.lab.namespaces import LabError, Namespaces, Process
from tests.waiting import wait_for

# Not /usr/sbin/rabbitmq-server: that wrapper does "su rabbitmq".
BIN = Path("/usr/lib/rabbitmq/bin")
BEAM = r"beam\.smp .*-s rabbit boot"
AMQP_HELLO = b"AMQP\0\0\x09\x01"


@dataclass(frozen=True)
class Permissions:
    """What a user may do in a virtual host: RabbitMQ's three regular expressions."""

    configure: str = ".*"
    write: str = ".*"
    read: str = ".*"


@dataclass(frozen=True)
class User:
    name: str
    password: str
    permissions: Permissions = Permissions()
    tags: str = ""


@dataclass(frozen=True)
class Ports:
    """TCP ports; `tls` 0 means no TLS listener."""

    amqp: int = 5672
    tls: int = 0
    distribution: int = 25672
    epmd: int = 4369


ADMINISTRATOR = User("lab", "lab", tags="administrator")


def definitions(users: Sequence[User], vhosts: Sequence[str]) -> str:
    """A definitions file: every user in every virtual host.  A rabbitmqctl call costs 1-3 s."""
    return json.dumps({
        "users": [
            {"name": u.name, "password_hash": _password_hash(u.password), "tags": u.tags,
             "hashing_algorithm": "rabbit_password_hashing_sha256"}
            for u in users
        ],
        "vhosts": [{"name": name} for name in vhosts],
        "permissions": [
            {"user": u.name, "vhost": name, **asdict(u.permissions)}
            for u in users for name in vhosts
        ],
    })


def _password_hash(password: str) -> str:
    salt = os.urandom(4)
    digest = hashlib.sha256(salt + password.encode()).digest()
    return base64.b64encode(salt + digest).decode()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different."""
    held = [socket.socket() for _ in range(count)]
    for sock in held:
        sock.bind(("127.0.0.1", 0))
    ports = [int(sock.getsockname()[1]) for sock in held]
    for sock in held:
        sock.close()
    return ports


class Rabbit:
    """One broker.  `up` makes it, `start` and `stop` are its life, `down` removes it."""

    def __init__(
        self,
        directory: Path,
        ns: Namespaces,
        address: str = "127.0.0.1",
        ports: Ports = Ports(),
        *,
        own_namespaces: bool = True,
        authority: Path | None = None,
    ) -> None:
        self.directory = directory
        self.ns = ns
        self.address = address
        self.ports = ports
        self.vhost = "lab"
        self.own_namespaces = own_namespaces
        self.authority = authority
        self._lifeline: tuple[int, int] | None = None

    @classmethod
    def local(cls, directory: Path, *, tls: bool = False) -> Rabbit:
        """A broker on 127.0.0.1 of this machine, reachable by every process of it."""
        amqp, tls_port, distribution, epmd = free_ports(4)
        kinds = ["mount", "ipc", "pid", "uts"] + (["user"] if os.geteuid() != 0 else [])
        ports = Ports(amqp, tls_port if tls else 0, distribution, epmd)
        authority = directory / "ca" if tls else None
        return cls(directory, Namespaces("mq", directory / "host", kinds), ports=ports,
                   authority=authority)

    def up(
        self,
        users: Sequence[User] = (),
        vhosts: Sequence[str] = ("lab",),
    ) -> None:
        """Configure and start with these users (and the administrator lab/lab).

        A broker with namespaces of its own dies with the process that called this.
        """
        (self.directory / "log").mkdir(parents=True, exist_ok=True)
        self.vhost = vhosts[0]
        everyone = [ADMINISTRATOR, *users]
        (self.directory / "definitions.json").write_text(definitions(everyone, vhosts))
        (self.directory / "rabbitmq.conf").write_text(self._configuration())
        (self.directory / "enabled_plugins").write_text("[].\n")
        cookie = self.directory / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(15))
        cookie.chmod(0o600)
        if self.own_namespaces:
            self._lifeline = os.pipe()
            self.ns.start([["proc", "/proc"]], self._lifeline[0])
        self.start()

    def start(self) -> None:
        """Start the broker; returns when it greets an AMQP client."""
        self.ns.run([str(BIN / "rabbitmq-server"), "-detached"], env=self._environment())
        wait_for(self.ready, 60.0, f"RabbitMQ to answer (see {self.directory}/log)")

    def ready(self) -> bool:
        """Whether it greets an AMQP client within two seconds."""
        try:
            with self.ns.socket() if "net" in self.ns.kinds else socket.socket() as sock:
                sock.settimeout(2.0)
                sock.connect((self.address, self.ports.amqp))
                sock.sendall(AMQP_HELLO)
                return sock.recv(1) == b"\x01"
        except OSError:
            return False

    def process(self) -> Process | None:
        """The broker's Erlang machine, or None."""
        found = self.ns.processes(BEAM) if self.ns.alive else []
        return found[0] if found else None

    def stop(self) -> None:
        """A clean stop (SIGTERM); returns when it is gone."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered."""
        self._running().signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._running().signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Remove what a stopped broker has stored: queues, messages, exchanges."""
        if self.process() is not None:
            raise LabError("stop the broker before wiping it")
        shutil.rmtree(self.directory / "mnesia", ignore_errors=True)

    def down(self) -> None:
        """Remove the broker, its files and, if they are its own, its namespaces."""
        if self.own_namespaces:
            self.ns.kill()
            for end in self._lifeline or ():
                os.close(end)
            self._lifeline = None
        elif self.ns.alive:
            for process in self.ns.processes(f"{BEAM}|epmd|inet_gethost|erl_child_setup"):
                process.signal(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def ctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """rabbitmqctl; each call takes a second or more."""
        argv = [str(BIN / "rabbitmqctl"), "-q", *arguments]
        return self.ns.run(argv, env=self._environment(), check=check)

    def set_permissions(self, user: str, permissions: Permissions, vhost: str = "") -> None:
        """Change what a user may do, while the broker runs."""
        self.ctl("set_permissions", "-p", vhost or self.vhost, user, permissions.configure,
                 permissions.write, permissions.read)

    def url(self, user: User = ADMINISTRATOR, scheme: str = "rabbit", vhost: str = "") -> str:
        """The transport URL ("rabbit" for oslo.messaging, "amqp" for kombu)."""
        return broker_url(scheme, user, self.address, self.ports.amqp, vhost or self.vhost)

    def _end(self, number: int) -> None:
        process = self._running()
        process.signal(signal.SIGCONT)
        process.signal(number)
        wait_for(lambda: self.process() is None, 30.0, "the end of RabbitMQ")

    def _running(self) -> Process:
        process = self.process()
        if process is None:
            raise LabError("RabbitMQ is not running")
        return process

    def _configuration(self) -> str:
        lines = [
            "loopback_users = none",
            f"load_definitions = {self.directory}/definitions.json",
            "log.file.level = info",
            "vm_memory_high_watermark.absolute = 512MiB",
            "disk_free_limit.absolute = 50MB",
            f"listeners.tcp.1 = 127.0.0.1:{self.ports.amqp}",
        ]
        if self.address != "127.0.0.1":
            lines.append(f"listeners.tcp.2 = {self.address}:{self.ports.amqp}")
        if self.ports.tls and self.authority:
            pki = self.directory / "pki"
            certs.make_certificate(self.authority, pki, "hub", self.address)
            lines += [
                f"listeners.ssl.1 = {self.address}:{self.ports.tls}",
                f"ssl_options.cacertfile = {pki}/CA/cacert.pem",
                f"ssl_options.certfile = {pki}/cert.pem",
                f"ssl_options.keyfile = {pki}/key.pem",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
        return "\n".join(lines) + "\n"

    def _environment(self) -> dict[str, str]:
        own = str(self.directory)
        return {
            "HOME": own,
            "RABBITMQ_NODENAME": "labmq@localhost",
            "RABBITMQ_NODE_PORT": str(self.ports.amqp),
            "RABBITMQ_DIST_PORT": str(self.ports.distribution),
            "RABBITMQ_MNESIA_BASE": f"{own}/mnesia",
            "RABBITMQ_LOG_BASE": f"{own}/log",
            "RABBITMQ_CONFIG_FILE": f"{own}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{own}/enabled_plugins",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_PID_FILE": f"{own}/pid",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.ports.epmd),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS":
                "-kernel inet_dist_use_interface {127,0,0,1}",
        }


def broker_url(scheme: str, user: User, address: str, port: int, vhost: str) -> str:
    name, password = quote(user.name, safe=""), quote(user.password, safe="")
    return f"{scheme}://{name}:{password}@{address}:{port}/{quote(vhost, safe='')}"
