from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from compute_worker import errors
from compute_worker.images import fetch
from compute_worker.objects import Disk, DiskInfo, ImageMeta
from compute_worker.virt.libvirt.disks import cache as cache_module
from compute_worker.virt.libvirt.disks.builder import DiskBuilder
from compute_worker.virt.libvirt.disks.cache import base_name
from compute_worker.virt.libvirt.disks.instance_dir import ImageUse
from tests.images.support import Job, Site, qcow2, sha256
from tests.virt.libvirt.disks.support import UUID, builder, tree

DATA = b"raw disk " * 100_000
MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path, site: Site) -> DiskBuilder:
    site.files["/raw"] = DATA
    site.files["/cow"] = qcow2(tmp_path / "cow", 16, b"inside", compress="yes").read_bytes()
    return builder(tmp_path, images={"store": "http", "http_url": site.url})


def image(image_id: str = "raw", **fields: Any) -> ImageMeta:
    return ImageMeta(**{"id": image_id, "disk_format": "qcow2" if image_id == "cow" else "raw", **fields})


def test_names_begin_with_the_sha1_of_the_id_and_follow_the_declaration() -> None:
    assert base_name(image()).startswith(hashlib.sha1(b"raw").hexdigest() + "_")
    assert base_name(image()) == base_name(image(name="other", min_disk_gb=3))
    different = [
        image(),
        image("cow"),
        image(store="file"),
        image(disk_format="iso"),
        image(checksum="a" * 64),
    ]
    assert len({base_name(meta) for meta in different}) == len(different)


def test_raw_is_kept_and_qcow2_converted_once(host: DiskBuilder, job: Job, site: Site) -> None:
    raw, cow = host.cache.ensure(image(), job), host.cache.ensure(image("cow"), job)
    assert raw.path.read_bytes() == DATA
    assert (raw.size_bytes, cow.size_bytes) == (len(DATA), 16 * MIB)
    assert cow.path.read_bytes() == b"inside".ljust(16 * MIB, b"\0")
    assert cow.path.stat().st_blocks * 512 < MIB
    assert raw.path.stat().st_mode & 0o777 == 0o644
    requests = len(site.requests)
    assert host.cache.ensure(image("cow"), job) == cow
    assert len(site.requests) == requests
    assert tree(host.directory.root) == {f"_base/{raw.name}", f"_base/{cow.name}"}


def test_one_download_however_many_ask(host: DiskBuilder, site: Site, tmp_path: Path) -> None:
    others = [host, builder(tmp_path, images={"store": "http", "http_url": site.url})]
    found, ready = [], threading.Barrier(8)

    def ask(number: int) -> None:
        ready.wait(10)
        found.append(others[number % 2].cache.ensure(image("cow"), Job()))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(site.gets()) == 1


def test_waiting_for_anothers_download_is_cancelled(host: DiskBuilder, site: Site) -> None:
    site.stall = threading.Event()
    first, second, ended = Job(), Job(), []

    def ask(job: Job) -> None:
        try:
            host.cache.ensure(image(), job)
        except errors.ComputeError as exc:
            ended.append((job, type(exc)))

    threads = [threading.Thread(target=ask, args=(job,)) for job in (first, second)]
    threads[0].start()
    assert site.sent.wait(5)
    threads[1].start()
    second.cancel()
    threads[1].join(5)
    assert ended == [(second, errors.Cancelled)]
    first.cancel()
    threads[0].join(5)
    assert ended[1:] == [(first, errors.Cancelled)]
    assert tree(host.directory.root) == set()


