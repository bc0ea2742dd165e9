"""Builds the lab's guest: kernel, initrd and disks.  Needs no root, no mount, no loop device.

The guest ticks on its serial console once a second and writes a counter, fsynced, to the file
system labelled LABDATA, so that continuity, lost writes and double runs are visible from outside.
It needs 96 MiB of memory.  Its disks: virtio, IDE or virtio-scsi (the kernel has no AHCI).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PARTS = Path(__file__).with_name("guest")
MODULES = (
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon", "virtio_rng",
    "virtio_scsi", "sd_mod", "sr_mod", "ata_piix", "isofs", "vfat", "nls_ascii", "nls_cp437",
    "nls_iso8859-1", "evdev", "button",
)
BINARIES = ("/usr/sbin/qemu-ga", "/usr/sbin/blkid")
MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")
MIB = 1024 * 1024
DATA_MIB = 64
BOOT_MIB = 96
FAT_MIB = 31
MEMORY_MIB = 96


@dataclass(frozen=True)
class GuestImages:
    """Where the built files are.  data.*: a bare ext4; boot.*: boots by itself."""

    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.cpio"

    @property
    def data_raw(self) -> Path:
        return self.directory / "data.raw"

    @property
    def data_qcow2(self) -> Path:
        return self.directory / "data.qcow2"

    @property
    def boot_raw(self) -> Path:
        return self.directory / "boot.raw"

    @property
    def boot_qcow2(self) -> Path:
        return self.directory / "boot.qcow2"

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.iterdir() if path.is_file())


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "compute-worker-lab"


def guest_images(cache: Path | None = None) -> GuestImages:
    """The guest's files, built at most once per content (about 4 s) and kept in `cache`.

    Raises FileNotFoundError when no cloud kernel is installed, subprocess.CalledProcessError
    when a tool fails; a build that dies leaves only a temporary directory in the cache.
    """
    cache = cache or default_cache()
    version = kernel_version()
    target = cache / f"guest-{_content_key(version)}"
    if target.is_dir():
        return GuestImages(target)
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    try:
        out = work / "out"
        out.mkdir()
        _build(out, work, version)
        try:
            out.rename(target)
        except OSError:
            # Somebody else was first; the content is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return GuestImages(target)


def kernel_version() -> str:
    """The newest installed cloud kernel (linux-image-cloud-amd64)."""
    found = list(Path("/boot").glob("vmlinuz-*cloud-amd64"))
    if not found:
        raise FileNotFoundError("no /boot/vmlinuz-*cloud-amd64: install linux-image-cloud-amd64")
    newest = max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    return newest.name.removeprefix("vmlinuz-")


def _content_key(version: str) -> str:
    key = hashlib.sha256(version.encode())
    for path in [Path(__file__), *sorted(PARTS.iterdir()), Path("/bin/busybox"),
                 *map(Path, BINARIES), MBR_CODE]:
        key.update(path.name.encode())
        key.update(path.read_bytes())
    return key.hexdigest()[:16]


def _build(out: Path, work: Path, version: str) -> None:
    root = work / "root"
    _fill_root(root, version)
    _pack_initrd(root, out / "initrd.cpio", out / "initrd.gz")
    shutil.copyfile(f"/boot/vmlinuz-{version}", out / "vmlinuz")
    (work / "empty").mkdir()
    _make_ext4(out / "data.raw", work / "empty", 0, DATA_MIB)
    _make_boot_disk(out, work)
    for name in ("data", "boot"):
        _run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2",
             str(out / f"{name}.raw"), str(out / f"{name}.qcow2"))


def _fill_root(root: Path, version: str) -> None:
    for name in ("bin", "dev", "proc", "sys", "mnt", "lib/modules", "etc/acpi/PWRF", "run",
                 "tmp", "var/run"):
        (root / name).mkdir(parents=True)
    (root / "sbin").symlink_to("bin")
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    applets = _run(str(root / "bin" / "busybox"), "--list").split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for binary in BINARIES:
        _copy_binary(Path(binary), root)
    for name in ("clean-poweroff", "shutdown", "chpasswd"):
        _install(PARTS / name, root / "bin" / name)
    _install(PARTS / "chpasswd", root / "bin" / "passwd")
    _install(PARTS / "init", root / "init")
    button = root / "etc/acpi/PWRF/00000080"
    button.write_text("#!/bin/sh\nexec /bin/clean-poweroff\n")
    button.chmod(0o755)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    _copy_modules(root / "lib/modules", version)


def _install(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def _copy_binary(binary: Path, root: Path) -> None:
    """A dynamic program with the libraries it names."""
    target = root / "bin" / binary.name
    target.unlink(missing_ok=True)
    shutil.copy(binary, target)
    for library in re.findall(r"(/\S+)", _run("ldd", str(binary))):
        copy = root / library.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, copy)
        copy.chmod(0o755)


def _copy_modules(target: Path, version: str) -> None:
    """The modules and what they depend on, with their load order."""
    order: list[str] = []
    for module in MODULES:
        shown = _run("modprobe", "-S", version, "--show-depends", module)
        for source in re.findall(r"^insmod (\S+)", shown, re.MULTILINE):
            name = os.path.basename(source)
            if name not in order:
                shutil.copyfile(source, target / name)
                order.append(name)
    (target / "order").write_text("\n".join(order) + "\n")


def _pack_initrd(root: Path, plain: Path, packed: Path) -> None:
    """Plain for a direct boot: unpacking takes an emulated processor a second. Packed for the small boot disk."""
    script = 'find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet > "$1"; gzip -6n < "$1" > "$2"'
    _run("sh", "-ec", script, "sh", str(plain), str(packed), cwd=root)


def _make_ext4(path: Path, content: Path, offset_mib: int, size_mib: int) -> None:
    with open(path, "ab") as image:
        image.truncate((offset_mib + size_mib) * MIB)
    _run("mkfs.ext4", "-q", "-F", "-L", "LABDATA", "-E", f"offset={offset_mib * MIB}",
         "-d", str(content), str(path), f"{size_mib * 1024}k")


def _make_boot_disk(out: Path, work: Path) -> None:
    """boot.raw: an MBR, FAT16 with syslinux at 1 MiB, ext4 LABDATA behind it."""
    disk, fat = out / "boot.raw", work / "fat"
    first, data = MIB // 512, (FAT_MIB + 1) * MIB // 512
    table = _partition(0x80, 6, first, FAT_MIB * MIB // 512)
    table += _partition(0, 0x83, data, BOOT_MIB * MIB // 512 - data) + bytes(32)
    code = MBR_CODE.read_bytes().ljust(440, b"\0")[:440]
    disk.write_bytes(code + b"LAB0\0\0" + table + b"\x55\xaa")
    with open(fat, "wb") as image:
        image.truncate(FAT_MIB * MIB)
    _run("mformat", "-i", str(fat), "-T", str(FAT_MIB * MIB // 512), "-h", "64", "-s", "32",
         "-H", str(first), "-v", "LABBOOT", "::")
    _run("mcopy", "-i", str(fat), str(out / "vmlinuz"), str(out / "initrd.gz"),
         str(PARTS / "syslinux.cfg"), "::")
    _run("syslinux", "--install", str(fat))
    _run("dd", f"if={fat}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse", "status=none")
    _make_ext4(disk, work / "empty", FAT_MIB + 1, BOOT_MIB - FAT_MIB - 1)


def _partition(boot: int, kind: int, start: int, sectors: int) -> bytes:
    chs = b"\xfe\xff\xff"
    return struct.pack("<B3sB3sII", boot, chs, kind, chs, start, sectors)


def _run(*argv: str, cwd: Path | None = None) -> str:
    path = "/usr/sbin:/sbin:" + os.environ.get("PATH", "/usr/bin:/bin")
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "PATH": path}, timeout=120)
    return done.stdout
