from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_worker import claims, config, errors
from compute_worker.claims import Amount, Claims, amount_of, capacities, decide
from compute_worker.objects import BlockDeviceInfo, EphemeralDisk, Flavor, ImageMeta, Instance
from compute_worker.operations.database import Database
from compute_worker.virt.driver import HostResources

HOST = HostResources(4, 1024, 100, 100, "fake", 1, "node1")
OPTIONS = config.Claims(cpu_allocation_ratio=2.0, reserved_host_memory_mb=24, reserved_host_disk_gb=10)


def instance(number=1, vcpus=1, memory_mb=100, root_gb=10, **flavor):
    return Instance(
        uuid=f"00000000-0000-4000-8000-{number:012d}",
        flavor=Flavor(vcpus=vcpus, memory_mb=memory_mb, root_gb=root_gb, **flavor),
        image=ImageMeta(id="i", size_bytes=2**30),
    )


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "j", (claims.SCHEMA,))
    yield database
    database.close()


@pytest.fixture
def ledger(database):
    ledger = Claims(database, "node1", OPTIONS)
    ledger.refresh(HOST)
    return ledger


def test_amount_counts_every_disk():
    wanted = instance(ephemeral_gb=2, swap_mb=512)
    assert amount_of(wanted) == Amount(1, 100, 12.5)
    devices = BlockDeviceInfo(ephemerals=[EphemeralDisk(size_gb=2)], swap_mb=0)
    assert amount_of(msgspec.structs.replace(wanted, block_device_info=devices)).disk_gb == 12
    assert amount_of(instance(root_gb=0)).disk_gb == 1


def test_ratios_and_reservations():
    found = capacities(HOST, Amount(1, 2, 3), OPTIONS)
    assert found["vcpus"].usable == 8 and found["memory_mb"].usable == 1000 and found["disk_gb"].usable == 90
    assert found["disk_gb"].free == 87


@pytest.mark.parametrize(
    ("wanted", "lacking"),
    [
        (Amount(8, 1000, 90), None),
        (Amount(9, 1, 1), "vcpus"),
        (Amount(1, 1001, 1), "memory_mb"),
        (Amount(1, 1, 90.5), "disk_gb"),
    ],
)
def test_decide(wanted, lacking):
    found, reason = decide(wanted, capacities(HOST, Amount(0, 0, 0), OPTIONS))
    assert found == lacking
    assert lacking is None or (lacking in reason and "free" in reason)


def test_claim_that_does_not_fit_changes_nothing(ledger, database):
    database.write(lambda tx: ledger.claim(tx, instance(1, memory_mb=600)))
    with pytest.raises(errors.InsufficientResources) as caught:
        database.write(lambda tx: ledger.claim(tx, instance(2, memory_mb=600)))
    assert caught.value.reschedulable and caught.value.kwargs["resource"] == "memory_mb"
    assert ledger.usage()["memory_mb"].used == 600


def test_claiming_twice_is_claiming_once(ledger, database):
    for _ in range(2):
        database.write(lambda tx: ledger.claim(tx, instance(1, memory_mb=600)))
    assert ledger.usage()["memory_mb"].used == 600
    for _ in range(2):
        database.write(lambda tx: ledger.release(tx, instance(1).uuid))
    assert ledger.usage()["memory_mb"].used == 0


def test_nothing_is_promised_before_the_host_is_known(database):
    with pytest.raises(errors.HypervisorUnavailable):
        database.write(lambda tx: Claims(database, "node1", OPTIONS).claim(tx, instance()))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(16, 500), st.integers(0, 50)), max_size=12))
def test_never_more_is_promised_than_is_usable(tmp_path_factory, wishes):
    database = Database(tmp_path_factory.mktemp("c") / "j", (claims.SCHEMA,))
    ledger = Claims(database, "node1", OPTIONS)
    ledger.refresh(HOST)
    for number, (vcpus, memory_mb, root_gb) in enumerate(wishes):
        wanted = instance(number, vcpus, memory_mb, root_gb)
        try:
            database.write(lambda tx, w=wanted: ledger.claim(tx, w))
        except errors.InsufficientResources:
            continue
    assert all(c.used <= c.usable for c in ledger.usage().values())
    database.close()
