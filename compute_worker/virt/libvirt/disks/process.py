"""Run a program on bytes that a stranger wrote: under limits, cancellable, and gone when we are.

``setpriv`` and ``prlimit`` (both util-linux) set up the child from the outside: running our own code between fork and
exec is not safe in a process with threads.
"""

from __future__ import annotations

import selectors
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compute_worker import errors

if TYPE_CHECKING:
    from compute_worker.virt.driver import Job

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C"}
_LOOK_SECONDS = 0.5
_MAX_OUTPUT = 1 << 20
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use: seconds of processor, bytes of address space. ``None``: no limit."""

    cpu_seconds: int | None = None
    address_space_bytes: int | None = None


def find_program(name: str) -> str | None:
    """Where ``name`` is installed, ``None`` where it is not."""
    return shutil.which(name, path=PATH)


def run(
    argv: Sequence[str | Path],
    job: Job,
    *,
    limits: Limits,
    writes: Path | None = None,
    on_output: Callable[[bytes], None] | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run ``argv`` to its end and return what it printed (at most 1 MiB of it).

    The child gets no environment but ``environment``, no input, and is killed when the job is cancelled or this thread
    dies, which it does with the process.

    :param writes: the file it writes, named by ``DiskFull``.
    :param on_output: gets every piece of its standard output as it comes.
    :raises compute_worker.errors.Cancelled: and the child is dead.
    :raises compute_worker.errors.CommandFailed: program and subcommand, status, last line of its errors.
    :raises compute_worker.errors.DiskFull: it ran out of room.
    """
    words = [str(word) for word in argv]
    name = " ".join([Path(words[0]).name, *words[1:2]]) if words[0].endswith("qemu-img") else Path(words[0]).name
    job.check()
    try:
        child = subprocess.Popen(
            [*_wrapper(limits), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_ENVIRONMENT, **(environment or {})},
            cwd=cwd or "/",
            start_new_session=True,
        )
    except OSError as exc:
        raise errors.CommandFailed(command=name, status="not started", stderr=str(exc.strerror)) from None
    try:
        with job.on_cancel(child.kill):
            output, complaint = _drain(child, job, on_output)
            status = child.wait()
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
    if status != 0:
        job.check()
        raise _failure(name, status, complaint.decode(errors="replace"), writes)
    return output.decode(errors="replace")


def _wrapper(limits: Limits) -> list[str]:
    words = ["setpriv", "--pdeathsig", "KILL", "--", "prlimit", "--core=0"]
    if limits.cpu_seconds is not None:
        # SIGXCPU at the soft limit says what happened, SIGKILL at the hard one would not.
        words.append(f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}")
    if limits.address_space_bytes is not None:
        words.append(f"--as={limits.address_space_bytes}")
    return [*words, "--"]


def _drain(
    child: subprocess.Popen[bytes], job: Job, on_output: Callable[[bytes], None] | None
) -> tuple[bytes, bytes]:
    """Read both pipes to their ends, keeping the beginning of the output and the end of the errors."""
    assert child.stdout is not None and child.stderr is not None
    output, complaint = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        selector.register(child.stderr, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(_LOOK_SECONDS):
                piece: bytes = key.fileobj.read1(65_536)  # type: ignore[union-attr]
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is child.stderr:
                    complaint = (complaint + piece)[-4096:]
                else:
                    output += piece[: _MAX_OUTPUT - len(output)]
                    if on_output is not None:
                        on_output(piece)
            job.check()
    return bytes(output), bytes(complaint)


def _failure(name: str, status: int, complaint: str, writes: Path | None) -> errors.ComputeError:
    if any(text in complaint for text in _FULL) or status == -signal.SIGXFSZ:
        return errors.DiskFull(path=str(writes) if writes else "the disk")
    said: str = str(status)
    if status < 0:
        with suppress(ValueError):
            said = signal.Signals(-status).name
        if status == -signal.SIGXCPU:
            said += " (processor time limit)"
    lines = [line for line in complaint.splitlines() if line.strip()]
    last = "".join(char if char.isprintable() else "?" for char in (lines[-1] if lines else ""))
    return errors.CommandFailed(command=name, status=said, stderr=last[-500:])
