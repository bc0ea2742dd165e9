"""How log lines look, and what never gets into one.

oslo.log decides where lines go (``[DEFAULT] log_file``, ``log_dir``, ``debug``, ``log_config_append``, journald,
syslog); here every one of its handlers gets a formatter of ours, so that no line leaves without its context and no
line leaves with a secret: the formatter sees the whole text, the traceback included.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from oslo_config import cfg

from compute_worker import logcontext

Redact = Callable[[str], str]

_QUIET = ["amqp=WARNING", "kombu=WARNING", "oslo.messaging=INFO", "oslo_messaging=INFO", "stevedore=WARNING",
          "urllib3=WARNING", "keystoneauth=WARNING", "openstack=WARNING"]  # fmt: skip
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {9: "\t", 10: "\\n", 13: "\\r"}
# Ends of lines to some readers, and marks that turn the direction of writing.
_CONTROL |= {code: f"\\u{code:04x}" for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}


class _Formatter(logging.Formatter):
    def __init__(self, redact: Redact) -> None:
        super().__init__()
        self._redact = redact

    def _message(self, record: logging.LogRecord) -> str:
        try:
            return record.getMessage()
        except (TypeError, ValueError) as exc:
            return f"{record.msg} (its arguments do not fit: {exc})"

    def _trace(self, record: logging.LogRecord) -> str:
        parts = []
        if record.exc_info:
            parts.append(self.formatException(record.exc_info))
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)


class TextFormatter(_Formatter):
    """``time pid LEVEL logger [request op=... instance=...] message``, times in UTC.

    Control characters of a message are escaped, so that nobody writes a line of his own; tracebacks keep theirs.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        about = getattr(record, "about", "-")
        line = (
            f"{_utc(record.created)} {record.process} {record.levelname} {record.name} [{about}] "
            f"{self._message(record).translate(_CONTROL)}"
        )
        trace = self._trace(record)
        return self._redact(f"{line}\n{trace}" if trace else line)


class JsonFormatter(_Formatter):
    """One JSON object a line: ``time`` (UTC, RFC 3339), ``level``, ``logger``, ``message``, ``host``, ``pid``,
    ``thread``, and where known ``request_id``, ``operation``, ``instance``, ``traceback``."""

    def __init__(self, redact: Redact, host: str) -> None:
        super().__init__(redact)
        self._host = host

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        fields: dict[str, Any] = {
            "time": _utc(record.created).replace(" ", "T") + "Z",
            "level": record.levelname,
            "logger": record.name,
            "message": self._redact(self._message(record)),
            "host": self._host,
            "pid": record.process,
            "thread": record.threadName,
        }
        for name in ("request_id", "operation", "instance"):
            value = getattr(record, name, None)
            if value and value != "-":
                fields[name] = str(value)
        trace = self._trace(record)
        if trace:
            fields["traceback"] = self._redact(trace)
        return json.dumps(fields, ensure_ascii=False)


def _utc(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}"


def register(conf: cfg.ConfigOpts) -> None:
    """Make ``conf`` know oslo.log's options; before it reads its files."""
    from oslo_log import log

    log.register_options(conf)
    log.set_defaults(default_log_levels=_QUIET)


def setup(conf: cfg.ConfigOpts, log_format: str, host: str, redact: Redact) -> None:
    """Begin to log as ``conf`` says; ``log_format`` is ``text`` or ``json``.

    Called again (log files reopened, configuration read anew), it replaces what it did before. An exception that ends
    a thread is logged as critical.
    """
    from oslo_log import log

    log.setup(conf, "compute-worker")
    dress(logging.getLogger(), log_format, host, redact)
    threading.excepthook = _log_dead_thread


def dress(logger: logging.Logger, log_format: str, host: str, redact: Redact) -> None:
    """Give every handler of ``logger`` our formatter and the context."""
    formatter = JsonFormatter(redact, host) if log_format == "json" else TextFormatter(redact)
    for handler in logger.handlers:
        handler.setFormatter(formatter)
    logcontext.install(logger.handlers)


def _log_dead_thread(args: threading.ExceptHookArgs) -> None:
    if issubclass(args.exc_type, SystemExit) or args.exc_value is None:
        return
    name = args.thread.name if args.thread else "?"
    logging.getLogger(__name__).critical(
        "thread %s died", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback)
    )
