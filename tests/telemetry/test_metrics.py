"""Metrics: what is counted and what is asked for."""

from __future__ import annotations

import subprocess
import sys

from prometheus_client.parser import text_string_to_metric_families

from compute_worker.objects import Capacity, HostState
from compute_worker.telemetry.metrics import Metrics, NullObserver, Observer, Snapshot


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text, content_type = metrics.text()
    assert content_type.startswith("text/plain")
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text.decode())
        for s in family.samples
    }


def test_events_are_counted() -> None:
    metrics: Observer = Metrics(Snapshot, "1.2")
    assert isinstance(metrics, Metrics)
    metrics.operation_finished("stop_instance", "done", 0.2)
    metrics.operation_finished("stop_instance", "done", -1.0)
    metrics.journal_commit(0.004)
    metrics.notification_sent("instance.stop.end")
    found = samples(metrics)
    done = (("kind", "stop_instance"), ("state", "done"))
    assert found["compute_worker_operation_duration_seconds_count", done] == 2
    assert found["compute_worker_operation_duration_seconds_sum", done] == 0.2
    assert found["compute_worker_journal_commit_seconds_bucket", (("le", "0.005"),)] == 1
    assert found["compute_worker_journal_commit_seconds_bucket", (("le", "0.003"),)] == 0
    assert found["compute_worker_notifications_sent_total", (("event", "end"),)] == 1
    assert found["compute_worker_info", (("version", "1.2"),)] == 1
    assert found["process_resident_memory_bytes", ()] > 1 << 20


def test_the_rest_is_asked_for_at_each_scrape() -> None:
    now = Snapshot()
    asked = []

    def source() -> Snapshot:
        asked.append(1)
        return now

    metrics = Metrics(source, "1")
    assert not asked
    assert ("compute_worker_broker_up", ()) not in samples(metrics)
    host = HostState(
        host="node1",
        enabled=False,
        instances=3,
        vcpus=Capacity(total=4, usable=16, used=2),
        memory_mb=Capacity(total=8192, usable=7680, used=512),
        disk_gb=Capacity(total=100, usable=90, used=1.5),
    )
    now = Snapshot(
        operations={("build_and_run_instance", "running", "fetch_image"): 2},
        host=host,
        broker_up=True,
        hypervisor_up=False,
        outbox_rows=7,
    )
    found = samples(metrics)
    labels = (("kind", "build_and_run_instance"), ("phase", "fetch_image"), ("state", "running"))
    assert found["compute_worker_operations", labels] == 2
    assert found["compute_worker_broker_up", ()] == 1
    assert found["compute_worker_hypervisor_up", ()] == 0
    assert found["compute_worker_outbox_notifications", ()] == 7
    assert found["compute_worker_enabled", ()] == 0
    assert found["compute_worker_instances", ()] == 3
    assert found["compute_worker_resource_claimed", (("resource", "disk_gb"),)] == 1.5
    assert found["compute_worker_resource_usable", (("resource", "vcpus"),)] == 16
    assert len(asked) == 2


def test_two_hosts_of_one_process_do_not_share_counts() -> None:
    one, two = Metrics(Snapshot, "1"), Metrics(Snapshot, "1")
    one.journal_commit(0.001)
    assert samples(two)["compute_worker_journal_commit_seconds_count", ()] == 0


def test_without_metrics_nothing_is_imported() -> None:
    code = (
        "import sys, compute_worker.telemetry.metrics as m; o: m.Observer = m.NullObserver(); o.journal_commit(1.0);"
        " o.notification_sent('z'); o.operation_finished('a', 'b', 1.0);"
        " sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    assert isinstance(NullObserver(), NullObserver)


def test_live_migrations_that_go_on_and_downtimes() -> None:
    detail: dict[str, float | int | str] = {
        "status": "running", "memory_total": 1000, "memory_remaining": 400, "memory_dirty_rate": 12.5, "iteration": 3,
        "disk_remaining": 7, "expected_downtime": 0.4,
    }  # fmt: skip
    buckets = [("0.1", 2.0), ("+Inf", 3.0)]
    found = samples(Metrics(lambda: Snapshot(migrations=[("a", detail), ("b", {})], downtimes=(buckets, 0.9)), "1"))
    assert found["compute_worker_live_migrations", (("status", "running"),)] == 1
    assert found["compute_worker_live_migrations", (("status", "preparing"),)] == 1
    of_a = (("instance", "a"),)
    assert found["compute_worker_live_migration_memory_remaining_bytes", of_a] == 400
    assert found["compute_worker_live_migration_memory_dirty_rate_bytes", of_a] == 12.5
    assert found["compute_worker_live_migration_disk_remaining_bytes", of_a] == 7
    assert found["compute_worker_live_migration_iteration", of_a] == 3
    assert found["compute_worker_live_migration_expected_downtime_seconds", of_a] == 0.4
    assert not [name for name, labels in found if ("instance", "b") in labels]
    assert found["compute_worker_live_migration_downtime_seconds_bucket", (("le", "0.1"),)] == 2
    assert found["compute_worker_live_migration_downtime_seconds_count", ()] == 3
    assert found["compute_worker_live_migration_downtime_seconds_sum", ()] == 0.9