def test_a_store_that_went_away_is_taken_up_again(
    host: DiskBuilder, site: Site, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_FIRST_DELAY", 0.001)
    site.cut = [1000] * 6
    meta = image(checksum=sha256(DATA))
    with pytest.raises(errors.ImageStoreUnavailable):
        host.cache.ensure(meta, job)
    assert tree(host.directory.root) == {f"_base/{base_name(meta)}.part"}
    assert host.cache.ensure(meta, job).path.read_bytes() == DATA
    assert site.gets()[-1]["Range"] == "bytes=6000-"
    assert tree(host.directory.root) == {f"_base/{base_name(meta)}"}


def test_an_unknown_image_leaves_nothing_not_even_a_lock(host: DiskBuilder, job: Job) -> None:
    with pytest.raises(errors.ImageNotFound):
        host.cache.ensure(image("nosuch"), job)
    assert list(host.directory.locks.iterdir()) == []
    assert tree(host.directory.root) == set()


def test_the_flavor_limits_a_new_and_a_cached_image(host: DiskBuilder, job: Job, site: Site) -> None:
    with pytest.raises(errors.FlavorDiskTooSmall):
        host.cache.ensure(image("cow"), job, 8 * MIB)
    assert tree(host.directory.root) == set()
    assert host.cache.ensure(image("cow"), job, 16 * MIB).size_bytes == 16 * MIB
    with pytest.raises(errors.FlavorDiskTooSmall) as caught:
        host.cache.ensure(image("cow"), job, 8 * MIB)
    assert (caught.value.kwargs["needed"], caught.value.kwargs["given"]) == (16 * MIB, 8 * MIB)
    downloads = len(site.gets())
    with pytest.raises(errors.FlavorDiskTooSmall):
        host.cache.ensure(image(), job, 512)
    assert len(site.gets()) == downloads


def test_two_readers_of_one_header_must_agree(
    host: DiskBuilder, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = cache_module.inspect.inspect

    def lied_to(*args: Any) -> Any:
        found = seen(*args)
        return type(found)(found.disk_format, found.virtual_size_bytes - 512)

    monkeypatch.setattr(cache_module.inspect, "inspect", lied_to)
    with pytest.raises(errors.ImageUnacceptable, match="qemu-img sees"):
        host.cache.ensure(image("cow"), job)
    assert tree(host.directory.root) == set()


def test_a_conversion_is_cancelled_and_leaves_nothing(host: DiskBuilder, site: Site, tmp_path: Path) -> None:
    site.files["/cow"] = qcow2(tmp_path / "big", 96, os.urandom(MIB) * 64, compress="yes").read_bytes()

    class AtConversion(Job):
        def report(self, phase: str, *args: Any, **kwargs: Any) -> None:
            super().report(phase, *args, **kwargs)
            if phase == cache_module.CONVERTING:
                self.cancel()

    with pytest.raises(errors.Cancelled):
        host.cache.ensure(image("cow"), AtConversion())
    assert tree(host.directory.root) == set()


def test_generated_bases_are_made_once(host: DiskBuilder, job: Job) -> None:
    made: list[Path] = []

    def make(part: Path) -> None:
        made.append(part)
        part.write_bytes(b"x")

    first = host.cache.ensure_generated("swap_1", make, job)
    assert host.cache.ensure_generated("swap_1", make, job) == first
    assert len(made) == 1
    with pytest.raises(ValueError, match="name of a base"):
        host.cache.ensure_generated("../swap", make, job)


class TestPruning:
    AGED = 90_000.0

    @staticmethod
    def later() -> float:
        return time.time() + TestPruning.AGED

    def test_only_what_nobody_uses_and_nobody_used_lately(self, host: DiskBuilder, job: Job) -> None:
        raw, cow = host.cache.ensure(image(), job), host.cache.ensure(image("cow"), job)
        assert host.cache.prune(set()) == []
        assert host.cache.prune({"raw", "cow"}, self.later()) == []
        assert host.cache.prune({"cow"}, self.later()) == [raw.name]
        assert tree(host.directory.root) == {f"_base/{cow.name}"}
        assert not (host.directory.locks / f"{raw.name}.lock").exists()

    def test_the_list_says_who_is_used_and_since_when(self, host: DiskBuilder, job: Job) -> None:
        raw, cow = host.cache.ensure(image(), job), host.cache.ensure(image("cow"), job)
        (host.directory.base / f"{raw.name}x.part").touch()
        host.directory.create(UUID)
        stands = Disk(name="disk", format="qcow2", virtual_size_bytes=1, backing=raw.name)
        host.directory.write_disk_info(UUID, DiskInfo(disks=[stands]))
        found = {one.name: one for one in host.cache.list_bases()}
        assert found.keys() == {raw.name, cow.name}
        assert (found[raw.name].in_use, found[cow.name].in_use) == (True, False)
        for one in found.values():
            seen = (host.directory.base / one.name).stat()
            assert (one.size_bytes, one.allocated_bytes) == (seen.st_size, seen.st_blocks * 512)
            assert time.time() - 60 < one.used_at <= time.time() + 1

    def test_what_a_disk_stands_on_or_will_stays(self, host: DiskBuilder, job: Job) -> None:
        raw, cow = host.cache.ensure(image(), job), host.cache.ensure(image("cow"), job)
        host.directory.create(UUID)
        stands = Disk(name="disk", format="qcow2", virtual_size_bytes=1, backing=raw.name)
        host.directory.write_disk_info(UUID, DiskInfo(disks=[stands]))
        host.directory.write_use(UUID, ImageUse(bases=[cow.name]))
        assert host.cache.prune(set(), self.later()) == []
        host.directory.remove(UUID)
        assert host.cache.prune(set(), self.later()) == sorted([raw.name, cow.name])

    def test_use_makes_it_young(self, host: DiskBuilder, job: Job) -> None:
        raw = host.cache.ensure(image(), job)
        old = time.time() - self.AGED
        os.utime(raw.path, (old, old))
        os.utime(host.directory.locks / f"{raw.name}.lock", (old, old))
        host.cache.ensure(image(), job)
        assert host.cache.prune(set()) == []

    def test_a_base_in_work_is_left_alone(self, host: DiskBuilder, job: Job, site: Site) -> None:
        site.stall = threading.Event()
        thread = threading.Thread(target=lambda: host.cache.ensure(image(), job))
        thread.start()
        assert site.sent.wait(5)
        assert host.cache.prune(set(), self.later()) == []
        stalled, site.stall = site.stall, None
        stalled.set()
        thread.join(10)
        assert host.cache.ensure(image(), job).path.read_bytes() == DATA

    def test_abandoned_downloads_go(self, host: DiskBuilder) -> None:
        (host.directory.base / f"{base_name(image())}.part").write_bytes(b"x")
        (host.directory.base / f"{base_name(image())}.raw.part").write_bytes(b"x")
        (host.directory.base / "not-a-base").write_bytes(b"x")
        assert host.cache.prune(set(), self.later()) == [base_name(image())]
        assert tree(host.directory.root) == {"_base/not-a-base"}

    def test_never_on_shared_storage(
        self, host: DiskBuilder, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host.cache.ensure(image(), job)
        monkeypatch.setattr(cache_module.files, "is_shared", lambda path: path == host.directory.base)
        assert host.cache.prune(set(), self.later()) == []

    def test_an_unreadable_record_stops_it(self, host: DiskBuilder, job: Job) -> None:
        raw = host.cache.ensure(image(), job)
        (host.directory.create(UUID) / "disk.info").write_text("{")
        with pytest.raises(errors.Broken):
            host.cache.prune(set(), self.later())
        assert raw.path.exists()

    def test_racing_builds_always_have_their_base(self, host: DiskBuilder, tmp_path: Path) -> None:
        """Pruning with no grace at all runs against builds that take and drop the same base."""
        merciless = builder(tmp_path, images={"store": "http", "remove_unused_base_images_after": 0.0,
                                              "http_url": host.stores.get("http")._base})  # type: ignore[attr-defined]
        stop, missing = threading.Event(), []

        def prune() -> None:
            while not stop.is_set():
                merciless.cache.prune(set(), time.time() + 10)

        thread = threading.Thread(target=prune)
        thread.start()
        try:
            for _ in range(25):
                host.directory.create(UUID)
                host.directory.write_use(UUID, ImageUse(bases=[base_name(image())]))
                base = host.cache.ensure(image(), Job())
                missing.append(not base.path.exists() or base.path.stat().st_size != len(DATA))
                host.directory.remove(UUID)
        finally:
            stop.set()
            thread.join()
        assert not any(missing)


def test_a_base_that_was_sent_gets_its_place_once(host: DiskBuilder, job: Job, tmp_path: Path) -> None:
    sent, name = tmp_path / "sent", base_name(image())
    for content in (DATA, b"another one"):
        sent.write_bytes(content)
        for _ in range(2):
            host.cache.adopt(name, sent, job)
    base = host.directory.base / name
    assert (base.read_bytes(), base.stat().st_nlink, sent.exists()) == (DATA, 1, False)
    assert host.cache.ensure(image(), job).path == base
    with pytest.raises(ValueError, match="not the name of a base"):
        host.cache.adopt("../x", sent, job)


def test_a_death_between_the_two_names_of_a_sent_base(host: DiskBuilder, job: Job, tmp_path: Path) -> None:
    sent, base = tmp_path / "sent", host.directory.base / base_name(image())
    sent.write_bytes(DATA)
    os.link(sent, base)
    host.cache.adopt(base.name, sent, job)
    assert (base.read_bytes(), sent.exists()) == (DATA, False)


def test_locks_that_no_image_goes_with(host: DiskBuilder, job: Job) -> None:
    kept = host.cache.ensure(image(), job)
    locks = host.cache._locks
    for name in ("gone", "begun", "held"):
        with locks.try_hold(name):
            assert locks.path(name).exists()
    (host.directory.base / "begun.part").touch()
    with locks.try_hold("held"):
        assert host.cache.stale_locks() == ["gone"]
        assert locks.path("gone").exists(), "it was only listed"
        assert host.cache.stale_locks(remove=True) == ["gone"]
    assert host.cache.stale_locks() == ["held"]
    assert {"begun", kept.name} <= locks.names() and not locks.path("gone").exists()
