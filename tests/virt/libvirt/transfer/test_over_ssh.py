"""Disks by rsync over ssh: a real sshd, real keys."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compute_worker import errors
from compute_worker.virt.libvirt.transfer.over_ssh import SshTransport
from tests.virt.jobs import RecordingJob, in_thread
from tests.virt.libvirt.transfer.peerserver import PeerServer
from tests.virt.libvirt.transfer.sshserver import SshServer
from tests.virt.libvirt.transfer.support import MIB, UUID, Meter, Pair, allocated, assert_same, noise, processes
from tests.waiting import wait_for

Make = Callable[..., Pair]


@pytest.fixture
def two(pair: Make, sshd: SshServer) -> Pair:
    return pair(ssh_options=sshd.options)


def at_work(two: Pair) -> list[int]:
    """rsync processes that read or write disks of these two hosts, on either side, and their ssh."""
    return processes("rsync", str(two.there.root))


@pytest.mark.parametrize("compare", ["extents", "full"])
def test_bytes_and_holes_arrive(pair: Make, sshd: SshServer, compare: str) -> None:
    two = pair(ssh_options=sshd.options, compare=compare)
    data = {0: noise(MIB), 9 * MIB + 4096: noise(2 * MIB), 30 * MIB: b"odd"}
    shipment, job = two.shipment(data=data), RecordingJob()
    transport = SshTransport(two.source)
    assert transport.usable(two.migration, two.peer) == (True, "ssh logs in to 127.0.0.1")
    for _ in range(2):
        transport.send(shipment, two.peer, job)
    assert_same(shipment.source, two.arrived())
    assert two.tree() == {UUID, f"{UUID}/disk", f"{UUID}/incoming.part", f"{UUID}/instance.json"}
    sizes = [report[1] for report in job.reports if report[0] == "send_disk"]
    assert sizes and sizes[-1] == shipment.source.stat().st_size


def test_what_is_on_the_wire(pair: Make, sshd: SshServer) -> None:
    meter = Meter(sshd.port)
    two = pair(ssh_options=sshd.options.replace(f"-p {sshd.port}", f"-p {meter.port}"))
    shipment = two.shipment(data={64 * MIB: noise(24 * MIB)}, size=256 * MIB)
    try:
        SshTransport(two.source).send(shipment, two.peer, RecordingJob())
    finally:
        meter.close()
    assert_same(shipment.source, two.arrived())
    assert 24 * MIB < meter.bytes <= 1.02 * allocated(shipment.source)


def test_what_arrived_is_not_sent_again(pair: Make, sshd: SshServer, tmp_path: Path) -> None:
    """The sending process is killed in the middle; what it started on both sides goes with it."""
    two = pair(ssh_options=sshd.options)
    shipment = two.shipment(data={0: noise(48 * MIB)})
    options = json.dumps({"ssh_options": sshd.options, "bandwidth_mb": 16})
    with PeerServer(tmp_path / "peer", two.peer) as server:
        words = [sys.executable, "-m", "tests.virt.libvirt.transfer.sender", str(server.path), "ssh"]
        sender = subprocess.Popen([*words, str(two.here.root.parent), str(shipment.source), options])
        try:
            part = two.arrived("disk.part")
            wait_for(lambda: part.exists() and allocated(part) > 12 * MIB, 15, "a part to arrive")
        finally:
            sender.kill()
            sender.wait()
    wait_for(lambda: not at_work(two), what="rsync on both sides to end with its worker")
    there = part.stat().st_size
    meter = Meter(sshd.port)
    through = sshd.options.replace(f"-p {sshd.port}", f"-p {meter.port}")
    source = dataclasses.replace(two.source, transfer=dataclasses.replace(two.source.transfer, ssh_options=through))
    try:
        SshTransport(source).send(shipment, two.peer, RecordingJob())
    finally:
        meter.close()
    assert_same(shipment.source, two.arrived())
    assert meter.bytes < 48 * MIB - there + 2 * MIB


def test_a_broken_connection_goes_on(pair: Make, sshd: SshServer) -> None:
    meter = Meter(sshd.port)
    meter.limit = 6 * MIB
    two = pair(ssh_options=sshd.options.replace(f"-p {sshd.port}", f"-p {meter.port}"))
    shipment, job = two.shipment(data={0: noise(12 * MIB)}), RecordingJob()
    try:
        SshTransport(two.source).send(shipment, two.peer, job)
    finally:
        meter.close()
    assert_same(shipment.source, two.arrived())
    assert any("going on with what arrived" in reason for reason in job.reasons)


def test_cancelled(pair: Make, sshd: SshServer) -> None:
    two = pair(ssh_options=sshd.options, bandwidth_mb=4)
    shipment, job = two.shipment(data={0: noise(64 * MIB)}), RecordingJob()
    thread, raised = in_thread(SshTransport(two.source).send, shipment, two.peer, job)
    part = two.arrived("disk.part")
    wait_for(lambda: part.exists() and allocated(part), what="bytes to arrive")
    job.cancel()
    thread.join(5)
    assert not thread.is_alive() and isinstance(raised[0], errors.Cancelled)
    two.peer({"ask": "remove"})
    assert two.tree() == set()
    wait_for(lambda: not at_work(two), what="every rsync to end")


def test_the_destinations_rsync_is_killed(pair: Make, sshd: SshServer) -> None:
    two = pair(ssh_options=sshd.options, bandwidth_mb=8)
    shipment, job = two.shipment(data={0: noise(16 * MIB)}), RecordingJob()
    thread, raised = in_thread(SshTransport(two.source).send, shipment, two.peer, job)
    part = two.arrived("disk.part")
    wait_for(lambda: part.exists() and allocated(part) > MIB, what="bytes to arrive")
    for pid in processes("rsync", "--server"):
        if str(two.there.root) in os.readlink(f"/proc/{pid}/cwd") or _has_open(pid, part):
            os.kill(pid, signal.SIGKILL)
    thread.join(15)
    assert not thread.is_alive() and raised == []
    assert_same(shipment.source, two.arrived())


@pytest.mark.parametrize("side", ["here", "there"])
def test_every_rsync_of_one_side_is_killed(pair: Make, sshd: SshServer, side: str) -> None:
    two = pair(ssh_options=sshd.options, bandwidth_mb=8)
    shipment, job = two.shipment(data={0: noise(16 * MIB)}), RecordingJob()
    thread, raised = in_thread(SshTransport(two.source).send, shipment, two.peer, job)
    part = two.arrived("disk.part")
    wait_for(lambda: part.exists() and allocated(part) > MIB, what="bytes to arrive")
    served = {pid for pid in processes("rsync", "--server") if _has_open(pid, part)}
    served |= {parent for pid in served if (parent := _parent(pid)) in processes("rsync", "--server")}
    for pid in served if side == "there" else processes("rsync", str(shipment.source)):
        os.kill(pid, signal.SIGKILL)
    thread.join(15)
    assert not thread.is_alive() and raised == []
    assert any("going on with what arrived" in reason for reason in job.reasons)
    assert_same(shipment.source, two.arrived())


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(os.path.samefile(f"/proc/{pid}/fd/{fd}", path) for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def test_a_full_disk(pair: Make, tmp_path: Path) -> None:
    two = pair()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", str(two.there.root)], check=True, timeout=10)
    (tmp_path / "ssh").mkdir()
    # A server that begins after the mount sees it.
    server = SshServer(tmp_path / "ssh")
    try:
        two.there.prepare()
        source = dataclasses.replace(
            two.source, transfer=dataclasses.replace(two.source.transfer, ssh_options=server.options)
        )
        shipment = two.shipment(data={0: noise(16 * MIB)})
        with pytest.raises(errors.DiskFull) as caught:
            SshTransport(source).send(shipment, two.peer, RecordingJob())
        assert caught.value.reschedulable and "127.0.0.1:" in str(caught.value)
        two.peer({"ask": "remove"})
        assert two.tree() == set()
    finally:
        server.close()
        subprocess.run(["umount", "-l", str(two.there.root)], check=True, timeout=10)


def test_a_host_without_a_login(pair: Make, sshd: SshServer, tmp_path: Path) -> None:
    two = pair(ssh_options=sshd.options.replace(f"-i {sshd.root}/user", f"-i {tmp_path}/none"))
    usable, reason = SshTransport(two.source).usable(two.migration, two.peer)
    assert not usable and "cannot log in to 127.0.0.1" in reason


@pytest.mark.parametrize("address", ["-oProxyCommand=touch pwned", "a b", "root@x", "x;touch pwned", "..", "1:2"])
def test_addresses_that_are_more(pair: Make, sshd: SshServer, tmp_path: Path, address: str) -> None:
    two = pair(ssh_options=sshd.options, there={"address": address})
    assert not SshTransport(two.source).usable(two.migration, two.peer)[0]
    with pytest.raises(errors.Broken):
        SshTransport(two.source).send(two.shipment(data={0: b"x"}), two.peer, RecordingJob())
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("path", ["/tmp/$(touch pwned)", "--rsync-path=touch pwned", "relative", "/x;y", "/../x"])
def test_paths_that_are_more(two: Pair, path: str) -> None:
    two.change["place"] = {"path": path}
    with pytest.raises(errors.MigrationFailed, match="no path that is safe"):
        SshTransport(two.source).send(two.shipment(data={0: b"x"}), two.peer, RecordingJob())


def test_a_user_that_is_an_option(pair: Make, sshd: SshServer) -> None:
    two = pair(ssh_options=sshd.options, ssh_user="-oProxyCommand=x")
    assert "ssh_user" in SshTransport(two.source).usable(two.migration, two.peer)[1]


def test_a_limit_is_kept(pair: Make, sshd: SshServer) -> None:
    two = pair(ssh_options=sshd.options, bandwidth_mb=4)
    begin = time.monotonic()
    SshTransport(two.source).send(two.shipment(data={0: noise(8 * MIB)}), two.peer, RecordingJob())
    assert time.monotonic() - begin > 1.2
