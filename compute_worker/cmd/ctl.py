"""``compute-workerctl``: the operator's hands, one subcommand for each message. Exit statuses are :class:`Exit`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from compute_worker.ctl.connect import Client, connect
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import Exit, UsageError, code_of
from compute_worker.ctl.output import Output
from compute_worker.ctl.parser import PROGRAM, make_parser
from compute_worker.errors import ComputeError

Connect = Callable[[argparse.Namespace], Client]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. What the exit status says is in ``--help``."""
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not complain of it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED


def run(
    argv: Sequence[str],
    connector: Connect = lambda args: connect(args.config_file, args.discover),
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> Exit:
    """Like :func:`main`, with the way to the workers and the streams to be chosen.

    :raises SystemExit: argparse does not understand the command line (status 2), or ``--help``.
    """
    args = make_parser().parse_args(argv)
    out = Output(args.json, stdout, stderr)
    try:
        return Exit(args.run(Ctl(connector(args), args, out)))
    except (ComputeError, UsageError) as exc:
        out.error(exc, PROGRAM)
        return code_of(exc)
    except KeyboardInterrupt:
        with contextlib.suppress(BrokenPipeError):
            out.note("interrupted; what was accepted goes on")
        return Exit.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
