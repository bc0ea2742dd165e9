"""``compute-worker``: the daemon of one host. ``--check`` says what is wrong with a configuration and exits."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from oslo_config import cfg

from compute_worker import config, errors
from compute_worker.version import worker_version

LOG = logging.getLogger(__name__)

CHECK = cfg.BoolOpt("check", default=False, help="Check the configuration and this host, say what is wrong, exit.")


def load(argv: Sequence[str]) -> config.Settings:
    """Read command line and files into the global ``cfg.CONF``, where oslo.messaging looks, and into settings."""
    from compute_worker.rpc.transport import set_defaults
    from compute_worker.telemetry import logs

    conf = cfg.CONF
    config.register(conf)
    conf.register_cli_opt(CHECK)
    logs.register(conf)
    set_defaults(conf)
    conf(list(argv), project="compute-worker", version=worker_version())
    return config.load(conf)


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Exit status: 0 ended as asked, 1 this host cannot work, 2 the configuration."""
    try:
        settings = load(sys.argv[1:] if argv is None else argv)
    except (cfg.Error, ValueError) as exc:
        print(f"compute-worker: {exc}", file=sys.stderr)
        return 2
    if cfg.CONF.check:
        from compute_worker.cmd.check import report

        return report(settings)
    return Daemon(settings).run()


class Daemon:
    """The worker as a process: signals, telemetry, systemd."""

    def __init__(self, settings: config.Settings) -> None:
        self._settings = settings
        self._asked, self._wakeup = socket.socketpair()

    def run(self) -> int:
        """Start, wait for a signal, stop."""
        from compute_worker.rpc.transport import get_transport
        from compute_worker.telemetry.service import Telemetry
        from compute_worker.worker import Worker

        Path(self._settings.compute.state_path).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._listen_to_signals()
        try:
            telemetry = Telemetry(self._settings)
            transport = get_transport(exchange=self._settings.rpc.exchange)
            worker = Worker(
                self._settings, transport, on_end=telemetry.operation_finished, on_commit=telemetry.journal_commit
            )
            worker.start()
        except errors.ComputeError as exc:
            LOG.critical("this host cannot work: %s", exc)
            print(f"compute-worker: {exc}", file=sys.stderr)
            return 1
        telemetry.start(worker)
        self._asked.recv(1)
        limit = self._settings.compute.graceful_shutdown_timeout
        deadline = time.monotonic() + limit
        LOG.info("stopping: at most %.0f s", limit)
        telemetry.stopping()
        ended = worker.stop()
        telemetry.stop(max(0.5, deadline - time.monotonic()))
        LOG.info("stopped%s", "" if ended else "; steps that still ran go on after the next start")
        return 0

    def _listen_to_signals(self) -> None:
        # The kernel may give a signal to any thread, and Python's handler runs in the main one, which a lock would hold
        # for ever then: the byte that the signal itself writes wakes it, wherever it came.
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)


if __name__ == "__main__":
    sys.exit(main())
