"""PID 1 of a host: runs in fresh namespaces, mounts what its plan says, then holds the host up.

Run as a script by `tests.lab.namespaces`, with the plan as JSON in argv[1].  Standard library
only, and nothing of this package: it starts with `python -I -S`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable

MS_BIND, MS_REC = 0x1000, 0x4000
# A mount point may be created only below these, which are private to the host by then.
PRIVATE = ("/etc/", "/var/", "/run/")

libc = ctypes.CDLL(None, use_errno=True)


def mount(
    source: str, target: str, fstype: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    def raw(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    if libc.mount(raw(source), raw(target), raw(fstype), flags, raw(data)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {source} on {target}: {os.strerror(code)}")


def step_proc(target: str) -> None:
    mount("proc", target, "proc")


def step_sysfs(target: str) -> None:
    # The new network namespace's /sys/class/net; its /sys/fs/cgroup is empty, as wanted.
    mount("sysfs", target, "sysfs")


def step_overlay(target: str, upper: str, work: str) -> None:
    options = f"lowerdir={target},upperdir={upper},workdir={work}"
    mount("lab", target, "overlay", 0, options)


def step_bind(source: str, target: str) -> None:
    if not os.path.exists(target):
        if not target.startswith(PRIVATE):
            raise RuntimeError(f"{target} is missing, and would be made on the machine itself")
        os.makedirs(target)
    mount(source, target, None, MS_BIND | MS_REC)


def step_dev(stage: str, hidden: list[str]) -> None:
    """A /dev of the host's own, without the devices named in `hidden`."""
    mount("dev", stage, "tmpfs", 0, "mode=755,size=64k")
    for entry in os.scandir("/dev"):
        own = os.path.join(stage, entry.name)
        info = entry.stat(follow_symlinks=False)
        if entry.name in hidden or entry.name in ("shm", "mqueue"):
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), own)
        elif entry.is_dir():
            os.mkdir(own)
            mount(entry.path, own, None, MS_BIND | MS_REC)
        elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            os.mknod(own, info.st_mode, info.st_rdev)
            os.chown(own, info.st_uid, info.st_gid)
            os.chmod(own, stat.S_IMODE(info.st_mode))
    os.mkdir(os.path.join(stage, "shm"))
    mount("shm", os.path.join(stage, "shm"), "tmpfs", 0, "mode=1777")
    mount(stage, "/dev", None, MS_BIND | MS_REC)


def closed_ancestor(path: str, private: list[str]) -> str | None:
    """The topmost directory above `path` that is private or closed to ordinary users, or None."""
    parts = path.strip("/").split("/")
    for depth in range(1, len(parts)):
        above = "/" + "/".join(parts[:depth])
        if above in private or not os.stat(above).st_mode & stat.S_IXOTH:
            return above
    return None


def step_expose(stage: str, paths: list[str], private: list[str]) -> None:
    """Let ordinary users of this host reach `paths`, under the very same names.

    A directory on the way that is closed to them (/root, say) is covered by an empty file
    system, in which only these paths appear.  So is each of `private` (/tmp): the host's own.
    """
    mount("expose", stage, "tmpfs", 0, "mode=755,size=64k")
    covered: dict[str, list[tuple[int, str]]] = {name: [] for name in private}
    for number, path in enumerate(sorted(set(paths))):
        closed = closed_ancestor(os.path.realpath(path), private)
        closed = closed or closed_ancestor(path, private)
        if closed:
            holder = os.path.join(stage, str(number))
            os.mkdir(holder)
            mount(os.path.realpath(path), holder, None, MS_BIND | MS_REC)
            # Held open: the stage itself may be below what is covered next.
            held_open = os.open(holder, os.O_RDONLY | os.O_DIRECTORY)
            covered.setdefault(closed, []).append((held_open, path))
            if os.path.realpath(path) != path:
                covered[closed].append((held_open, os.path.realpath(path)))
    for closed, held in sorted(covered.items()):
        options = "mode=1777" if closed in private else "mode=755,size=64k"
        mount("expose", closed, "tmpfs", 0, options)
        for held_open, path in held:
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{held_open}", path, None, MS_BIND | MS_REC)
    for held_open in {held_open for held in covered.values() for held_open, _ in held}:
        os.close(held_open)


STEPS: dict[str, Callable[..., None]] = {
    "proc": step_proc,
    "sysfs": step_sysfs,
    "overlay": step_overlay,
    "bind": step_bind,
    "dev": step_dev,
    "expose": step_expose,
}


def main() -> None:
    plan = json.loads(sys.argv[1])
    # /proc is still the machine's: this is our pid as seen from outside.
    outer_pid = os.readlink("/proc/self")
    socket.sethostname(plan["hostname"])
    for name, *arguments in plan["steps"]:
        STEPS[name](*arguments)
    os.chdir("/")
    # PID 1 must reap; with SIGCHLD ignored the kernel does it for us, across exec too.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(plan["ready_fd"], f"{outer_pid}\n".encode())
    os.close(plan["ready_fd"])
    # With a lifeline on standard input the host dies when its last writer does.
    holder = ["cat"] if plan["lifeline"] else ["sleep", "infinity"]
    null = os.open("/dev/null", os.O_WRONLY)
    os.dup2(null, 1)
    os.execvp(holder[0], holder)


if __name__ == "__main__":
    main()
