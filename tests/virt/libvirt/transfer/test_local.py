"""The source and the destination see the same directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.disks.instance_dir import InstancesDirectory
from compute_worker.virt.libvirt.transfer.local import SharedTransport
from compute_worker.virt.libvirt.transfer.receiver import Receiver
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.transfer.support import MIB, UUID, Pair, assert_same, noise

Make = Callable[..., Pair]


@pytest.fixture
def shared(pair: Make, tmp_path: Path) -> Pair:
    """``b`` is the same directory by another name."""
    two = pair()
    link = tmp_path / "mounted"
    link.symlink_to(two.here.root.parent)
    two.there = InstancesDirectory(link / two.here.root.name)
    two.receiver = Receiver(two.destination, two.there)
    return two


def test_the_same_directory_is_seen(shared: Pair) -> None:
    usable, reason = SharedTransport(shared.source).usable(shared.migration, shared.peer)
    assert usable and "sees the same" in reason
    assert not list(shared.here.root.glob("probe-*"))


def test_another_directory_is_not(pair: Make) -> None:
    two = pair()
    assert not SharedTransport(two.source).usable(two.migration, two.peer)[0]
    (name,) = (n for n in two.seen if n == "probe")
    assert name and not list(two.here.root.glob("probe-*"))


def test_a_file_of_that_name_with_other_content_is_not_ours(shared: Pair) -> None:
    (shared.here.root / f"probe-{'0' * 32}").write_text("something else entirely")
    answer = shared.peer({"ask": "probe", "name": f"probe-{'0' * 32}", "content": "f" * 32})
    assert answer == {"seen": False}


def test_bytes_and_holes_are_copied_and_the_original_stays(shared: Pair) -> None:
    shipment, job = shared.shipment(data={0: noise(MIB), 6 * MIB: noise(MIB)}, size=9 * MIB), RecordingJob()
    for _ in range(2):
        SharedTransport(shared.source).send(shipment, shared.peer, job)
    assert_same(shipment.source, shared.here.path(UUID) / "disk")
    assert {report[0] for report in job.reports} <= {"send_disk"}


def test_an_interrupted_copy_begins_anew(shared: Pair) -> None:
    shipment = shared.shipment(data={0: noise(2 * MIB)})
    shared.peer({"ask": "begin"})
    (shared.here.path(UUID) / "disk.part").write_bytes(b"half of another")
    SharedTransport(shared.source).send(shipment, shared.peer, RecordingJob())
    assert_same(shipment.source, shared.here.path(UUID) / "disk")


def test_the_original_is_never_taken_for_a_copy(shared: Pair) -> None:
    """The guest has not been set aside: its directory has a record of this very migration."""
    shared.here.create(UUID)
    shared.here.write_record(shared.instance)
    (shared.here.path(UUID) / "disk").write_bytes(b"the guest's")
    shipment = shared.shipment("other", {0: b"x"})
    with pytest.raises(errors.DestinationDiskExists):
        SharedTransport(shared.source).send(shipment, shared.peer, RecordingJob())
    shared.peer({"ask": "remove"})
    shared.peer({"ask": "remove", "name": "disk"})
    assert (shared.here.path(UUID) / "disk").read_bytes() == b"the guest's"
