from __future__ import annotations

import sqlite3
import stat
import threading

import pytest

from compute_worker import errors
from compute_worker.operations.database import Closed, Database, next_seq
from tests.waiting import wait_for

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


def test_disk_that_is_full_in_the_middle_of_a_transaction_may_have_room_later(database):
    database._writer.execute("PRAGMA max_page_count=20")
    with pytest.raises(errors.StoreBusy, match="full"):
        database.write(lambda tx: tx.execute("INSERT INTO t VALUES (zeroblob(1000000))"))
    database.write(lambda tx: tx.execute("INSERT INTO t VALUES (1)"))
    assert count(database) == 1


def test_what_is_deleted_leaves_the_file_whatever_sqlite_was_built_for(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def careless(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA secure_delete=OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", careless)
    database = Database(tmp_path / "j", (SCHEMA,))
    database.write(lambda tx: tx.execute("INSERT INTO t VALUES (?)", ("a secret " * 500,)))
    database.write(lambda tx: tx.execute("DELETE FROM t"))
    database.close()
    assert b"a secret" not in (tmp_path / "j").read_bytes()


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


def test_writers_that_come_during_a_commit_share_the_next_one(tmp_path):
    commits = []
    database = Database(tmp_path / "j", (SCHEMA,), commits.append)
    entered, gate = threading.Event(), threading.Event()

    def slow(tx):
        entered.set()
        assert gate.wait(10)

    first = threading.Thread(target=database.write, args=(slow,))
    first.start()
    assert entered.wait(10)
    others = [
        threading.Thread(target=database.write, args=(lambda tx, n=n: tx.execute("INSERT INTO t VALUES (?)", (n,)),))
        for n in range(30)
    ]
    for thread in others:
        thread.start()
    wait_for(lambda: len(database._pending) == 30, what="30 writers to wait")
    before = len(commits)
    gate.set()
    for thread in (first, *others):
        thread.join(10)
    assert count(database) == 30
    assert len(commits) - before == 2, "the slow one, and one for all who waited"
    database.close()


def test_work_that_is_interrupted_ends_its_own_writer_only(database):
    class Interrupted(BaseException):
        pass

    def bad(tx):
        tx.execute("INSERT INTO t VALUES (1)")
        raise Interrupted

    with pytest.raises(Interrupted):
        database.write(bad)
    database.write(lambda tx: tx.execute("INSERT INTO t VALUES (2)"))
    assert count(database) == 1


def test_what_need_not_be_durable_is_seen_at_once_and_leaves_the_next_commit_synced(database):
    database.write(lambda tx: tx.execute("INSERT INTO t VALUES (1)"), durable=False)
    assert count(database) == 1
    assert database._writer.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_one_durable_write_makes_the_whole_commit_durable(tmp_path):
    database = Database(tmp_path / "j", (SCHEMA,))
    levels = []
    entered, gate = threading.Event(), threading.Event()

    def look(tx):
        levels.append(tx.execute("PRAGMA synchronous").fetchone()[0])

    def slow(tx):
        look(tx)
        entered.set()
        assert gate.wait(10)

    lazy = threading.Thread(target=database.write, args=(slow,), kwargs={"durable": False})
    lazy.start()
    assert entered.wait(10)
    others = [threading.Thread(target=database.write, args=(look,), kwargs={"durable": d}) for d in (False, True)]
    for thread in others:
        thread.start()
    wait_for(lambda: len(database._pending) == 2, what="two writers to wait")
    gate.set()
    for thread in (lazy, *others):
        thread.join(10)
    assert levels == [1, 2, 2]
    database.close()


def test_writers_that_wait_are_told_that_it_was_closed(tmp_path):
    database = Database(tmp_path / "j", (SCHEMA,))
    entered, gate = threading.Event(), threading.Event()
    ended = []

    def slow(tx):
        entered.set()
        assert gate.wait(10)

    def write(func):
        try:
            database.write(func)
        except Closed as exc:
            ended.append(exc)

    threads = [threading.Thread(target=write, args=(slow,))]
    threads[0].start()
    assert entered.wait(10)
    threads += [threading.Thread(target=write, args=(lambda tx: None,)) for _ in range(5)]
    threads += [threading.Thread(target=database.close)]
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(database._pending) == 5 and database._closed, what="writers to wait and the end to come")
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 6
    with pytest.raises(Closed):
        database.write(lambda tx: None)


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
