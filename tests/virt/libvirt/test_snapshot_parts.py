"""Snapshots of a guest whose hypervisor does what the test says; disks, images and servers are real."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.states import PowerState
from compute_worker.virt.libvirt import snapshot_parts, snapshot_point
from compute_worker.virt.libvirt.snapshot import live, record
from compute_worker.virt.libvirt.snapshot.reading import Unreadable
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.snapshot.fakeguest import Died, qemu
from tests.virt.libvirt.snapshot.support import MIB, SIZE, UUID, Bench
from tests.virt.world import run, undo

Make = Callable[..., Bench]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Bench] = []
    # pytest's own are too long for sockets.
    with tempfile.TemporaryDirectory(prefix="cw-") as root:

        def bench(*words: Any, **options: Any) -> Bench:
            made.append(Bench(Path(root, str(len(made))), *words, **options))
            return made[-1]

        yield bench
        for one in made:
            one.guest.end()


@pytest.fixture
def bench(make: Make) -> Bench:
    return make()


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
@pytest.mark.parametrize("power", [PowerState.RUNNING, PowerState.PAUSED, PowerState.SHUTDOWN, PowerState.SUSPENDED])
def test_the_image_is_the_disk(make: Make, fmt: str, disk_format: str, power: PowerState) -> None:
    bench = make(fmt)
    bench.guest.writes("write -P 7 1M 100k", f"write -P 9 {SIZE - 512} 512")
    bench.guest.power = power
    before = bench.flat()
    told = run(bench.parts(disk_format=disk_format), bench.job)
    image = bench.images / "snap1"
    assert bench.flat(image, disk_format) == before
    assert told["image"]["size_bytes"] == image.stat().st_size and told["image"]["min_disk_gb"] == 1
    assert image.stat().st_blocks * 512 < 8 * MIB
    assert bench.guest.power is power
    chained = fmt == "qcow2" and power in (PowerState.RUNNING, PowerState.PAUSED)
    bench.assert_clean("snap1", checkpoints=1 if chained else 0)
    assert ("fs_freeze" in bench.guest.calls) == (power is PowerState.RUNNING)


def test_what_the_guest_writes_after_the_freeze_is_not_in_it(bench: Bench) -> None:
    parts = bench.parts()
    before = bench.flat()
    run(parts[:2], bench.job)
    assert not bench.guest.frozen and bench.guest.calls == ["fs_freeze", "backup_begin", "fs_thaw"]
    bench.guest.writes("write -P 7 1M 1M")
    run(bench.parts(), bench.job)
    assert bench.flat(bench.images / "snap1") == before


def test_the_second_reads_what_was_written_since(bench: Bench) -> None:
    bench.snap(1)
    bench.guest.writes("write -P 7 30M 128k", "write -z 11M 64k")
    wanted = bench.flat()
    parts, job = bench.parts(2), RecordingJob()
    told = [part.do(job) for part in parts]
    assert bench.flat(bench.images / "snap2") == wanted
    assert told[2] is not None and 128 << 10 <= told[2]["read_bytes"] <= 256 << 10
    bench.assert_clean("snap1", "snap2", checkpoints=1)
    bench.guest.writes("write -P 8 40M 64k")
    wanted = bench.flat()
    assert bench.flat(bench.snap(3, disk_format="raw"), "raw") == wanted
    bench.guest.writes("write -P 8 41M 64k")
    wanted = bench.flat()
    assert bench.flat(bench.snap(4)) == wanted and bench.said("only what was written since")


def _other_file(bench: Bench) -> None:
    (bench.images / "snap1").write_bytes(b"not what it was")


def _gone(bench: Bench) -> None:
    bench.deeds.disks.stores.get().delete("snap1")


def _moved(bench: Bench) -> None:
    for name in bench.guest.checkpoints():
        bench.guest.delete_checkpoint(name)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_other_file, "not in this store any more as it was"),
        (_gone, "not in this store any more as it was"),
        (_moved, "does not have the last image's checkpoint"),
        (lambda bench: bench.guest.forget_bitmaps(), "cannot say what was written since"),
    ],
)
def test_nothing_is_built_on_what_is_not_there(bench: Bench, spoil: Callable[[Bench], None], why: str) -> None:
    bench.snap(1)
    spoil(bench)
    bench.guest.writes("write -P 7 30M 128k")
    wanted = bench.flat()
    assert bench.flat(bench.snap(2)) == wanted
    assert bench.said(why)
    assert len(bench.guest.marks) == 1


def test_a_parent_that_goes_while_it_is_built_on(bench: Bench) -> None:
    bench.snap(1)
    bench.guest.writes("write -P 7 30M 128k")
    wanted = bench.flat()
    run(bench.parts(2)[:2], bench.job)
    _gone(bench)
    run(bench.parts(2), bench.job)
    assert bench.flat(bench.images / "snap2") == wanted


def test_an_image_of_a_guest_that_is_off_ends_the_chain(bench: Bench) -> None:
    bench.snap(1)
    bench.guest.power = PowerState.SHUTDOWN
    wanted = bench.flat()
    assert bench.flat(bench.snap(2)) == wanted
    bench.assert_clean("snap1", "snap2")
    bench.guest.power = PowerState.RUNNING
    bench.snap(3)
    assert bench.said("does not have the last image's checkpoint")


def _other_size(bench: Bench) -> None:
    qemu("qemu-img", "resize", "--shrink", "-f", "qcow2", bench.images / "snap1", SIZE - 512)


def _no_qcow2(bench: Bench) -> None:
    (bench.images / "snap1").write_bytes(b"nothing of the kind")


@pytest.mark.parametrize("spoil", [_other_size, _no_qcow2])
def test_a_parent_that_is_none_and_looks_as_it_was(
    bench: Bench, spoil: Callable[[Bench], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.snap(1)
    bench.guest.writes("write -P 7 30M 128k")
    wanted = bench.flat()
    monkeypatch.setattr(snapshot_point.Points, "published_path", lambda *_: bench.images / "snap1")
    run(bench.parts(2)[:2], bench.job)
    spoil(bench)
    told = bench.parts(2)[2].do(bench.job)
    assert told is not None and told["read_bytes"] > 3 * MIB
    bench.parts(2)[3].do(bench.job)
    assert bench.flat(bench.images / "snap2") == wanted


@pytest.mark.parametrize(("option", "compression", "why"), [
    ({"snapshot_incremental": False}, "none", "snapshot_incremental is off"),
    ({}, "zstd", "a compressed image is made from the whole disk"),
])  # fmt: skip
def test_full_because_it_is_wanted_so(make: Make, option: dict[str, Any], compression: str, why: str) -> None:
    bench = make(**option)
    bench.snap(1)
    wanted = bench.flat()
    assert bench.flat(bench.snap(2, compression=compression)) == wanted
    assert bench.said(why)


@pytest.mark.parametrize("power", [PowerState.RUNNING, PowerState.SHUTDOWN])
@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed(bench: Bench, compression: str, power: PowerState) -> None:
    bench.guest.writes("write -P 7 30M 8M")
    bench.guest.power = power
    wanted = bench.flat()
    image = bench.snap(compression=compression)
    assert bench.flat(image) == wanted and image.stat().st_size < 4 * MIB
    assert f"compression type: {compression}" in qemu("qemu-img", "info", "-f", "qcow2", image)


def test_a_header_that_the_guest_wrote_is_data(make: Make, tmp_path: Path) -> None:
    """CVE-2015-7548."""
    bench = make("raw")
    (tmp_path / "secret").write_bytes(b"secret" * 100_000)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", tmp_path / "evil", SIZE)
    with open(bench.disk, "r+b") as disk:
        disk.write((tmp_path / "evil").read_bytes())
    for number, power in enumerate((PowerState.RUNNING, PowerState.SHUTDOWN), 1):
        bench.guest.power = power
        wanted = bench.disk.read_bytes()
        assert b"secretsecret" not in wanted
        assert bench.flat(bench.snap(number), "qcow2") == wanted
        assert bench.flat(bench.snap(number + 10, compression="zlib"), "qcow2") == wanted


def test_the_place_is_for_nobody_else(bench: Bench) -> None:
    """CVE-2013-7048."""
    run(bench.parts()[:2], bench.job)
    place = bench.directory / "snapshot.part"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in place.iterdir() if path.name != "nbd")
    bench.undo(2)


# --- the guest -----------------------------------------------------------------------------------------------------


def test_no_agent(bench: Bench) -> None:
    bench.guest.agent = False
    bench.snap()
    assert bench.said("as after a power failure") and bench.said("not connected")
    bench.assert_clean("snap1", checkpoints=1)


def test_freezing_is_off(make: Make) -> None:
    bench = make(snapshot_freeze_timeout=0.0)
    bench.snap()
    assert "fs_freeze" not in bench.guest.calls


def test_thawed_when_the_hypervisor_refuses_and_the_guest_saved(bench: Bench) -> None:
    bench.guest.refuse["backup_begin"] = errors.GuestFailed(instance=UUID, reason="no backup today")
    wanted = bench.flat()
    image = bench.snap()
    assert bench.said("saved") and bench.said("no backup today") and bench.flat(image) == wanted
    assert bench.guest.calls == ["fs_freeze", "backup_begin", "fs_thaw", "managed_save", "launch"]
    assert bench.guest.power is PowerState.RUNNING
    bench.assert_clean("snap1")


def test_not_live_it_is_saved(bench: Bench) -> None:
    bench.guest.power = PowerState.PAUSED
    bench.snap(live=False)
    assert bench.guest.calls == ["managed_save", "launch"] and bench.guest.power is PowerState.PAUSED


def test_another_job_runs(bench: Bench) -> None:
    bench.guest.job = "migration_out"
    with pytest.raises(errors.HypervisorBusy, match="migration_out"):
        run(bench.parts(), bench.job)
    bench.undo(2)
    assert bench.guest.calls == []
    bench.assert_clean()


def test_no_room_for_what_the_guest_overwrites(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bench.parts()[:2], bench.job)
    monkeypatch.setattr(live, "KEEP_FREE", 1 << 62)
    with pytest.raises(errors.DiskFull, match="what the guest overwrites"):
        bench.parts()[2].do(bench.job)
    bench.undo(3)
    bench.assert_clean()
    bench.snap()
    assert bench.said("saved")


def test_the_guest_dies_before_it_is_read(bench: Bench) -> None:
    run(bench.parts()[:2], bench.job)
    bench.guest.dies()
    wanted = bench.flat()
    told = bench.parts()[2].do(bench.job)
    assert told is not None and told["method"] == "cold"
    bench.parts()[3].do(bench.job)
    assert bench.flat(bench.images / "snap1") == wanted


def test_the_guest_dies_while_it_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again, the image is made of what the guest left."""
    run(bench.parts()[:2], bench.job)
    with monkeypatch.context() as dying:
        dying.setattr(live.LiveDisk, "check_room", lambda disk: bench.guest.dies())
        with pytest.raises(errors.HypervisorBusy, match="is gone"):
            bench.parts()[2].do(bench.job)
    wanted = bench.flat()
    run(bench.parts()[2:], bench.job)
    assert bench.flat(bench.images / "snap1") == wanted
    bench.assert_clean("snap1")


