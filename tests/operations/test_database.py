from __future__ import annotations

import stat
import threading

import pytest

from compute_worker import errors
from compute_worker.operations.database import Closed, Database, next_seq

SCHEMA = "CREATE TABLE IF NOT EXISTS t (n INTEGER UNIQUE);"


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "d" / "journal.sqlite", (SCHEMA,))
    yield database
    database.close()


def count(database):
    return database.read(lambda tx: tx.execute("SELECT count(*) FROM t").fetchone()[0])


def test_file_is_private(database):
    assert stat.S_IMODE(database.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(database.path.parent.stat().st_mode) == 0o700


def test_failed_work_is_rolled_back_alone(database):
    def bad(tx):
        tx.execute("INSERT INTO t VALUES (1)")
        raise errors.InstanceExists(instance="x")

    with pytest.raises(errors.InstanceExists):
        database.write(bad)
    assert count(database) == 0


def test_concurrent_writers_share_commits_and_fail_alone(tmp_path):
    commits = []
    database = Database(tmp_path / "j", (SCHEMA,), commits.append)
    failures = []
    barrier = threading.Barrier(16)

    def work(base):
        barrier.wait()
        for n in range(20):
            try:
                database.write(lambda tx, v=base * 10 + n: tx.execute("INSERT INTO t VALUES (?)", (v,)))
            except Exception as exc:
                failures.append(exc)

    threads = [threading.Thread(target=work, args=(b,)) for b in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert count(database) + len(failures) == 320
    assert len(failures) == 150, "every overlapping value fails once, alone"
    assert len(commits) < 320
    database.close()


def test_closed_database_says_so_without_being_an_exception(tmp_path):
    database = Database(tmp_path / "j", (SCHEMA,))
    database.close()
    with pytest.raises(Closed):
        database.write(lambda tx: None)
    with pytest.raises(Closed):
        database.read(lambda tx: None)
    assert not issubclass(Closed, Exception)


def test_identity_and_sequence_survive_reopening(tmp_path):
    first = Database(tmp_path / "j", (SCHEMA,))
    seq = first.write(next_seq)
    first.close()
    second = Database(tmp_path / "j", (SCHEMA,))
    assert second.journal_id == first.journal_id
    assert second.write(next_seq) == seq + 1
    second.close()


def test_garbage_file_is_refused_with_its_name(tmp_path):
    (tmp_path / "j").write_bytes(b"not a database at all" * 100)
    with pytest.raises(errors.Broken, match="journal"):
        Database(tmp_path / "j", (SCHEMA,))


def test_commit_is_synced_to_disk(database):
    assert database._writer.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert database._writer.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
