"""Disks over NBD: real qemu-nbd, real certificates, real connections."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.transfer import windows
from compute_worker.virt.libvirt.transfer.over_nbd import NbdTransport
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.libvirt.transfer.peerserver import PeerServer
from tests.virt.libvirt.transfer.support import (
    MIB,
    UUID,
    Meter,
    Pair,
    allocated,
    assert_same,
    noise,
    processes,
    write_sparse,
)
from tests.waiting import wait_for

Make = Callable[..., Pair]


def scattered(megabytes: int) -> dict[int, bytes]:
    """As much data, in pieces between holes, the last one odd."""
    data = noise(megabytes * MIB)
    return {
        0: data[: MIB // 2],
        5 * MIB + 4096: data[MIB // 2 : 3 * MIB],
        20 * MIB: data[3 * MIB :],
        (21 + megabytes) * MIB: b"the end of an odd file",
    }


@pytest.fixture
def metered() -> Iterator[Callable[[Pair], list[Meter]]]:
    """Every port that the destination names from now on is behind a meter of its own."""
    meters: list[Meter] = []

    def install(pair: Pair) -> list[Meter]:
        plain = pair.peer

        def peer(request):  # type: ignore[no-untyped-def]
            answer = dict(plain(request))
            if request["ask"] == "open" and not answer["complete"]:
                meters.append(Meter(answer["port"]))
                answer["port"] = meters[-1].port
            return answer

        pair.peer = peer  # type: ignore[method-assign]
        return meters

    yield install
    for meter in meters:
        meter.close()


@pytest.mark.parametrize("secure", [True, False])
def test_bytes_and_holes_arrive(pair: Make, pki: str, secure: bool) -> None:
    two = pair(tls_dir=pki) if secure else pair(nbd_plaintext=True)
    job, shipment = RecordingJob(), two.shipment(data=scattered(8), size=0)
    transport = NbdTransport(two.source)
    assert transport.usable(two.migration, two.peer)[0]
    transport.send(shipment, two.peer, job)
    assert_same(shipment.source, two.arrived())
    assert two.tree() == {UUID, f"{UUID}/disk", f"{UUID}/incoming.part", f"{UUID}/instance.json"}
    phases = [report for report in job.reports if report[0] == "send_disk"]
    assert phases[-1][1] == phases[-1][2] and phases[-1][2] <= allocated(shipment.source)
    wait_for(lambda: not processes("qemu-nbd", str(two.arrived())), what="qemu-nbd to end")


def test_what_is_on_the_wire(pair: Make, pki: str, metered: Callable[[Pair], list[Meter]]) -> None:
    two = pair(tls_dir=pki, window_mb=64)
    shipment = two.shipment(data={64 * MIB: noise(48 * MIB)}, size=512 * MIB)
    meters = metered(two)
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert 48 * MIB < sum(m.bytes for m in meters) <= 1.02 * allocated(shipment.source)


@pytest.mark.parametrize("size", [0, 1, 511, 4096, MIB, MIB + 1, 3 * MIB - 513])
def test_every_size(pair: Make, size: int) -> None:
    two = pair(nbd_plaintext=True)
    shipment = two.shipment(data={0: noise(size)})
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert_same(shipment.source, two.arrived())


def test_a_qcow2_header_in_a_disk_is_only_bytes(pair: Make, tmp_path: Path) -> None:
    """CVE-2016-2140: the guest wrote a header that names a file of the host as its backing file."""
    two = pair(nbd_plaintext=True)
    secret = tmp_path / "secret"
    secret.write_bytes(b"root:x:0:0" * 1000)
    shipment = two.shipment(data={0: noise(MIB)}, size=4 * MIB)
    evil = tmp_path / "evil"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(evil)], check=True, timeout=20
    )
    with open(shipment.source, "r+b") as disk:
        disk.write(evil.read_bytes()[:65_536])
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert_same(shipment.source, two.arrived())
    assert b"root:x:0:0" not in two.arrived().read_bytes()


def test_twice_is_once(pair: Make, metered: Callable[[Pair], list[Meter]]) -> None:
    two = pair(nbd_plaintext=True, compare="full")
    shipment = two.shipment(data=scattered(4))
    transport = NbdTransport(two.source)
    transport.send(shipment, two.peer, RecordingJob())
    before, meters = two.arrived().stat(), metered(two)
    transport.send(shipment, two.peer, RecordingJob())
    assert (two.arrived().stat().st_ino, meters) == (before.st_ino, [])


def test_a_cut_connection_goes_on_from_the_windows_that_arrived(
    pair: Make, pki: str, metered: Callable[[Pair], list[Meter]]
) -> None:
    two = pair(tls_dir=pki, streams=2, bandwidth_mb=10)
    shipment = two.shipment(data={0: noise(32 * MIB)})
    meters, job = metered(two), RecordingJob()
    plain = two.peer

    def peer(request):  # type: ignore[no-untyped-def]
        answer = plain(request)
        if request["ask"] == "open" and len(meters) == 1:
            meters[0].limit = 20 * MIB
        return answer

    NbdTransport(two.source).send(shipment, peer, job)
    assert_same(shipment.source, two.arrived())
    assert len(meters) > 1
    # What was under way and what half a second did not flush is sent again, not the 20 MiB of before.
    assert sum(m.bytes for m in meters) < 32 * MIB + 14 * MIB
    assert any("going on with what arrived" in reason for reason in job.reasons)


@pytest.mark.parametrize("what", ["qemu-nbd", "worker"])
def test_the_destination_dies_while_sending(pair: Make, what: str) -> None:
    two = pair(nbd_plaintext=True, bandwidth_mb=20)
    shipment = two.shipment(data={0: noise(24 * MIB)})
    job = RecordingJob()
    thread, raised = in_thread(NbdTransport(two.source).send, shipment, two.peer, job)
    journal = two.there.path(UUID) / "disk.windows.part"
    wait_for(lambda: (seen := windows.read(journal)) and seen.done, what="a window to be recorded")
    if what == "worker":
        two.restart()
    else:
        (pid,) = processes("qemu-nbd", str(two.arrived()), "--export-name=disk")
        os.kill(pid, signal.SIGKILL)
    thread.join(15)
    assert not thread.is_alive() and raised == []
    assert_same(shipment.source, two.arrived())
    assert two.seen.count("open") == 2


def test_the_sending_process_dies_and_another_goes_on(
    pair: Make, tmp_path: Path, metered: Callable[[Pair], list[Meter]]
) -> None:
    two = pair(nbd_plaintext=True, bandwidth_mb=16)
    shipment = two.shipment(data={0: noise(40 * MIB)})
    with PeerServer(tmp_path / "peer", two.peer) as server:
        words = [sys.executable, "-m", "tests.virt.libvirt.transfer.sender", str(server.path), "nbd"]
        sender = subprocess.Popen([*words, str(two.here.root.parent), str(shipment.source)])
        try:
            journal = two.there.path(UUID) / "disk.windows.part"
            wait_for(lambda: (seen := windows.read(journal)) and len(seen.done) > 8, 15, "windows to arrive")
        finally:
            sender.kill()
            sender.wait()
    wait_for(lambda: not processes("qemu-nbd", str(two.arrived())), what="qemu-nbd to end with its client")
    there = len(windows.read(journal).done)  # type: ignore[union-attr]
    meters = metered(two)
    fast = dataclasses.replace(two.source, transfer=dataclasses.replace(two.source.transfer, bandwidth_mb=0))
    NbdTransport(fast).send(shipment, two.peer, RecordingJob())
    assert_same(shipment.source, two.arrived())
    assert sum(m.bytes for m in meters) < (40 - there) * MIB * 1.02 + MIB


def test_a_broker_that_is_away_does_not_stop_the_bytes(pair: Make) -> None:
    two = pair(nbd_plaintext=True)
    shipment = two.shipment(data={0: noise(8 * MIB)})
    two.lose = {"windows"}
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert_same(shipment.source, two.arrived())


def test_cancelled(pair: Make, metered: Callable[[Pair], list[Meter]]) -> None:
    two = pair(nbd_plaintext=True)
    shipment = two.shipment(data={0: noise(32 * MIB)})
    meters, job = metered(two), RecordingJob()
    plain = two.peer

    def peer(request):  # type: ignore[no-untyped-def]
        answer = plain(request)
        if request["ask"] == "open":
            meters[0].flow.clear()
        return answer

    thread, raised = in_thread(NbdTransport(two.source).send, shipment, peer, job)
    wait_for(lambda: meters and meters[0].bytes, what="bytes on the way")
    job.cancel()
    thread.join(5)
    assert not thread.is_alive(), "a silent destination keeps a cancelled job from ending"
    assert isinstance(raised[0], errors.Cancelled)
    two.peer({"ask": "remove"})
    assert two.tree() == set()
    assert not processes("qemu-nbd", str(two.arrived()))


def test_a_full_disk(pair: Make, tmp_path: Path) -> None:
    two = pair(nbd_plaintext=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(two.there.root)], check=True, timeout=10)
    try:
        two.there.prepare()
        shipment = two.shipment(data={0: noise(16 * MIB)})
        with pytest.raises(errors.DiskFull) as caught:
            NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
        assert caught.value.reschedulable and "localhost:" in str(caught.value)
        two.peer({"ask": "remove", "name": "disk"})
        assert two.tree() == set()
    finally:
        two.receiver.stop_all()
        subprocess.run(["umount", str(two.there.root)], check=True, timeout=10)


def test_the_certificate_of_another_host_is_refused(pair: Make, certificates: Callable[[str, str], str]) -> None:
    two = pair(tls_dir=certificates("localhost", "ca"), there={"tls_dir": certificates("elsewhere", "ca")})
    shipment = two.shipment(data={0: noise(MIB)})
    with pytest.raises(errors.MigrationFailed, match=r"localhost.*Hostname mismatch"):
        NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert allocated(two.arrived("disk.part")) == 0


@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_certificate_of_another_authority_is_refused(
    pair: Make, certificates: Callable[[str, str], str], side: str
) -> None:
    good, bad = certificates("localhost", "ca"), certificates("localhost", "other")
    two = pair(tls_dir=bad if side == "source" else good, there={"tls_dir": good if side == "source" else bad})
    shipment = two.shipment(data={0: noise(MIB)})
    with pytest.raises(errors.MigrationFailed, match="certificate"):
        NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert allocated(two.arrived("disk.part")) == 0


def test_a_client_that_the_authority_did_not_sign_is_refused(
    pair: Make, certificates: Callable[[str, str], str], tmp_path: Path
) -> None:
    """The source trusts the destination's authority and shows a certificate of another."""
    good, bad = Path(certificates("localhost", "ca")), Path(certificates("localhost", "other"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    os.link(good / "ca-cert.pem", mixed / "ca-cert.pem")
    for name in ("client-cert.pem", "client-key.pem"):
        os.link(bad / name, mixed / name)
    two = pair(tls_dir=str(mixed), there={"tls_dir": str(good)})
    shipment = two.shipment(data={0: noise(MIB)})
    with pytest.raises(errors.MigrationFailed, match="our certificate"):
        NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert allocated(two.arrived("disk.part")) == 0


def test_a_destination_that_says_it_has_no_tls_gets_nothing(pair: Make, pki: str) -> None:
    two = pair(tls_dir=pki, there={"tls_dir": "", "nbd_plaintext": True})
    usable, reason = NbdTransport(two.source).usable(two.migration, two.peer)
    assert (usable, "tls_dir is empty" in reason) == (False, True)
    with pytest.raises(errors.MigrationFailed):
        NbdTransport(two.source).send(two.shipment(data={0: noise(MIB)}), two.peer, RecordingJob())
    assert allocated(two.arrived("disk.part")) == 0


def test_a_destination_without_certificates_does_not_listen(pair: Make) -> None:
    two = pair()
    with pytest.raises(errors.NotSupported):
        NbdTransport(two.source).send(two.shipment(data={0: noise(MIB)}), two.peer, RecordingJob())


def test_an_address_that_is_an_option(pair: Make) -> None:
    two = pair(nbd_plaintext=True, there={"address": "-oProxyCommand=touch"})
    usable, reason = NbdTransport(two.source).usable(two.migration, two.peer)
    assert (usable, "set transfer.address" in reason) == (False, True)


def test_a_copy_that_differs_is_found_and_removed(pair: Make) -> None:
    two = pair(nbd_plaintext=True)
    shipment = two.shipment(data={0: noise(2 * MIB)}, size=4 * MIB)
    plain = two.peer

    def peer(request):  # type: ignore[no-untyped-def]
        if request["ask"] == "map" and request["at"] == 0:
            with open(two.arrived("disk.part"), "r+b") as part:
                part.seek(3 * MIB)
                part.write(b"stray")
        return plain(request)

    with pytest.raises(errors.MigrationFailed, match="something else is where nothing was sent"):
        NbdTransport(two.source).send(shipment, peer, RecordingJob())
    assert not two.arrived("disk.part").exists()
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert_same(shipment.source, two.arrived())


def test_a_limit_is_kept(pair: Make) -> None:
    two = pair(nbd_plaintext=True, bandwidth_mb=8)
    shipment = two.shipment(data={0: noise(12 * MIB)})
    begin = time.monotonic()
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert time.monotonic() - begin > 1.2


def test_another_window_size_begins_anew(pair: Make) -> None:
    two = pair(nbd_plaintext=True)
    shipment = two.shipment(data={0: noise(4 * MIB)})
    two.peer({"ask": "begin"})
    two.peer({"ask": "open", "name": "disk", "size": 4 * MIB, "window": 2 * MIB})
    two.peer({"ask": "windows", "name": "disk", "done": [(0, 1)]})
    NbdTransport(two.source).send(shipment, two.peer, RecordingJob())
    assert_same(shipment.source, two.arrived())


def test_write_sparse_makes_holes(tmp_path: Path) -> None:
    """What these tests stand on: this file system has holes."""
    write_sparse(tmp_path / "f", {MIB: b"x"}, 8 * MIB)
    assert allocated(tmp_path / "f") < MIB
