"""Files that survive a power failure, and errors of the file system in our own words.

The order is always: write ``X.part``, fsync it, rename it to ``X``, fsync the directory. A name without ``.part`` is
therefore whole, whatever died when.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compute_worker import errors

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SHARED = ("nfs", "cifs", "smb", "ceph", "gluster", "ocfs2", "gfs2", "lustre", "gpfs", "beegfs", "moosefs", "virtiofs")
_MODE_BITS = 0o777


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into ours.

    :raises compute_worker.errors.DiskFull: no space, quota or file size left; ``path`` says where.
    :raises compute_worker.errors.Broken: anything else, with the system's reason.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise errors.DiskFull(path=str(path)) from None
        raise errors.Broken(f"{path}: {exc.strerror or exc}") from exc


def fsync(path: Path) -> None:
    """Bring a file's or directory's content to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_private(path: Path, mode: int = 0o600) -> None:
    """Make an empty file with exactly this mode, replacing what was there; a program then fills it.

    A writer that died long ago may still hold the old file: it goes on writing to a file that has no name any more.
    """
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def publish(part: Path, final: Path) -> None:
    """Give a finished ``part`` its name, durably: fsync, rename, fsync of the directory."""
    fsync(part)
    os.rename(part, final)
    fsync(final.parent)


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``: whoever looks, also after a power failure, sees the old or the new whole.

    :raises compute_worker.errors.DiskFull: and the old content is still there.
    """
    part = path.with_name(path.name + ".part")
    with disk_errors(path):
        try:
            create_private(part, mode)
            part.write_bytes(data)
            publish(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it, also while somebody else removes files from it. Follows no symbolic link."""

    def failed(function: object, name: object, info: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    shutil.rmtree(path, onerror=failed)


def give_to_group(path: Path, group: str, mode: int) -> None:
    """Set the mode, and the group where one is named (the hypervisor's, so that it may read and write)."""
    if group:
        import grp

        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid, follow_symlinks=False)
        except KeyError:
            raise errors.Broken(f"group {group!r} (libvirt.disk_owner_group) does not exist on this host") from None
    if stat.S_IMODE(path.lstat().st_mode) & _MODE_BITS != mode:
        path.chmod(mode)


def allocated_bytes(path: Path) -> int:
    """Bytes the file occupies, holes not counted."""
    return path.stat().st_blocks * 512


def unescape_mount(text: str) -> str:
    """A path as ``/proc/self/mountinfo`` writes it, blanks escaped in octal."""
    return text.encode().decode("unicode_escape").encode("latin-1").decode()


def is_shared(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether ``path`` lies on a file system that other hosts may see too, by the mount's type."""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount = unescape_mount(before.split()[4])
        inside = mount in ("/", real) or real.startswith(mount + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, after.split()[0]
    kind = kind.removeprefix("fuse.")
    return kind.startswith(_SHARED)
