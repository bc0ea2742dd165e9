from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.disks.process import Limits, find_program, run
from tests.images.support import Job
from tests.waiting import wait_for

NONE = Limits()


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-c", code]


def test_output_and_an_empty_environment(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSPORT_URL", "rabbit://user:secret@host")
    printed = run(python("import os; print(sorted(os.environ))"), job, limits=NONE)
    assert "TRANSPORT_URL" not in printed
    assert "PATH" in printed


def test_output_arrives_in_pieces_and_is_bounded(job: Job) -> None:
    pieces: list[bytes] = []
    text = run(python("print('x' * 3_000_000)"), job, limits=NONE, on_output=pieces.append)
    assert len(text) == 1 << 20
    assert sum(map(len, pieces)) == 3_000_001


def test_failure_says_program_status_and_last_line_only(job: Job) -> None:
    code = r"import sys; sys.stderr.write('secret first line\nlast\x1b[31m line\n\n'); sys.exit(3)"
    with pytest.raises(errors.CommandFailed) as caught:
        run(python(code), job, limits=NONE)
    assert caught.value.kwargs["status"] == "3"
    assert caught.value.kwargs["stderr"] == "last?[31m line"
    assert "secret" not in caught.value.message
    assert code not in caught.value.message


def test_a_program_that_is_not_there(job: Job) -> None:
    with pytest.raises(errors.CommandFailed, match="no-such-program"):
        run(["no-such-program"], job, limits=NONE)
    assert find_program("no-such-program") is None


@pytest.mark.parametrize("text", ["No space left on device", "Disk quota exceeded", "File too large"])
def test_no_room(job: Job, text: str, tmp_path: Path) -> None:
    with pytest.raises(errors.DiskFull, match="target"):
        run(python(f"import sys; sys.exit('write: {text}')"), job, limits=NONE, writes=tmp_path / "target")


def test_processor_limit(job: Job) -> None:
    with pytest.raises(errors.CommandFailed, match="SIGXCPU"):
        run(python("while True: pass"), job, limits=Limits(cpu_seconds=1))


def test_memory_limit(job: Job) -> None:
    with pytest.raises(errors.CommandFailed, match="MemoryError"):
        run(python("bytearray(1 << 30)"), job, limits=Limits(address_space_bytes=512 << 20))


def test_cancel_kills_the_child(job: Job) -> None:
    pids: list[int] = []
    outcome: list[type[BaseException]] = []

    def work() -> None:
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
        try:
            run(python(code), job, limits=NONE, on_output=lambda piece: pids.append(int(piece)))
        except errors.ComputeError as exc:
            outcome.append(type(exc))

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: pids, what="the child")
    job.cancel()
    thread.join(5)
    assert outcome == [errors.Cancelled]
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_cancelled_job_starts_nothing(job: Job, tmp_path: Path) -> None:
    job.cancel()
    with pytest.raises(errors.Cancelled):
        run(["touch", tmp_path / "x"], job, limits=NONE)
    assert not (tmp_path / "x").exists()


def test_the_child_dies_with_us() -> None:
    code = (
        "import sys\nfrom compute_worker.virt.driver import NullJob\n"
        "from compute_worker.virt.libvirt.disks.process import Limits, run\n"
        "show = lambda piece: (sys.stdout.buffer.write(piece), sys.stdout.flush())\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(100)'\n"
        "run([sys.executable, '-I', '-c', child], NullJob(), limits=Limits(), on_output=show)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def gone() -> bool:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    wait_for(gone, what="the orphan's end")
