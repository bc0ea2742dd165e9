from __future__ import annotations

import pytest

from compute_worker.liveprogress import detail_of, figures, report, status_of
from compute_worker.states import MigrationStatus
from compute_worker.virt.driver import JobStatistics
from tests.virt.jobs import RecordingJob

FULL = JobStatistics(
    "unbounded", memory_total=100, memory_processed=60, memory_remaining=40, memory_rate=10.0, memory_dirty_rate=5.0,
    memory_iteration=2, disk_total=1000, disk_processed=900, disk_remaining=100, disk_rate=20.0, downtime=0.3,
    elapsed=4.0, throttle=10,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stats", "status"),
    [
        (JobStatistics("unbounded"), MigrationStatus.RUNNING),
        (JobStatistics("bounded"), MigrationStatus.RUNNING),
        (JobStatistics("unbounded", postcopy=True), MigrationStatus.RUNNING_POSTCOPY),
        (JobStatistics("completed", postcopy=True), MigrationStatus.COMPLETED),
        (JobStatistics("cancelled"), MigrationStatus.CANCELLED),
        (JobStatistics("failed"), MigrationStatus.FAILED),
    ],
)
def test_the_status_is_the_one_of_the_record(stats: JobStatistics, status: MigrationStatus) -> None:
    assert MigrationStatus(status_of(stats)) is status


def test_everything_that_is_known_is_told_by_name() -> None:
    assert detail_of(FULL) == {
        "status": "running", "iteration": 2, "memory_total": 100, "memory_processed": 60, "memory_remaining": 40,
        "memory_rate": 10.0, "memory_dirty_rate": 5.0, "disk_total": 1000, "disk_processed": 900,
        "disk_remaining": 100, "disk_rate": 20.0, "throttle": 10, "elapsed": 4.0, "expected_downtime": 0.3,
    }  # fmt: skip
    assert detail_of(JobStatistics("unbounded", memory_remaining=0)) == {"status": "running", "memory_remaining": 0}


def test_a_downtime_is_expected_until_it_is_measured() -> None:
    over = detail_of(JobStatistics("completed", downtime=0.05, elapsed=9.0, memory_processed=7))
    assert "expected_downtime" not in over
    assert figures(over) == {"downtime": 0.05, "elapsed": 9.0, "memory_processed": 7}


def test_what_a_job_is_told() -> None:
    job = RecordingJob()
    report(job, JobStatistics("none"))
    assert job.reports == []
    report(job, FULL)
    report(job, JobStatistics("completed", memory_processed=100, disk_processed=1000, memory_remaining=3))
    assert job.reports == [("live_migration", 960, 1100), ("live_migration", 1100, 1100)]
