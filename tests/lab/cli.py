"""tools/lab: the lab in a person's hands."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.lab import faults
from tests.lab.cell import Cell
from tests.lab.guest_images import guest_images
from tests.lab.namespaces import LabError, Namespaces, environment
from tests.lab.requirements import missing
from tests.lab.settings import Settings
from tests.lab.worker import REPOSITORY

DEFAULT_STATE = Path("/tmp/compute-worker-lab")
SIGNALS = {"stop": signal.SIGSTOP, "cont": signal.SIGCONT, "kill": signal.SIGKILL,
           "term": signal.SIGTERM}


def up(options: argparse.Namespace) -> None:
    lacking = missing()
    if lacking:
        raise LabError(f"the lab needs {'; '.join(lacking)}")
    settings = Settings(nodes=options.nodes, tls=options.tls, kvm=options.kvm)
    venv = options.venv or REPOSITORY / ".venv"
    cell = Cell(options.state, settings, rabbit=not options.no_mq, keep=True, venv=venv)
    cell.up()
    for image in guest_images().files():
        cell.add_image(image)
    print(f"up in {options.state}: hub, {', '.join(cell.nodes)}")


def down(options: argparse.Namespace) -> None:
    Cell.attach(options.state).down()


def execute(options: argparse.Namespace) -> int:
    ns = _namespaces(Cell.attach(options.state), options.node)
    env = {**environment(options.user, None), "TERM": os.environ.get("TERM", "dumb")}
    command = ns.command(options.command, options.user)
    return subprocess.run(command, env=env, check=False).returncode


def kill(options: argparse.Namespace) -> None:
    Cell.attach(options.state).kill_node(options.node)


def start(options: argparse.Namespace) -> None:
    Cell.attach(options.state).start_node(options.node)


def daemon(options: argparse.Namespace) -> None:
    found = Cell.attach(options.state)[options.node].daemons[options.daemon]
    getattr(found, options.action)()


def mq(options: argparse.Namespace) -> None:
    rabbit = Cell.attach(options.state).rabbit
    if options.action == "ctl":
        print(rabbit.ctl(*options.arguments).stdout, end="")
    elif options.action == "url":
        print(rabbit.url())
    else:
        getattr(rabbit, options.action)()


def fault(options: argparse.Namespace) -> None:
    node = Cell.attach(options.state)[options.node]
    arguments = options.arguments
    actions: dict[str, Callable[[], object]] = {
        "link": lambda: faults.set_link(node, arguments[0] == "up"),
        "drop": lambda: faults.drop_ports(node, [int(p) for p in arguments[0].split(",")]),
        "loss": lambda: faults.set_loss(node, int(arguments[0])),
        "rate": lambda: faults.set_rate(node, int(arguments[0])),
        "full": lambda: faults.small_disk(node, int(arguments[0])),
        "heal": lambda: print("\n".join(faults.heal(node))),
    }
    if options.fault in SIGNALS:
        for process in faults.signal_processes(node, arguments[0], SIGNALS[options.fault]):
            print(process.pid, " ".join(process.argv)[:120])
    else:
        actions[options.fault]()


def env(options: argparse.Namespace) -> None:
    cell = Cell.attach(options.state)
    print(f"LAB_STATE={cell.state}\nHUB_PID={cell.hub.ns.pid}")
    for name, node in cell.nodes.items():
        upper = name.upper()
        pid = node.ns.pid if node.ns.alive else ""
        print(f"{upper}_PID={pid} {upper}_IP={node.address} {upper}_URI='{node.uri}' "
              f"{upper}_INSTANCES={node.directory}/worker/instances")


def _namespaces(cell: Cell, name: str) -> Namespaces:
    return cell.hub.ns if name == "hub" else cell[name].ns


def parser() -> argparse.ArgumentParser:
    state = Path(os.environ.get("LAB_STATE", DEFAULT_STATE))
    top = argparse.ArgumentParser(prog="lab", description="A cell of real hosts on this machine.")
    top.add_argument("--state", type=Path, default=state,
                     help="directory of the cell (default: $LAB_STATE or %(default)s)")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str,
            node: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if node:
            command.add_argument("node", help='node1, node2, ... (for exec also "hub")')
        return command

    command = add("up", up, "bring a cell up", node=False)
    command.add_argument("nodes", type=int, nargs="?", default=2)
    command.add_argument("--tls", action="store_true", help="certificates and TLS listeners")
    command.add_argument("--kvm", action="store_true", help="leave /dev/kvm visible")
    command.add_argument("--no-mq", action="store_true", help="without RabbitMQ")
    command.add_argument("--venv", type=Path, help="virtualenv the workers are run from")
    add("down", down, "take the cell down and remove its directory", node=False)
    command = add("exec", execute, "run a command in a host")
    command.add_argument("--user", default="root")
    command.add_argument("command", nargs=argparse.REMAINDER)
    add("kill", kill, "power failure of a host")
    add("start", start, "power on a host")
    command = add("daemon", daemon, "start, stop, kill, freeze or thaw a daemon of a host")
    command.add_argument("daemon", choices=["libvirtd", "virtlogd", "sshd"])
    command.add_argument("action", choices=["start", "stop", "kill", "freeze", "thaw"])
    command = add("mq", mq, "the cell's RabbitMQ", node=False)
    command.add_argument("action", choices=["start", "stop", "kill", "freeze", "thaw", "wipe",
                                            "url", "ctl"])
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command = add("fault", fault, "link up|down; drop PORT,..; loss PERCENT; rate KBIT; full MIB; "
                  "heal; stop|cont|kill|term PATTERN")
    kinds = ["link", "drop", "loss", "rate", "full", "heal", *SIGNALS]
    command.add_argument("fault", choices=kinds)
    command.add_argument("arguments", nargs="*")
    add("env", env, "shell variables for scripts", node=False)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except FileNotFoundError as error:
        if error.filename and str(error.filename).endswith("lab.json"):
            print(f"lab: no cell is up in {options.state}", file=sys.stderr)
            return 1
        raise
    except (LabError, AssertionError, KeyError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