def test_a_disk_that_cannot_be_read_and_stands(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any) -> None:
        raise Unreadable("a bad block")

    run(bench.parts()[:2], bench.job)
    monkeypatch.setattr(snapshot_parts, "_NEWS_SECONDS", 0.1)
    monkeypatch.setattr(live.LiveDisk, "look", unreadable)
    with pytest.raises(errors.GuestFailed, match="its disk cannot be read: a bad block"):
        bench.parts()[2].do(bench.job)
    bench.undo(3)
    bench.assert_clean()


def test_a_guest_that_is_started_while_it_is_read(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.guest.power = PowerState.SHUTDOWN
    store = bench.deeds.disks.stores.get()
    write = store.write

    def started(*words: Any) -> Any:
        bench.guest.power = PowerState.RUNNING
        return write(*words)

    monkeypatch.setattr(store, "write", started)
    with pytest.raises(errors.GuestFailed, match="started while"):
        run(bench.parts(), bench.job)
    bench.undo(3)
    bench.assert_clean()


# --- deaths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", range(5))
@pytest.mark.parametrize("times", [1, 2])
def test_undone_by_a_successor(bench: Bench, done: int, times: int) -> None:
    for part in bench.parts()[:done]:
        for _ in range(times):
            part.do(bench.job)
    bench.undo(min(4, done + 1))
    bench.assert_clean()
    wanted = bench.flat()
    assert bench.flat(bench.snap(2)) == wanted


@pytest.mark.parametrize("ending", ["goes on", "is undone"])
@pytest.mark.parametrize("live_", [True, False])
@pytest.mark.parametrize("second", [False, True])
def test_the_worker_dies_after_any_call(make: Make, ending: str, live_: bool, second: bool) -> None:
    """The guest runs, is thawed and has no job or checkpoint but the image's; the image is whole or absent."""
    die_at, died = 1, True
    while died:
        bench, died = make(), False
        if second:
            bench.snap(1)
            bench.guest.writes("write -P 7 30M 128k")
        wanted, number = bench.flat(), 2 if second else 1
        bench.guest.calls.clear()
        bench.guest.die_at = die_at
        begun = 0
        try:
            for part in bench.parts(number, live=live_):
                begun += 1
                part.do(bench.job)
        except Died:
            died = True
        bench.guest.die_at = None
        others = ["snap1"] if second else []
        if ending == "goes on" or not died:
            run(bench.parts(number, live=live_)[max(0, begun - 1) :], bench.job)
            assert bench.flat(bench.images / f"snap{number}") == wanted
            bench.assert_clean(*others, f"snap{number}", checkpoints=1 if live_ else 0)
        else:
            bench.undo(begun, number, live=live_)
            published = begun == 4
            bench.assert_clean(*others, checkpoints=1 if second and not published else 0)
        assert bench.guest.power is PowerState.RUNNING
        die_at += 1
    assert die_at > 3


@pytest.mark.parametrize("ending", ["goes on", "is undone"])
@pytest.mark.parametrize("call", ["create", "write", "publish", "keep", "keep_last"])
def test_the_worker_dies_after_a_word_of_the_store_or_a_record(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str, ending: str
) -> None:
    owner: Any = record if call.startswith("keep") else bench.deeds.disks.stores.get()
    real, wanted, begun = getattr(owner, call), bench.flat(), 0

    def last(*words: Any, **options: Any) -> Any:
        real(*words, **options)
        raise Died

    with monkeypatch.context() as dying, pytest.raises(Died):
        dying.setattr(owner, call, last)
        for part in bench.parts():
            begun += 1
            part.do(bench.job)
    if ending == "goes on":
        run(bench.parts()[begun - 1 :], bench.job)
        assert bench.flat(bench.images / "snap1") == wanted
        bench.assert_clean("snap1", checkpoints=1)
    else:
        bench.undo(begun)
        bench.assert_clean()


def test_cancelled_while_it_is_read(bench: Bench) -> None:
    parts = bench.parts()
    run(parts[:2], bench.job)
    with pytest.raises(errors.Cancelled):
        parts[2].do(RecordingJob(cancel_at=3))
    bench.undo(3)
    bench.assert_clean()


def test_what_was_frozen_for_another_image_is_let_go(bench: Bench) -> None:
    run(bench.parts(1)[:2], bench.job)
    bench.undo(2, number=2)
    assert bench.guest.backup is not None, "another operation's undo touched it"
    wanted = bench.flat()
    assert bench.flat(bench.snap(2)) == wanted
    assert len(bench.guest.marks) == 1


def test_published_without_what_was_frozen(bench: Bench) -> None:
    with pytest.raises(errors.GuestFailed, match="is gone"):
        bench.parts()[3].do(bench.job)


def test_an_image_of_somebody_else(bench: Bench) -> None:
    bench.snap(1)
    parts = bench.parts(3, image_id="snap1")
    with pytest.raises(errors.ImageUnacceptable):
        parts[0].do(bench.job)
    undo(parts[:1], bench.job)
    assert (bench.images / "snap1").exists() and len(bench.guest.marks) == 1


def test_what_was_written_twice_is_one_image(bench: Bench) -> None:
    """Called again at every part: what it was, once."""
    run(bench.parts(), bench.job, times=2)
    bench.assert_clean("snap1", checkpoints=1)
    assert bench.guest.calls.count("backup_begin") == 1


def test_no_disks(bench: Bench) -> None:
    (bench.directory / "disk.info").unlink()
    with pytest.raises(errors.GuestFailed, match=r"disk\.info"):
        bench.parts()[0].do(bench.job)
    bench.undo(1)


def test_a_path_too_long_for_a_socket(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    monkeypatch.setattr(live, "_LONGEST_SOCKET", 20)
    bench.snap()
    assert bench.said("too long for a socket") and bench.said("saved")


def test_a_store_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(errors.NotSupported, match="nosuch"):
        bench.parts(store="nosuch")


def test_the_decision_is_told_once(bench: Bench) -> None:
    bench.snap()
    assert len(bench.job.reasons) == 1 and bench.job.reasons[0].startswith("backup: the guest is running and goes on; ")
