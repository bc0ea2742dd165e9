"""What this host knows of its instances, in the journal's file: a change of state and its operation are one commit."""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec

from compute_worker import errors
from compute_worker.objects import ExternalEvent, Instance
from compute_worker.operations.database import Database, Tx, next_seq
from compute_worker.operations.journal import tombstone, tombstone_of
from compute_worker.states import PowerState, VmState

SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
    uuid TEXT PRIMARY KEY,
    vm_state TEXT NOT NULL,
    record BLOB NOT NULL,
    changed_at REAL NOT NULL,
    seq INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS instances_seq ON instances (seq);
CREATE TABLE IF NOT EXISTS departed (
    uuid TEXT PRIMARY KEY,
    host TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    instance TEXT NOT NULL,
    name TEXT NOT NULL,
    tag TEXT NOT NULL,
    status TEXT NOT NULL,
    PRIMARY KEY (instance, name, tag)
) WITHOUT ROWID;
"""

_HOST_PATH = re.compile(r"(?<![\w/.:])(?:file://)?(?:/[^\s/:;,'\"()\[\]<>]+)+/?")
_DECODER = msgspec.json.Decoder(Instance)
_ENCODER = msgspec.json.Encoder()


class Store:
    """Instances of one host. Methods with a ``tx`` belong to the caller's transaction; the others read what is durable.

    A deleted instance stays as a row in ``VmState.DELETED`` until it is pruned, so that ``list_instances(since=...)``
    can tell of it; its uuid stays tombstoned for ever.
    """

    def __init__(self, database: Database, host: str) -> None:
        self._database = database
        self._host = host

    def put(self, tx: Tx, instance: Instance) -> Instance:
        """Write an instance as it is now; returns it with its new ``seq``.

        Its ``fault`` is for the instance's owner: paths of this host stay in the log and in the operation's error.
        """
        fault = instance.fault and _HOST_PATH.sub("[path]", instance.fault)
        fresh = msgspec.structs.replace(instance, seq=next_seq(tx), fault=fault)
        tx.execute(
            "INSERT INTO instances VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " vm_state = excluded.vm_state, record = excluded.record, changed_at = excluded.changed_at,"
            " seq = excluded.seq",
            (fresh.uuid, fresh.vm_state, _ENCODER.encode(fresh), time.time(), fresh.seq),
        )
        return fresh

    def change(self, tx: Tx, uuid: str, **changes: Any) -> Instance | None:
        """Change fields of an instance that is here; ``None`` when it is not (any more)."""
        instance = self.find(tx, uuid)
        if instance is None:
            return None
        return self.put(tx, msgspec.structs.replace(instance, **changes))

    def find(self, tx: Tx, uuid: str) -> Instance | None:
        """The instance, unless it is not here or was deleted."""
        row = tx.execute(
            "SELECT record FROM instances WHERE uuid = ? AND vm_state NOT IN ('deleted', 'departed')", (uuid,)
        ).fetchone()
        return _DECODER.decode(row[0]) if row else None

    def has_row(self, tx: Tx, uuid: str) -> bool:
        """Whether it ever was here, as far as rows last: also when it is deleted or was undone."""
        return tx.execute("SELECT 1 FROM instances WHERE uuid = ?", (uuid,)).fetchone() is not None

    def require(self, tx: Tx, uuid: str) -> Instance:
        """The instance.

        :raises InstanceMoved: it left; the error says where to.
        :raises InstanceDeleted: it was deleted.
        :raises InstanceNotFound: this host never had it.
        """
        instance = self.find(tx, uuid)
        if instance is not None:
            return instance
        host = self.went_to(tx, uuid)
        if host is not None:
            raise errors.InstanceMoved(instance=uuid, host=host)
        if self.is_deleted(tx, uuid):
            raise errors.InstanceDeleted(instance=uuid)
        raise errors.InstanceNotFound(instance=uuid, host=self._host)

    def get(self, uuid: str) -> Instance:
        """The instance as it is on disk; raises what :meth:`require` raises."""
        return self._database.read(lambda tx: self.require(tx, uuid))

    def list(self, since: int | None = None) -> list[Instance]:
        """All instances; with ``since``, those changed after that ``seq``, deleted ones too, in order of change."""

        def look(tx: Tx) -> list[Instance]:
            if since is None:
                here = "vm_state NOT IN ('deleted', 'departed')"
                rows = tx.execute(f"SELECT record FROM instances WHERE {here} ORDER BY seq")
            else:
                rows = tx.execute("SELECT record FROM instances WHERE seq > ? ORDER BY seq", (since,))
            return [_DECODER.decode(row[0]) for row in rows]

        return self._database.read(look)

    def remove(self, tx: Tx, uuid: str, fault: str | None = None) -> None:
        """Let it go: its row says deleted, its claims and events are gone. Its uuid is *not* tombstoned by this."""
        self.change(tx, uuid, vm_state=VmState.DELETED, task_state=None, power_state=PowerState.NOSTATE, fault=fault)
        tx.execute("DELETE FROM events WHERE instance = ?", (uuid,))

    def depart(self, tx: Tx, uuid: str, host: str) -> None:
        """It belongs to another host from now on: asked for it, this one says where it went."""
        gone = self.change(tx, uuid, host=host, task_state=None)
        if gone is not None:
            tx.execute("UPDATE instances SET vm_state = 'departed' WHERE uuid = ?", (uuid,))
            tx.execute("DELETE FROM events WHERE instance = ?", (uuid,))
        tx.execute("INSERT OR REPLACE INTO departed VALUES (?, ?)", (uuid, host))

    def arrive(self, tx: Tx, instance: Instance) -> Instance:
        """It belongs to this host from now on."""
        tx.execute("DELETE FROM departed WHERE uuid = ?", (instance.uuid,))
        return self.put(tx, instance)

    def went_to(self, tx: Tx, uuid: str) -> str | None:
        """The host that an instance left for, if it did."""
        row = tx.execute("SELECT host FROM departed WHERE uuid = ?", (uuid,)).fetchone()
        return str(row[0]) if row else None

    def bury(self, tx: Tx, uuid: str) -> None:
        """Tombstone the uuid: it is never built, received or committed again on this host."""
        tombstone(tx, f"instance/{uuid}", "deleted", None)

    def is_deleted(self, tx: Tx, uuid: str) -> bool:
        """Whether the uuid is tombstoned."""
        return tombstone_of(tx, f"instance/{uuid}") is not None

    def forbid_deleted(self, tx: Tx, uuid: str) -> None:
        """What every COMMIT and every accepting host asks.

        :raises InstanceDeleted: a delete came first; it wins.
        """
        if self.is_deleted(tx, uuid):
            raise errors.InstanceDeleted(instance=uuid)

    def add_event(self, tx: Tx, uuid: str, event: ExternalEvent) -> None:
        """Keep an external event until somebody waits for it or the instance goes."""
        tx.execute(
            "INSERT INTO events VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET status = excluded.status",
            (uuid, event.name, event.tag or "", event.status),
        )

    def event_status(self, uuid: str, name: str, tag: str) -> str | None:
        """The status of an external event, if it came."""

        def look(tx: Tx) -> str | None:
            sql = "SELECT status FROM events WHERE instance = ? AND name = ? AND tag = ?"
            row = tx.execute(sql, (uuid, name, tag)).fetchone()
            return str(row[0]) if row else None

        return self._database.read(look)

    def prune(self, older_than: float) -> None:
        """Drop rows of instances that were deleted or left before ``older_than`` (seconds since the epoch)."""
        sql = "DELETE FROM instances WHERE vm_state IN ('deleted', 'departed') AND changed_at < ?"
        self._database.write(lambda tx: tx.execute(sql, (older_than,)))

    def used_images(self) -> set[str]:
        """Ids of images that instances here were made from."""
        used: set[str] = set()
        for instance in self.list():
            image = instance.image
            used |= {i for i in (image.id, image.kernel_id, image.ramdisk_id) if i is not None}
        return used
