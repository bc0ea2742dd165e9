"""Every benchmark runs, with tiny numbers, and says what it measured; what judges 10,000 casts finds what is wrong."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from compute_worker.objects import Operation, StepRecord
from compute_worker.operations.database import Database
from compute_worker.operations.schema import SCHEMA
from compute_worker.states import OperationState
from compute_worker.virt.simulated.host import SimulatedHost
from tests.lab.rabbit import BIN
from tests.lab.requirements import missing

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_accept  # noqa: E402
import bench_blackout  # noqa: E402
import bench_casts  # noqa: E402
import common  # noqa: E402
import lab_moves  # noqa: E402
import moves  # noqa: E402

NEEDS_BROKER = {
    "bench_casts.py": (["--casts", "40", "--kills", "3", "--window", "4"], {"lost", "effects_twice", "rate"}),
    "bench_accept.py": (
        ["--calls", "12", "--rounds", "1", "--queue", "classic", "--in-flight", "1,4"],
        {"classic_1_echo", "classic_1_accept", "classic_4_accept"},
    ),
    "bench_start.py": (
        ["--starts", "1", "--operations", "4", "--rest", "0.5"],
        {"ready_s", "healthy_s", "rss_rest_mib", "rss_after_mib", "threads_rest", "idle_cores"},
    ),
    "bench_boot_cpu.py": (["--boots", "4", "--warm", "1"], {"boot_cpu_ms", "broker_cpu_ms", "boots_per_s"}),
    "bench_resize_cpu.py": (
        ["--resizes", "2", "--warm", "1", "--at-once", "4"],
        {"memory_resize_cpu_ms", "rabbitmq_resize_cpu_ms", "rabbitmq_confirm_cpu_ms", "rabbitmq_at_once_s"},
    ),
    "bench_live_cpu.py": (
        ["--moves", "2", "--warm", "1", "--at-once", "4"],
        {"memory_live_cpu_ms", "rabbitmq_live_cpu_ms", "rabbitmq_live_broker_ms", "rabbitmq_live_at_once_s"},
    ),
}
NEEDS_LAB = {
    "bench_spawn.py": (["--rounds", "1"], {"worker_s", "bare_s", "overhead_s", "cold_s"}),
    "bench_transfer.py": (
        ["--mib", "4", "--rounds", "1"],
        {"nbd_bytes_ratio", "nbd_wall_ratio", "ssh_bytes_ratio", "ssh_wall_ratio"},
    ),
    "bench_blackout.py": (
        ["--mib", "4", "--rounds", "1"],
        {"4_warm_after_s", "4_cold_after_s", "4_warm_gap_s", "4_restart_gap_s", "4_bare_mib_s"},
    ),
    "bench_snapshot.py": (
        ["--sizes", "64/1", "--rounds", "1"],
        {"64_wall_ratio", "64_s", "64_gap_s", "64_second_read_mib", "64_room_mib", "rss_mib"},
    ),
    "bench_live.py": (
        ["--mib", "4", "--rounds", "1", "--at-once", "2"],
        {"ours_beyond_s", "ours_downtime_s", "bare_job_s", "bare_wall_s", "downtime_ratio", "bare_at_once_s"},
    ),
}
UUID = "00000000-0000-4000-8000-000000000001"
JOURNAL = ["--steps", "2", "--repeats", "2", "--seconds", "0.2"]


def result(name: str, *arguments: str, timeout: float = 110) -> dict:
    argv = [sys.executable, str(BENCHMARKS / name), "--json", *arguments]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def check(found: dict, figures: set[str]) -> None:
    assert figures <= set(found["figures"])
    assert "CPUs" in found["machine"] and "load" in found["machine"]
    assert all(row["what"] and row["value"] for row in found["rows"])


def test_every_script_is_tried_here() -> None:
    tried = {*NEEDS_BROKER, *NEEDS_LAB, "bench_journal.py"}
    assert {path.name for path in BENCHMARKS.glob("bench_*.py")} == tried


@pytest.mark.functional
@pytest.mark.parametrize("name", sorted(NEEDS_BROKER))
def test_runs_over_rabbitmq(name: str) -> None:
    if not (BIN / "rabbitmq-server").exists() and not os.environ.get("CI"):
        pytest.skip("RabbitMQ is not installed (rabbitmq-server)")
    arguments, figures = NEEDS_BROKER[name]
    found = result(name, *arguments)
    check(found, figures)
    if name == "bench_casts.py":
        assert found["figures"]["casts"] == 40
        assert 1 <= found["figures"]["kills"] <= 3, "the last one may come too late for so few casts"
        assert (found["figures"]["lost"], found["figures"]["effects_missing"], found["figures"]["wrong"]) == (0, 0, [])


def test_journal_runs_and_prints_a_table() -> None:
    found = result("bench_journal.py", *JOURNAL)
    check(found, {"disk_ms", "step_ms", "writers_1", "writers_64"})
    argv = [sys.executable, str(BENCHMARKS / "bench_journal.py"), *JOURNAL]
    table = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    assert table.startswith("journal  (") and "goal <= 3 ms" in table and "64 writers" in table


@pytest.mark.lab
@pytest.mark.lab_full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(NEEDS_LAB))
def test_runs_on_real_hosts(name: str) -> None:
    """Minutes: a guest without KVM is booted a dozen times."""
    if lacking := missing():
        pytest.skip(f"real libvirt hosts need {'; '.join(lacking)}")
    arguments, figures = NEEDS_LAB[name]
    found = result(name, *arguments, timeout=570)
    check(found, figures)
    if name == "bench_transfer.py":
        assert 0.9 < found["figures"]["nbd_bytes_ratio"] < 2, "the cable carried what it should, and something else?"
    if name == "bench_blackout.py":
        assert found["figures"]["4_restart_gap_s"] > 1, "no guest boots in a second"


# --- what judges casts ----------------------------------------------------------------------------------------------


@pytest.fixture
def life() -> bench_casts.Life:
    """An instance that was built and stopped."""
    life = bench_casts.Life(0, 2)
    life.operations += ["op-build", "op-stop"]
    return life


@pytest.fixture
def host(tmp_path: Path, life: bench_casts.Life) -> SimulatedHost:
    """Where all of that happened once."""
    host = SimulatedHost(common.HOST, directory=tmp_path / "host")
    for effect, times in life.expected().items():
        for _ in range(times):
            host.effect(life.instance.uuid, effect)
    return host


def test_every_effect_once_is_good(tmp_path: Path, life: bench_casts.Life, host: SimulatedHost) -> None:
    host.close()
    assert bench_casts.judge_effects(tmp_path / "host", [life]) == (0, 0, [])


@pytest.mark.parametrize(("effect", "missing_", "twice"), [("boot", 0, 1), ("kill", 0, 1)])
def test_an_effect_too_many_is_found(
    tmp_path: Path, life: bench_casts.Life, host: SimulatedHost, effect: str, missing_: int, twice: int
) -> None:
    host.effect(life.instance.uuid, effect)
    host.close()
    found = bench_casts.judge_effects(tmp_path / "host", [life])
    assert found[:2] == (missing_, twice) and effect in found[2][0]


def test_a_missing_effect_is_found(tmp_path: Path, life: bench_casts.Life) -> None:
    SimulatedHost(common.HOST, directory=tmp_path / "host").close()
    missing_, twice, wrong = bench_casts.judge_effects(tmp_path / "host", [life])
    assert (missing_, twice) == (life.expected().total(), 0) and len(wrong) == len(life.expected())


def journal(path: Path, *operations: tuple[str, str], inbox: int = 0) -> Path:
    Database(path, [SCHEMA]).close()
    with sqlite3.connect(path) as rows:
        for key, (uuid, state) in enumerate(operations):
            rows.execute(
                "INSERT INTO operations (key, derived_key, digest, uuid, chain, kind, args, state, committed, phase,"
                " created_at, updated_at, seq) VALUES (?, 0, '', ?, '', '', '', ?, 1, '', 0, 0, ?)",
                (str(key), uuid, state, key),
            )
        for number in range(inbox):
            rows.execute("INSERT INTO inbox (message_id, body, received_at) VALUES (?, '', 0)", (str(number),))
    return path


@pytest.mark.parametrize(
    ("operations", "inbox", "said"),
    [
        ([("op-build", "done"), ("op-stop", "done")], 0, []),
        ([("op-build", "done")], 0, ["op-stop is in the journal 0 times"]),
        ([("op-build", "done"), ("op-stop", "undone")], 0, ["op-stop ended undone"]),
        ([("op-build", "done"), ("op-stop", "done"), ("op-stop", "done")], 0, ["op-stop is in the journal 2 times"]),
        ([("op-build", "done"), ("op-stop", "running")], 2, ["op-stop ended running", "2 rows are left in the inbox"]),
    ],
)
def test_journal_is_judged(
    tmp_path: Path, life: bench_casts.Life, operations: list[tuple[str, str]], inbox: int, said: list[str]
) -> None:
    wrong = bench_casts.judge_journal(journal(tmp_path / "journal", *operations, inbox=inbox), [life])
    assert len(wrong) == len(said) and all(text in line for text, line in zip(said, wrong, strict=True))


def test_an_end_that_was_never_told_or_told_twice_is_found(life: bench_casts.Life) -> None:
    conductor = bench_casts.Conductor(None, 10, 1)  # type: ignore[arg-type]
    conductor.lives = [life]
    conductor.finals = {"op-build": Counter({("instance.create.end", 2): 3})}
    assert [line for line in bench_casts.judge_notifications(conductor) if "op-stop" in line and "0 times" in line]
    conductor.finals["op-stop"] = Counter({("instance.power_off.end", 2): 1, ("instance.power_off.end", 3): 1})
    assert [line for line in bench_casts.judge_notifications(conductor) if "op-stop" in line and "2 times" in line]
    conductor.finals["op-stop"] = Counter({("instance.power_off.end", 2): 2})
    assert bench_casts.judge_notifications(conductor) == [], "the same one again is no other one"


def test_a_goal_that_is_missed_is_said() -> None:
    report = common.Report("accept")
    bare, accept = (bench_accept.Side(name, lambda _: None, 0, lambda _: None) for name in ("echo", "accept"))
    for side, milliseconds, rate in ((bare, 4.0, 200.0), (accept, 9.0, 100.0)):
        side.seconds[1], side.rates[1], side.cpu[1] = [milliseconds / 1000], [rate], [1.0]
    bench_accept.compare(report, "classic", bare, accept, 1)
    assert [(row.value, row.good) for row in report.rows[2:]] == [("+5.0 ms", False), ("0.50", False)]
    assert report.text().count("MISSED") == 2


def test_percentiles() -> None:
    values = [float(n) for n in range(101)]
    assert (common.percentile(values, 0), common.median(values), common.percentile(values, 0.99)) == (0, 50, 99)
    assert common.percentile([7.0], 0.99) == 7.0


# --- what measures moves --------------------------------------------------------------------------------------------

OFF = 1_000.0
"""When the guest of the tests was asked to shut down."""


def operation(*steps: StepRecord) -> Operation:
    return Operation(
        uuid=UUID, kind="resize_instance", host="node1", state=OperationState.DONE, phase="", created_at=0,
        updated_at=0, steps=list(steps),
    )  # fmt: skip


def step(name: str, begin: float, end: float | None, direction: str = "do") -> StepRecord:
    return StepRecord(name=name, direction=direction, state="done", started_at=begin, ended_at=end)


def test_blackout_is_told_by_both_hypervisors() -> None:
    seen = lab_moves.Seen(
        events=[
            ("node1", OFF - 50, "Stopped Shutdown"), ("node1", OFF + 2, "Stopped Shutdown"),
            ("node2", OFF - 40, "Resumed Unpaused"), ("node2", OFF + 2.25, "Defined Added"),
            ("node2", OFF + 2.5, "Started Booted"), ("node2", OFF + 2.75, "Resumed Unpaused"),
        ],
        ticks=[("node1", OFF - 1, 7), ("node1", OFF + 0.5, 8), ("node2", OFF + 6, 9), ("node2", OFF + 7, 10)],
        carried=[(OFF, 100), (OFF + 1.9, 300), (OFF + 2.4, 1_300), (OFF + 2.7, 1_500), (OFF + 5, 9_000)],
    )  # fmt: skip
    found = bench_blackout.blackout(seen, operation(step("power_off", OFF, OFF + 2)), "node2")
    assert (found.shutdown, found.after, found.off, found.gap, found.sent) == (2, 0.75, 2.75, 5.5, 1_200)
    assert found.start == 0.25
    with pytest.raises(AssertionError, match="node1 did not tell 'Resumed'"):
        seen.event("node1", "Resumed")


def test_seconds_of_a_step_that_was_tried_twice() -> None:
    ended = operation(step("send_disk", 1, 3), step("send_disk", 10, 14, "undo"), step("send_disk", 20, 25))
    assert moves.seconds_of(ended, "send_disk") == 7
    with pytest.raises(AssertionError, match="no ended step 'verify_copy'"):
        moves.seconds_of(ended, "verify_copy")


@pytest.mark.parametrize(("after", "good"), [(0.6, True), (0.8, False)])
def test_a_blackout_is_measured_by_what_was_left_to_send(after: float, good: bool) -> None:
    report = common.Report("blackout")
    runs = [bench_blackout.Blackout(2.0, after, 8.0, 10 << 20)]
    bench_blackout.tell(report, 256, {"restart": runs, "warm": runs, "cold": runs}, 50 << 20)
    warm = next(row for row in report.rows if "256 MiB, warm: s to shut" in row.what)
    assert (warm.goal, warm.good) == ("<= 0.70 after it", good)


def test_events_of_virsh() -> None:
    line = "2026-11-23 23:53:12.250+0000: event 'lifecycle' for domain 'instance-1': Stopped Shutdown"
    assert lab_moves._event(line) == (1_795_477_992.25, "Stopped Shutdown")
    assert lab_moves._event("events received: 3") is None
