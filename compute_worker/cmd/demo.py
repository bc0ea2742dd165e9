"""``compute-worker-demo``: the scenario on simulated hosts in this process, or on two real ones from a source tree."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE_TREE = Path(__file__).resolve().parents[2]
REAL_MODULE = "tests.lab.demo"
INSTEAD = "showing the same in one process, on simulated hosts"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 every step was good, 1 one was not, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="compute-worker-demo",
        description="From boot to delete on two hosts, with a table of steps and times at the end.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--embedded", action="store_true", help="simulated hosts in this process: no root, no broker")
    which.add_argument("--real", action="store_true", help="two real libvirt hosts and RabbitMQ, from a source tree")
    args = parser.parse_args(argv)
    if args.embedded:
        return embedded()
    why = _why_not_real()
    if why is None:
        _become_real([] if args.real else ["--or-embedded"])
    if args.real:
        print(f"compute-worker-demo: {why}", file=sys.stderr)
        return 2
    print(f"compute-worker-demo: {why}; {INSTEAD}", file=sys.stderr)
    return embedded()


def _why_not_real() -> str | None:
    if not SOURCE_TREE.joinpath(*REAL_MODULE.split(".")).with_suffix(".py").exists():
        return "two real hosts need the source tree, and this is an installed package"
    if os.geteuid() != 0:
        return "two real hosts need root (namespaces, libvirtd)"
    return None


def _become_real(options: list[str]) -> None:
    """Replace this program: the package never imports what belongs to its tests."""
    os.chdir(SOURCE_TREE)
    os.execv(sys.executable, [sys.executable, "-m", REAL_MODULE, *options])


def embedded() -> int:
    """Play the scenario in this process; the exit status."""
    from compute_worker.threads import use_threads

    use_threads()
    # The workers run in this process: what they log is not what the demo shows.
    logging.getLogger().setLevel(logging.CRITICAL)
    from compute_worker.ctl.output import Output
    from compute_worker.demo.embedded import embedded_demo
    from compute_worker.demo.scenario import SCENES
    from compute_worker.demo.stage import Stage, play

    out = Output()
    with embedded_demo() as cell:
        out.line(f"compute-worker-demo: {cell.title}")
        return 0 if play(Stage(cell, out), SCENES) else 1


if __name__ == "__main__":
    sys.exit(main())
