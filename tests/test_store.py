from __future__ import annotations

import time

import pytest

from compute_worker import errors
from compute_worker.objects import ExternalEvent, Flavor, ImageMeta, Instance
from compute_worker.operations.database import Database
from compute_worker.operations.schema import SCHEMA as JOURNAL
from compute_worker.states import VmState
from compute_worker.store import SCHEMA, Store

A = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
B = "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"


def make(uuid=A):
    return Instance(uuid=uuid, flavor=Flavor(vcpus=1, memory_mb=64), image=ImageMeta(id="img", kernel_id="k"))


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path / "j", (JOURNAL, SCHEMA))
    yield database
    database.close()


@pytest.fixture
def store(database):
    return Store(database, "node1")


def test_put_and_change(store, database):
    first = database.write(lambda tx: store.put(tx, make()))
    second = database.write(lambda tx: store.change(tx, A, vm_state=VmState.ACTIVE))
    assert second.seq > first.seq
    assert store.get(A).vm_state is VmState.ACTIVE
    assert database.write(lambda tx: store.change(tx, B, vm_state=VmState.ACTIVE)) is None


def test_unknown_deleted_and_moved_are_told_apart(store, database):
    with pytest.raises(errors.InstanceNotFound, match="node1"):
        store.get(A)
    database.write(lambda tx: store.bury(tx, A))
    with pytest.raises(errors.InstanceDeleted):
        store.get(A)
    database.write(lambda tx: tx.execute("INSERT INTO departed VALUES (?, 'node2')", (B,)))
    with pytest.raises(errors.InstanceMoved, match="node2") as caught:
        store.get(B)
    assert caught.value.kwargs["host"] == "node2"


def test_list_since_tells_of_deleted_ones(store, database):
    first = database.write(lambda tx: store.put(tx, make()))
    database.write(lambda tx: store.put(tx, make(B)))
    database.write(lambda tx: store.remove(tx, A, fault="why"))
    assert [i.uuid for i in store.list()] == [B]
    changed = store.list(since=first.seq)
    assert [(i.uuid, i.vm_state) for i in changed] == [(B, VmState.BUILDING), (A, VmState.DELETED)]
    assert changed[-1].fault == "why"
    store.prune(time.time() + 1)
    assert [i.uuid for i in store.list(since=0)] == [B]


def test_removing_is_not_burying(store, database):
    database.write(lambda tx: store.put(tx, make()))
    database.write(lambda tx: store.remove(tx, A))
    database.write(lambda tx: store.forbid_deleted(tx, A))
    database.write(lambda tx: store.put(tx, make()))
    assert store.get(A).uuid == A
    database.write(lambda tx: store.bury(tx, A))
    with pytest.raises(errors.InstanceDeleted):
        database.write(lambda tx: store.forbid_deleted(tx, A))


def test_events_wait_until_somebody_asks(store, database):
    database.write(lambda tx: store.put(tx, make()))
    event = ExternalEvent(name="network-vif-plugged", tag="v1")
    database.write(lambda tx: store.add_event(tx, A, event))
    assert store.event_status(A, "network-vif-plugged", "v1") == "completed"
    assert store.event_status(A, "network-vif-plugged", "v2") is None
    database.write(lambda tx: store.remove(tx, A))
    assert store.event_status(A, "network-vif-plugged", "v1") is None


def test_used_images(store, database):
    database.write(lambda tx: store.put(tx, make()))
    assert store.used_images() == {"img", "k"}
