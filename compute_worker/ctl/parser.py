"""The command line: one table of subcommands, each with its arguments and its function."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compute_worker.ctl import commands, doctor, drain, drainplan, imaging, livemoves, movelist, moves, queries
from compute_worker.ctl.connect import URL_VARIABLE
from compute_worker.ctl.context import Ctl
from compute_worker.ctl.exits import MEANING, Exit

PROGRAM = "compute-workerctl"
TIMEOUT_SECONDS = 600.0
DISCOVER_SECONDS = 2.0

Option = tuple[tuple[str, ...], Mapping[str, Any]]


def opt(*names: str, **how: Any) -> Option:
    """One argument of a subcommand, as ``add_argument`` takes it."""
    return names, how


@dataclass(frozen=True)
class Subcommand:
    """One subcommand. ``sends``: it is a command, with the options that all of them have."""

    run: Callable[[Ctl], Exit]
    help: str
    options: Sequence[Option] = field(default=())
    sends: bool = False


INSTANCE = opt("instance", metavar="INSTANCE", help="uuid, the beginning of one (4 characters or more), or name")
HARD = opt("--hard", action="store_true", help="pull the plug, without asking the guest")

BOOT: tuple[Option, ...] = (
    opt("name", metavar="NAME", help="name of the instance, for people"),
    opt("--flavor", required=True, metavar="VCPUS/MEMORY_MB/ROOT_GB", help="its size; root disk 0: as the image"),
    opt("--image", metavar="ID", help="image in the store of its host"),
    opt("--disk-format", default="qcow2", choices=("raw", "qcow2", "iso", "vmdk", "vhd", "vhdx", "vdi"),
        help="what the image's bytes must be (default: qcow2)"),
    opt("--store", metavar="NAME", help="image store; default: the host's"),
    opt("--kernel", metavar="ID", help="image of the kernel to boot with"),
    opt("--ramdisk", metavar="ID", help="image of its initial ramdisk"),
    opt("--kernel-cmdline", default="", metavar="TEXT", help="appended to the kernel's command line"),
    opt("--os-type", metavar="NAME", help="linux, windows, ...: how ephemeral disks are formatted"),
    opt("--image-json", metavar="FILE", help="a whole ImageMeta as JSON, instead of the options above"),
    opt("--ephemeral", action="append", default=[], metavar="GB[:FORMAT]", help="an empty disk (repeatable)"),
    opt("--swap", type=int, default=0, metavar="MB", help="a swap disk"),
    opt("--config-drive", action="store_true", help="give it a config drive"),
    opt("--file", action="append", default=[], metavar="PATH=LOCAL", help="a file for the guest (repeatable)"),
    opt("--user-data", metavar="FILE", help="user data for the guest"),
    opt("--admin-password-file", metavar="FILE", help="the guest's administrator password is its first line"),
    opt("--meta", action="append", default=[], metavar="KEY=VALUE", help="metadata (repeatable)"),
    opt("--hostname", metavar="NAME", help="the guest's own host name"),
    opt("--vif", action="append", default=[], metavar="bridge=BR,mac=MAC,...",
        help="a network interface (repeatable); also id, model, mtu, devname, and wait: for its plug event"),
    opt("--uuid", metavar="UUID", help="its uuid; default: a new one"),
)

CLEAN = opt("--clean-shutdown", action=argparse.BooleanOptionalAction, default=True,
            help="ask the guest to shut down (default), or pull the plug")
MOVE: tuple[Option, ...] = (
    INSTANCE,
    opt("--to", metavar="HOST", help="destination; default: the host with most free memory, the others as alternates"),
    opt("--alternate", action="append", default=[], metavar="HOST",
        help="asked next when the destination refuses or fails (repeatable)"),
    CLEAN,
)

MOVES: Mapping[str, Subcommand] = {
    "resize": Subcommand(moves.resize, "give an instance another size on another host; then confirm or revert", (
        *MOVE,
        opt("--flavor", required=True, metavar="VCPUS/MEMORY_MB[/ROOT_GB]", help="its new size; disks only grow"),
        opt("--swap", type=int, metavar="MB", help="swap disk; default: as before"),
        opt("--ephemeral", type=int, metavar="GB", help="ephemeral disks together; default: as before")), sends=True),
    "migrate": Subcommand(moves.migrate, "move an instance, shut down meanwhile; then confirm or revert",
                          MOVE, sends=True),
    "confirm": Subcommand(moves.confirm, "keep a moved instance where it is; the copy at its source goes",
                          (INSTANCE,), sends=True),
    "revert": Subcommand(moves.revert, "give a moved instance back as it was; what it wrote since is lost",
                         (INSTANCE,), sends=True),
    "live-migrate": Subcommand(livemoves.live_migrate, "move a running guest to another host while it goes on", (
        INSTANCE,
        opt("destination", nargs="?", metavar="HOST",
            help="destination; default: the host with most free memory that can take it"),
        opt("--to", metavar="HOST", help="the same"),
        opt("--disk-over-commit", action="store_true",
            help="room for what its disks occupy is enough, not for what they may grow to")), sends=True),
    "abort": Subcommand(livemoves.abort, "stop a live migration; the guest goes on where it is", (INSTANCE,),
                        sends=True),
    "force-complete": Subcommand(livemoves.force_complete, "finish a live migration at the guest's expense", (
        INSTANCE,
        opt("--pause", dest="how", action="store_const", const="pause", default="pause",
            help="it stands still until it is there (default)"),
        opt("--postcopy", dest="how", action="store_const", const="postcopy",
            help="it goes on there before its memory is there: it needs both hosts meanwhile")), sends=True),
    "migrations": Subcommand(movelist.migrations, "moves of all hosts that are not closed", (
        opt("--all", action="store_true", help="also closed ones, as long as hosts remember them"),)),
    "take-back": Subcommand(moves.take_back, "run an instance at its source again, as its destination is off", (
        INSTANCE,
        opt("--destination-is-off", action="store_true",
            help="you have made sure of it: two running copies destroy the instance")), sends=True),
    "forget-host": Subcommand(moves.forget_host, "let no host wait any longer for one that never returns", (
        opt("named_host", metavar="HOST", help="the one that never returns"),), sends=True),
    "drain": Subcommand(drain.run, "move everything off a host; exit status 0 only when it is empty", (
        opt("named_host", metavar="HOST", help="which"),
        opt("--dry-run", action="store_true", help="only say what would go where, and what would stay"),
        opt("--how", choices=(drainplan.AUTO, *drainplan.How), default=drainplan.AUTO,
            help="live: only while they run; cold: shut down; auto: live where that is possible (default)"),
        opt("--parallel", type=int, default=2, metavar="N", help="moves at once (default: 2)"),
        opt("--confirm", action="store_true", help="confirm each move away from it, so that it keeps no copy"),
        opt("--reason", default=drain.REASON, metavar="TEXT", help="why it is disabled (default: being drained)"),
        CLEAN)),
    "doctor": Subcommand(doctor.doctor, "what is left over on the hosts, and what would be done about it", (
        opt("named_host", nargs="?", metavar="HOST", help="which; default: all"),
        opt("--repair", action="store_true", help="remove what nobody needs, where that is safe"))),
}

PROPERTY = opt("--property", action="append", default=[], metavar="KEY=VALUE", help="of the image (repeatable)")
STORE = opt("--store", metavar="NAME", help="image store; default: the host's")
IMAGE: tuple[Option, ...] = (
    opt("--image", metavar="ID", help="id of the image; default: a new one"),
    opt("--name", metavar="NAME", help="its name, for people"),
    STORE,
    opt("--disk-format", choices=("qcow2", "raw"), help="default: the host's snapshot_format"),
    opt("--compression", default="none", choices=("none", "zlib", "zstd"), help="of a qcow2 (default: none)"),
    PROPERTY,
)

IMAGING: Mapping[str, Subcommand] = {
    "snapshot": Subcommand(imaging.snapshot, "make an image of an instance's root disk; its guest goes on", (
        INSTANCE,
        *IMAGE,
        opt("--cold", action="store_true", help="with the guest standing still, where a live one is not trusted")),
        sends=True),
    "backup": Subcommand(imaging.backup, "a snapshot, after which the oldest backups of its kind go", (
        INSTANCE,
        *IMAGE,
        opt("--type", dest="backup_type", default="daily", metavar="KIND", help="daily (default), weekly, ..."),
        opt("--rotation", type=int, default=7, metavar="N", help="how many of this kind are kept (default: 7)")),
        sends=True),
    "images": Subcommand(imaging.images, "images of the stores, and what each host keeps of them", (
        STORE,
        PROPERTY,
        opt("--cached", action="store_true", help="only what hosts keep"))),
}

SUBCOMMANDS: Mapping[str, Subcommand] = {
    "hosts": Subcommand(queries.hosts, "hosts that answer, with their resources"),
    "boot": Subcommand(commands.boot, "make an instance, where --host says or on the host with most free memory",
                       BOOT, sends=True),
    "delete": Subcommand(commands.delete, "remove an instance with its disks", (INSTANCE,), sends=True),
    "start": Subcommand(commands.start, "start a stopped instance", (INSTANCE,), sends=True),
    "stop": Subcommand(commands.stop, "stop an instance: it is asked, then powered off", (
        INSTANCE, HARD, opt("--grace", type=float, metavar="SECONDS", help="how long it has; default: the host's")),
        sends=True),
    "reboot": Subcommand(commands.reboot, "restart an instance: it is asked, then powered off and on",
                         (INSTANCE, HARD), sends=True),
    "pause": Subcommand(commands.pause, "stop its processors; memory stays", (INSTANCE,), sends=True),
    "unpause": Subcommand(commands.unpause, "let a paused instance go on", (INSTANCE,), sends=True),
    "suspend": Subcommand(commands.suspend, "save its memory to disk and stop it", (INSTANCE,), sends=True),
    "resume": Subcommand(commands.resume, "start a suspended instance from its saved memory", (INSTANCE,), sends=True),
    "list": Subcommand(queries.list_, "instances of all hosts"),
    "show": Subcommand(queries.show, "one instance in full", (INSTANCE,)),
    "console": Subcommand(queries.console, "the end of a guest's serial console", (
        INSTANCE,
        opt("--follow", "-f", action="store_true", help="go on with what it writes, until interrupted"),
        opt("--bytes", type=int, default=65_536, metavar="N", help="how much of the end (default: 65536)"))),
    "diagnostics": Subcommand(queries.diagnostics, "what the hypervisor measures of a guest", (INSTANCE,)),
    "operations": Subcommand(queries.operations, "operations of all hosts", (
        opt("--instance", metavar="INSTANCE", help="of this instance only"),
        opt("--open", action="store_true", help="only those that have not ended"),
        opt("--since", type=int, metavar="SEQ", help="only what changed after this seq (of one host)"))),
    "explain": Subcommand(queries.explain, "an operation: steps, decisions, what it waits for", (
        opt("explained", metavar="OPERATION", help="uuid, or the beginning of one"),)),
    "disable": Subcommand(commands.disable, "let a host take no new instances", (
        opt("named_host", nargs="?", metavar="HOST", help="which"),
        opt("--reason", default="", metavar="TEXT", help="told to whoever is refused")), sends=True),
    "enable": Subcommand(commands.enable, "let a host take new instances again", (
        opt("named_host", nargs="?", metavar="HOST", help="which"),), sends=True),
    "watch": Subcommand(queries.watch, "a live table of hosts and operations", (
        opt("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default: 1)"),
        opt("--count", type=int, default=0, metavar="N", help="end after N looks; default: when interrupted"))),
    "cancel": Subcommand(commands.cancel, "end an operation before its COMMIT and undo it", (
        opt("cancel", metavar="OPERATION", help="uuid, or the beginning of one"),), sends=True),
    "event": Subcommand(commands.event, "tell what happened to an instance elsewhere", (
        INSTANCE,
        opt("event", metavar="EVENT", help="such as network-vif-plugged"),
        opt("--tag", metavar="TEXT", help="what it is about: the vif's id"),
        opt("--status", default="completed", choices=("completed", "failed", "in-progress"), help="how it went")),
        sends=True),
    **MOVES,
    **IMAGING,
}


def _common(defaults: bool) -> argparse.ArgumentParser:
    """Options that may stand before and after the subcommand; only the first parser has their defaults."""
    parser = argparse.ArgumentParser(add_help=False)

    def add(*names: str, default: Any = None, **how: Any) -> None:
        parser.add_argument(*names, default=default if defaults else argparse.SUPPRESS, **how)

    add("--config-file", metavar="FILE", help="configuration with transport_url; default: the worker's own")
    add("--host", metavar="HOST", help="ask this host; default: the one that has the instance")
    add("--json", action="store_true", default=False, help="one JSON document on standard output")
    add("--timeout", type=float, default=TIMEOUT_SECONDS, metavar="SECONDS",
        help=f"how long to wait for an operation's end (default: {TIMEOUT_SECONDS:.0f})")
    add("--discover", type=float, default=DISCOVER_SECONDS, metavar="SECONDS",
        help=f"how long to wait for hosts to answer (default: {DISCOVER_SECONDS:.0f})")
    return parser


def _sending() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True,
                        help="wait for the operation's end (default), or only for its acceptance")
    parser.add_argument("--operation", metavar="UUID",
                        help="uuid of the operation: the same one sent again is done once; default: a new one")
    parser.add_argument("--check-only", action="store_true", help="only say whether it would be accepted")
    return parser


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    codes = "\n".join(f"  {int(code):3} {meaning}" for code, meaning in MEANING.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Commands for compute workers: one subcommand for each message.",
        epilog=f"The broker's address comes from --config-file, else from the environment variable {URL_VARIABLE},\n"
        f"else from the worker's own configuration file; never from an argument.\n\nexit status:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(defaults=True)],
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, subcommand in SUBCOMMANDS.items():
        parents = [_common(defaults=False), *([_sending()] if subcommand.sends else [])]
        made = subparsers.add_parser(name, help=subcommand.help, description=subcommand.help, parents=parents)
        for names, how in subcommand.options:
            made.add_argument(*names, **how)
        made.set_defaults(run=subcommand.run, program=PROGRAM)
    return parser
