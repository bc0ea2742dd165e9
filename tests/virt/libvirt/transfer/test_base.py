from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.transfer import base
from tests.virt.jobs import RecordingJob
from tests.virt.libvirt.transfer.support import Pair

Make = Callable[..., Pair]


def chosen(two: Pair, job: RecordingJob | None = None) -> str:
    return base.choose(two.source, two.migration, two.peer, job or RecordingJob()).name


def test_a_shared_directory_comes_first(pair: Make, pki: str) -> None:
    two = pair(tls_dir=pki)
    two.change["probe"] = {"seen": True}
    job = RecordingJob()
    assert chosen(two, job) == "shared"
    assert "sees the same" in job.reasons[0]


def test_auto_is_nbd_where_both_have_certificates(pair: Make, pki: str) -> None:
    job = RecordingJob()
    assert chosen(pair(tls_dir=pki), job) == "nbd"
    assert job.reasons == ["disks go to localhost by nbd: both hosts have certificates"]


def test_auto_never_sends_in_the_clear(pair: Make) -> None:
    with pytest.raises(errors.MigrationFailed, match=r"nbd: .*tls_dir is empty; ssh: "):
        chosen(pair(ssh_options="-F /dev/null -o BatchMode=yes -o ConnectTimeout=1 -p 1"))


def test_a_named_one_and_no_other(pair: Make) -> None:
    two = pair(transport="nbd")
    with pytest.raises(errors.MigrationFailed) as caught:
        chosen(two)
    assert "ssh" not in str(caught.value)
    assert chosen(pair(transport="nbd", nbd_plaintext=True)) == "nbd"


def test_an_unknown_one(pair: Make) -> None:
    with pytest.raises(errors.Broken, match="carrier-pigeon"):
        chosen(pair(transport="carrier-pigeon"))


def test_a_silent_peer_is_waited_for(pair: Make) -> None:
    two = pair()
    two.lose = {"probe"}
    with pytest.raises(errors.PeerUnavailable):
        chosen(two)


def test_a_destination_without_qemu_nbd(pair: Make, pki: str) -> None:
    two = pair(tls_dir=pki, transport="nbd")
    two.change["facts"] = {"nbd": False}
    with pytest.raises(errors.MigrationFailed, match="qemu-nbd is missing"):
        chosen(two)


def test_a_shipment_is_what_it_was(pair: Make) -> None:
    shipment = pair().shipment("disk.local")
    assert shipment.phase == "send_disk.local"
    with pytest.raises(dataclasses.FrozenInstanceError):
        shipment.name = "x"  # type: ignore[misc]
