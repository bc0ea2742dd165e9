"""What libvirt is asked for."""

from __future__ import annotations

from dataclasses import replace

import libvirt
import msgspec
import pytest

from compute_worker import errors
from compute_worker.config import LiveMigration
from compute_worker.objects import MigrateData, Migration
from compute_worker.virt.driver import JobStatistics
from compute_worker.virt.libvirt.livemigration_plan import Luggage, itinerary, policy, summary

MIGRATION = Migration(
    uuid="11111111-1111-4111-8111-111111111111",
    instance="22222222-2222-4222-8222-222222222222",
    source_host="node1",
    dest_host="node2",
)
LOCAL = MigrateData(migration=MIGRATION.uuid, block_migration=True, post_copy=True)
LUGGAGE = Luggage("<live/>", "<persistent/>", ("vda", "vdb"), hypervisor_version=7_002_000)
ALWAYS = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST


@pytest.mark.parametrize(
    ("options", "data", "luggage", "flags"),
    [
        ({}, {}, {}, libvirt.VIR_MIGRATE_NON_SHARED_INC),
        ({}, {"full_copy": True}, {}, libvirt.VIR_MIGRATE_NON_SHARED_DISK),
        ({}, {"shared_instance_path": True}, {"targets": ()}, libvirt.VIR_MIGRATE_UNSAFE),
        ({}, {"native_tls": True}, {}, libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_TLS),
        ({"permit_post_copy": True}, {}, {}, libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_POSTCOPY),
        ({"permit_post_copy": True}, {"post_copy": False}, {}, libvirt.VIR_MIGRATE_NON_SHARED_INC),
        ({"permit_post_copy": True}, {}, {"paused": True}, libvirt.VIR_MIGRATE_NON_SHARED_INC),
        ({"permit_auto_converge": True}, {}, {},
         libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_AUTO_CONVERGE),
        ({"permit_auto_converge": True, "permit_post_copy": True}, {}, {},
         libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_POSTCOPY),
        ({"parallel_connections": 4}, {}, {}, libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_PARALLEL),
        ({"parallel_connections": 4, "permit_post_copy": True}, {}, {},
         libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_POSTCOPY),
        ({"parallel_connections": 4, "permit_post_copy": True}, {}, {"hypervisor_version": 10_001_000},
         libvirt.VIR_MIGRATE_NON_SHARED_INC | libvirt.VIR_MIGRATE_POSTCOPY | libvirt.VIR_MIGRATE_PARALLEL),
    ],
)  # fmt: skip
def test_flags(options: dict[str, object], data: dict[str, object], luggage: dict[str, object], flags: int) -> None:
    found = itinerary(
        LiveMigration(**options),  # type: ignore[arg-type]
        MIGRATION,
        msgspec.structs.replace(LOCAL, **data),
        replace(LUGGAGE, **luggage),  # type: ignore[arg-type]
    )
    assert found.flags == ALWAYS | flags
    assert found.post_copy == bool(flags & libvirt.VIR_MIGRATE_POSTCOPY)
    assert found.auto_converge == bool(flags & libvirt.VIR_MIGRATE_AUTO_CONVERGE)


def test_both_xmls_always_go() -> None:
    """CVE-2020-17376: the definition too."""
    params = itinerary(LiveMigration(), MIGRATION, LOCAL, LUGGAGE).params
    assert params[libvirt.VIR_MIGRATE_PARAM_DEST_XML] == "<live/>"
    assert params[libvirt.VIR_MIGRATE_PARAM_PERSIST_XML] == "<persistent/>"
    assert params[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] == ["vda", "vdb"]


@pytest.mark.parametrize(
    ("options", "data", "key", "value"),
    [
        ({"bandwidth_mb": 7}, {}, libvirt.VIR_MIGRATE_PARAM_BANDWIDTH, 7),
        ({}, {}, libvirt.VIR_MIGRATE_PARAM_BANDWIDTH, None),
        ({}, {"native_tls": True}, libvirt.VIR_MIGRATE_PARAM_TLS_DESTINATION, "node2"),
        ({}, {}, libvirt.VIR_MIGRATE_PARAM_TLS_DESTINATION, None),
        ({}, {"migrate_uri": "tcp://10.0.0.2"}, libvirt.VIR_MIGRATE_PARAM_URI, "tcp://10.0.0.2"),
        ({"parallel_connections": 3}, {}, libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, 3),
        ({"permit_auto_converge": True}, {}, libvirt.VIR_MIGRATE_PARAM_AUTO_CONVERGE_INITIAL, 20),
    ],
)
def test_parameters(options: dict[str, object], data: dict[str, object], key: str, value: object) -> None:
    made = itinerary(
        LiveMigration(**options), MIGRATION, msgspec.structs.replace(LOCAL, **data), LUGGAGE  # type: ignore[arg-type]
    )
    assert made.params.get(key) == value


@pytest.mark.parametrize(
    ("scheme", "data", "uri"),
    [
        ("auto", {}, "qemu+tcp://node2/system"),
        ("auto", {"native_tls": True}, "qemu+tls://node2/system"),
        ("tcp", {"native_tls": True}, "qemu+tcp://node2/system"),
        ("ssh", {}, "qemu+ssh://node2/system"),
        ("tcp", {"listen_address": "10.0.0.2"}, "qemu+tcp://10.0.0.2/system"),
        ("tcp", {"listen_address": "fd00::2"}, "qemu+tcp://[fd00::2]/system"),
        ("tls", {"listen_address": "10.0.0.2"}, "qemu+tls://node2/system"),
    ],
)
def test_where_to(scheme: str, data: dict[str, object], uri: str) -> None:
    found = itinerary(LiveMigration(scheme=scheme), MIGRATION, msgspec.structs.replace(LOCAL, **data), LUGGAGE)
    assert found.uri == uri


@pytest.mark.parametrize("name", ["-x", "a b", "node2/system?command=sh", "a@b", "no:de", "node2#", "..", ""])
def test_nothing_but_a_host_is_a_destination(name: str) -> None:
    data = msgspec.structs.replace(LOCAL, listen_address=name or "%")
    with pytest.raises(errors.NotSupported, match="no host name"):
        itinerary(LiveMigration(), MIGRATION, data, LUGGAGE)


def test_policy_is_of_this_guest() -> None:
    options = LiveMigration(permit_post_copy=True, max_downtime_ms=70, completion_timeout=9)
    made = itinerary(options, MIGRATION, msgspec.structs.replace(LOCAL, post_copy=False), LUGGAGE)
    found = policy(options, made, 3 << 30)
    assert (found.size_gib, found.max_downtime_ms, found.deadline, found.post_copy) == (3.0, 70, 27.0, False)


def test_an_emulated_guest_has_as_few_iterations_as_can_be() -> None:
    """QEMU's own processor loses pages between them."""
    options = LiveMigration(max_downtime_ms=400)
    made = itinerary(options, MIGRATION, LOCAL, LUGGAGE)
    assert policy(options, made, 1 << 30, emulated=True).ladder == (400,)
    assert policy(options, made, 1 << 30).ladder[0] == 50


def test_summary() -> None:
    statistics = JobStatistics("completed", memory_processed=3 << 20, disk_processed=1 << 19, elapsed=2, downtime=0.06)
    assert summary(statistics) == "3.5 MiB in 2.0 s, downtime 60 ms"
    assert "unknown" in summary(JobStatistics("none"))
